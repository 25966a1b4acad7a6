"""A tokenizer is written as GGUF only if llama.cpp has one with the same ids; llama.cpp itself is the judge of that."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import need_serving_packages
from support import byte_level, character_tokenizer, sentence_piece_like, tiny_model
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from accel_llm.chat.template_source import CHATML
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError
from accel_llm.merge.gguf_file import ServedWords, order_stops, read_words, write_gguf
from accel_llm.merge.gguf_tokenizer import BYTE, CONTROL, UNUSED, GgufTokenizer, convert_tokenizer
from accel_llm.merge.served import check_stops, compare_ids, load_served, read_as_special
from accel_llm.model.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("quiet")
DATA = Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
LLAMA2_CHAT = """\
{{- bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{%- else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"""


def convert(tokenizer: PreTrainedTokenizerFast, special_first: bool = True, more_rows: int = 0) -> GgufTokenizer:
    return convert_tokenizer(tokenizer, max(tokenizer.get_vocab().values()) + 1 + more_rows, special_first)


def changed(tokenizer: PreTrainedTokenizerFast, change: Callable[[dict[str, Any]], None]) -> PreTrainedTokenizerFast:
    steps = json.loads(tokenizer.backend_tokenizer.to_str())
    change(steps)
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(steps)), **names)


def test_each_kind_of_token_is_told_apart():
    tokenizer = build_demo_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    converted = convert(tokenizer, more_rows=2)
    assert (converted.model, converted.pattern, converted.scores) == ("gpt2", "llama-bpe", [])
    assert converted.tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert converted.kinds[:4] == [CONTROL, CONTROL, CONTROL, 1]
    assert converted.tokens[-3:] == ["<think>", "[UNUSED_ROW_607]", "[UNUSED_ROW_608]"]
    assert converted.kinds[-3:] == [4, UNUSED, UNUSED]
    assert not converted.adds_bos and not converted.adds_eos and not converted.leading_space


@published
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tokenizers/qwen3", ("gpt2", "qwen2", False, False)),
        ("tokenizers/smollm", ("gpt2", "smollm", False, False)),
        ("tokenizers/mistral-7b", ("llama", "default", False, True)),
        ("weights/stories260K_hf", ("llama", "default", True, True)),
    ],
)
def test_published_tokenizers_are_recognized(name, expected):
    converted = convert(load_tokenizer(str(DATA / name)))
    assert (converted.model, converted.pattern, converted.leading_space, converted.adds_bos) == expected
    if converted.model == "llama":
        assert converted.kinds[:4] == [2, CONTROL, CONTROL, BYTE]
        # The first merge has the highest score, and each token one of its own.
        merged = [score for score in converted.scores if score]
        assert max(merged) == -1 and len(set(merged)) == len(merged)


@published
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("happy-llm_tokenizer_k", "it changes texts first (NFKC), which llama.cpp does not"),
        ("llama2", "it looks for its special tokens behind the leading space (normalized)"),
        ("phi-3-mini", "takes spaces beside it, which GGUF has no key for"),
    ],
)
def test_published_tokenizers_that_llama_cpp_cannot_be_are_refused(name, reason):
    with pytest.raises(ConfigError) as error:
        convert(load_tokenizer(str(DATA / "tokenizers" / name)))
    (sentence,) = error.value.problems
    assert sentence.startswith("model: the tokenizer of ") and reason in sentence


def drop_a_byte(steps: dict[str, Any]) -> None:
    del steps["model"]["vocab"]["Ā"]
    steps["model"]["unk_token"] = "<s>"


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another pattern": (
        lambda steps: steps["pre_tokenizer"].update(use_regex=False),
        "it splits texts by ByteLevel False, and llama.cpp's names for that are not known",
    ),
    "a space first": (
        lambda steps: steps["pre_tokenizer"].update(add_prefix_space=True),
        "it splits texts by ByteLevel",
    ),
    "whole words first": (
        lambda steps: steps["model"].update(ignore_merges=True),
        "it splits texts by ByteLevel True, and takes whole words first (ignore_merges)",
    ),
    "lower case": (lambda steps: steps.update(normalizer={"type": "Lowercase"}), "it changes texts first (Lowercase)"),
    "dropout": (lambda steps: steps["model"].update(dropout=0.1), "only BPE without dropout"),
    "a missing byte": (drop_a_byte, "1 of the 256 bytes are not in its vocabulary"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_byte_level_tokenizer_that_llama_cpp_does_not_know_is_refused(case):
    tokenizer = byte_level([])
    assert convert(tokenizer).pattern == "gpt-2"
    change, reason = REFUSED[case]
    with pytest.raises(ConfigError) as error:
        convert(changed(tokenizer, change))
    assert reason in str(error.value)


def test_other_tokenizers_are_refused():
    with pytest.raises(ConfigError, match="its model is WordLevel, and only BPE"):
        convert(character_tokenizer())
    # SentencePiece joins any two neighbours that make a token.
    tokenizer = sentence_piece_like([])
    assert convert(tokenizer).model == "llama"
    with pytest.raises(ConfigError, match=r"its merges lack '.+' with '.+', which llama.cpp would join"):
        convert(changed(tokenizer, lambda steps: steps["model"]["merges"].pop()))
    with pytest.raises(ConfigError, match="it has ids up to 605, but the embedding has 600 rows"):
        convert_tokenizer(build_demo_tokenizer(), 600, True)


def test_stop_tokens_go_to_the_keys_that_gguf_has():
    tokenizer = build_demo_tokenizer()  # its own end token has id 2
    assert order_stops(tokenizer, [2]) == [2, 2]
    assert order_stops(tokenizer, [0, 2]) == [2, 0]
    assert order_stops(tokenizer, [0]) == [2, 0]
    assert order_stops(tokenizer, [0, 1, 2]) == [2, 0, 1]
    with pytest.raises(ConfigError, match="ends its answers at 4 tokens"):
        order_stops(tokenizer, [0, 1, 2, 300])


@pytest.fixture
def written(tmp_path) -> Callable[..., tuple[Any, ServedWords]]:
    """Write a tiny model with a tokenizer; return it as llama.cpp loads it, and what turns messages into tokens."""
    need_serving_packages()

    def write(tokenizer: PreTrainedTokenizerFast, template: str | None = CHATML) -> tuple[Any, ServedWords]:
        rows = max(tokenizer.get_vocab().values()) + 3
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        tiny_model("llama", vocab_size=rows, pad_token_id=None, **ids).save_pretrained(tmp_path / "model")
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        words = read_words(tmp_path / "model")
        write_gguf(tmp_path / "model", tmp_path / "model.gguf", words)
        return load_served(tmp_path / "model.gguf", vocabulary_only=True), words

    return write


def test_the_demo_has_the_same_ids_in_llama_cpp(written):
    served, words = written(build_demo_tokenizer())
    texts, tokens = compare_ids(served, words)
    assert texts >= 11 and tokens > 1000
    assert check_stops(served, words) == ["<|im_end|>"]
    # A negative control: GPT-2's way to split texts gives blue a token of its own behind a dash.
    text = "red-blue"
    steps = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    gpt2 = changed(words.tokenizer, lambda whole: whole.update(pre_tokenizer=steps))
    assert served.tokenize(text.encode(), add_bos=False, special=True) == words.tokenizer(text).input_ids
    assert gpt2(text).input_ids != words.tokenizer(text).input_ids


@published
@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("weights/stories260K_hf", CHATML.replace("<|im_end|>", "</s>").replace("<|im_start|>", "<s>")),
        pytest.param("tokenizers/mistral-7b", LLAMA2_CHAT, marks=pytest.mark.long),
        pytest.param("tokenizers/smollm", CHATML, marks=pytest.mark.long),
        pytest.param("tokenizers/qwen3", None, marks=pytest.mark.long),
    ],
)
def test_published_tokenizers_have_the_same_ids_in_llama_cpp(written, name, template):
    tokenizer = load_tokenizer(str(DATA / name))
    served, words = written(tokenizer, template or str(tokenizer.chat_template))
    special = read_as_special(served, words)
    assert special == (["</s>"] if "qwen3" in name else [])
    tokens = compare_ids(served, words, special)[1]
    assert tokens >= 0.9 * len(words.tokenizer.get_vocab())
    assert check_stops(served, words)


def test_a_tokenizer_without_template_has_the_same_ids(written):
    served, words = written(byte_level([]), None)
    assert words.template is None and compare_ids(served, words)[0] >= 9


def test_another_template_is_noticed(written, tmp_path):
    served, words = written(build_demo_tokenizer())
    words.tokenizer.chat_template = CHATML.replace("message['content']", "message['content'] | trim")
    words.tokenizer.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "generation_config.json").write_text('{"eos_token_id": 2}', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^verify: the chat template in the file writes "):
        compare_ids(served, read_words(tmp_path / "other"))


def test_a_token_that_ends_no_answer_in_llama_cpp_is_noticed(written):
    served, words = written(build_demo_tokenizer())
    with pytest.raises(ConfigError, match=r"^verify: llama.cpp would not end an answer at ĠAdd; nothing was kept\.$"):
        check_stops(served, words._replace(stop_ids=[2, words.tokenizer.convert_tokens_to_ids("ĠAdd")]))
