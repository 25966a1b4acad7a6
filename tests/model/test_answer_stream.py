"""Answers on the screen: each character once, whatever tokens it is cut into; thoughts dim, in the template's own tags."""

import io
from pathlib import Path

import pytest
import torch
from families import load
from hypothesis import given, settings
from hypothesis import strategies as st
from support import character_tokenizer
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.chat.template import Template
from accel_llm.chat.thoughts import split_tagged
from accel_llm.model.answer_stream import AnswerStream, TokenText

TOKENIZERS = Path(__file__).parents[3] / "shared" / "data" / "tokenizers"
TEXTS = [
    "Hello, world.\n\nA list:\n- one\n- two",
    "中文也可以。标点符号,以及换行\n第二行。",
    "👩‍👩‍👧‍👦 and 🇫🇷, 😀😀😀 é e\u0301 ñ",
    "  spaces   before and  between \n \n\n end ",
    "don't , you ' s . \ufffd is a character too",
    "word " * 200 + "end",
    "字" * 150,
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind of Llama 2, whose unknown characters are bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    backend = Tokenizer(models.BPE({piece: k for k, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    """Return what is printed after each token, and at the end."""
    tokens = TokenText(tokenizer)
    return [*(tokens.add(token) for token in ids), tokens.finish()]


def check(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    parts = stream(tokenizer, ids)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
    return parts


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["qwen3", "llama2", "mistral-7b", "phi-3-mini", "smollm", "happy-llm_tokenizer_k"])
def test_real_tokenizers_print_each_character_once(name):
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        parts = check(tokenizer, [*ids, tokenizer.eos_token_id])
        assert not any("\ufffd" in part for part in parts[:-1]) or "\ufffd" in text
        assert len([part for part in parts if part]) > len(ids) / 4  # it streams


def test_a_character_of_several_byte_tokens_appears_when_it_is_whole():
    tokenizer = load("qwen3")[0]  # one that knows bytes and a few words
    ids = tokenizer("a😀中")["input_ids"]
    assert stream(tokenizer, ids) == ["a", "", "", "", "😀", "", "", "中", ""]
    # A stopped answer ends inside a character.
    assert stream(tokenizer, ids[:3]) == ["a", "", "", "\ufffd"]


def test_bytes_of_a_sentencepiece_tokenizer():
    tokenizer = byte_fallback()
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "中😀中".encode()]
    # Bytes that stand together are a text only if all of them are: 中 goes first, and then waits for the others.
    assert check(tokenizer, ids) == ["", "", "中", "", "", "", "😀", "", "", "中", ""]
    check(tokenizer, [*ids * 30, 258, 261, 1])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_tokens_print_what_they_decode_to(data):
    tokenizer = byte_fallback() if data.draw(st.booleans()) else character_tokenizer()
    text = data.draw(st.text("ab中😀 \n", max_size=60))
    if tokenizer.convert_tokens_to_ids("<0x41>") == tokenizer.unk_token_id:
        ids = tokenizer(text)["input_ids"]
    else:
        ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    repeated = ids * data.draw(st.integers(1, 8))
    check(tokenizer, repeated)


def shown(template: Template, tokenizer: PreTrainedTokenizerFast, text: str, screen: io.StringIO) -> AnswerStream:
    answer = AnswerStream(tokenizer, template, screen)
    answer.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
        answer.put(torch.tensor([token]))
    answer.end()
    answer.end()  # `generate` may have called it
    return answer


@pytest.mark.parametrize(
    "name, text, thought, answer",
    [
        ("qwen3", "<think>\nHm 😀.\n</think>\n\nHello.", "<think>\nHm 😀.\n</think>", "\n\nHello."),
        ("qwen3", "No thought <think>x</think>.", "", "No thought <think>x</think>."),
        ("qwen3", "<think>\nstopped", "<think>\nstopped", ""),
        ("qwen3", "", "", ""),
        ("chatml", "<think>a</think>b", "<think>a</think>", "b"),
        ("chatml", "a < b <thi", "", "a < b <thi"),
        # The prompt has written the first tag.
        ("deepseek-r1-distill", "Hm.\n</think>\n\nHello.", "<think>\nHm.\n</think>", "\n\nHello."),
        ("gemma-4", "<|channel>thought\nHm.<channel|>Hello.", "<|channel>thought\nHm.<channel|>", "Hello."),
    ],
)
def test_a_thought_is_dim_on_a_terminal_and_in_its_tags_elsewhere(name, text, thought, answer, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    tokenizer, template = load(name)
    plain, screen = io.StringIO(), Terminal()
    shown(template, tokenizer, text, plain)
    assert plain.getvalue() == f"{thought}{answer}\n"
    shown(template, tokenizer, text, screen)
    raw = screen.getvalue()
    dim = [part.partition("\x1b[0m")[0] for part in raw.split("\x1b[2m")[1:]]
    assert "".join(dim) == thought and raw.replace("\x1b[2m", "").replace("\x1b[0m", "") == plain.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    shown(template, tokenizer, text, screen := Terminal())
    assert screen.getvalue() == plain.getvalue()


def test_the_parts_of_an_answer_with_a_thought():
    tags = ("<t>", "</t>")
    assert split_tagged("<t>\na\n</t>\n\nb", tags, False) == ("a", "b")
    assert split_tagged("a</t>b", tags, True) == ("a", "b")
    assert split_tagged("a</t>b", tags, False) == ("", "a</t>b")
    assert split_tagged("<t>a", tags, False) == ("a", "")
