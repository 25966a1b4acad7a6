"""The bytes behind labels: they add up to those of the text however it is cut, for real tokenizers and real texts."""

import json
import math
from typing import Any

import pytest
import torch
from support import ROOT, character_tokenizer, make_rows
from transformers import LlamaForCausalLM

from accel_llm.config.options import TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.model.token_bytes import bits_per_byte, label_bytes, token_bytes
from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.training.evaluation import _text_sizes

SHARED = ROOT.parent / "shared" / "data"
EXACT = ["tokenizers/llama2", "tokenizers/mistral-7b", "tokenizers/phi-3-mini", "tokenizers/smollm"]
EXACT += ["tokenizers/qwen3", "weights/stories260K_hf"]
pytestmark = pytest.mark.filterwarnings("ignore:.*sequence length is longer than:UserWarning")


def real_texts() -> list[str]:
    rows = json.loads((SHARED / "instruct" / "alpaca_zh_demo.json").read_text(encoding="utf-8"))[:40]
    chinese = [row["output"] for row in rows if row["output"]]
    stories = (SHARED / "pretrain" / "tinystories.txt").read_text(encoding="utf-8").split("\n\n")[:20]
    return [*chinese, *stories, "\U0001f469\u200d\U0001f52c caf\u00e9\t\u00a0x"]


def pieces(ids: list[int], size: int, first: int) -> list[tuple[int, list[int], list[int]]]:
    """Cut ids into rows of `size` tokens, the first of `first` tokens; the first token of each is no label."""
    starts = [0, *range(first, len(ids), size)]
    parts = [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]
    return [(1, part, [-100, *part[1:]]) for part in parts if part]


@pytest.mark.parametrize("name", EXACT)
def test_bytes_add_up_to_those_of_the_text_wherever_it_is_cut(name):
    if not (SHARED / name).is_dir():
        pytest.skip("no ../shared")
    tokenizer = load_tokenizer(str(SHARED / name))
    known = token_bytes(tokenizer)
    assert known is not None
    for text in real_texts():
        ids = tokenizer(f"Once {text}")["input_ids"]
        begins = ids[0] == tokenizer.bos_token_id
        assert begins or tokenizer.decode(ids[:1]).strip() == "Once"
        # With pieces of two tokens, every second token is a label; after another first cut, the others are.
        counted = sum(int(label_bytes(make_rows(pieces(ids, 2, first)), known).sum()) for first in (1, 2))
        assert counted == len(f"Once {text}".encode()) - (0 if begins else len("Once"))
        # Cut anywhere else, the first token of each piece is missing, and nothing besides.
        for size in (3, 5, 64):
            rows = pieces(ids, size, size)
            missing = sum(int(known.of_token[part[0]]) for _, part, _ in rows[1:])
            assert int(label_bytes(make_rows(rows), known).sum()) == counted - missing


def test_tokenizers_that_change_a_text_are_not_trusted():
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    # Lower case and lost spaces; NFKC, which writes other characters of other lengths.
    for name in ("bert-base-uncased", "happy-llm_tokenizer_k"):
        tokenizer = load_tokenizer(str(SHARED / "tokenizers" / name))
        assert token_bytes(tokenizer) is None
        options = PretrainOptions(config_name="x")
        assert _text_sizes(tokenizer, make_rows([(1, [5, 6, 7], [-100, 6, 7])]), options) == {}


def test_bits_per_byte_do_not_depend_on_the_tokenizer():
    # Even odds for each byte, as 12 tokens of one byte or 6 tokens of two: perplexities differ, bits per byte do not.
    assert bits_per_byte(math.log(256), 12, 12) == pytest.approx(8)
    assert bits_per_byte(math.log(65536), 6, 12) == pytest.approx(8)
    assert math.isnan(bits_per_byte(1.0, 3, 0))


def test_only_plain_text_has_bits_per_byte(tiny):
    tokenizer = load_tokenizer(str(tiny))
    ids = tokenizer("Na\u00efve \u4f60\u597d")["input_ids"]
    rows = make_rows([(1, [*ids, tokenizer.eos_token_id], [-100, *ids[1:], tokenizer.eos_token_id])])
    known = token_bytes(tokenizer)
    expected = len("Na\u00efve \u4f60\u597d".encode()) - int(known.of_token[ids[0]])
    assert _text_sizes(tokenizer, rows, PretrainOptions(config_name="x")) == {"": (len(ids), expected)}
    assert _text_sizes(tokenizer, rows, TrainOptions()) == {}
    assert _text_sizes(tokenizer, None, PretrainOptions(config_name="x")) == {}
    assert token_bytes(character_tokenizer()) is None  # its decoder is of no kind whose bytes are known


def test_bits_per_byte_of_a_real_model_are_those_of_plain_transformers(script, tmp_path):
    folder = SHARED / "weights" / "stories260K_hf"
    if not folder.is_dir():
        pytest.skip("no ../shared")
    text = (SHARED / "pretrain" / "tinystories.txt").read_text(encoding="utf-8")[:9000]
    documents = [part for part in text.split("\n\n") if part]
    parts = {"first": documents[::3], "second": [part for k, part in enumerate(documents) if k % 3]}
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": part}) + "\n" for part in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    files = [tmp_path / f"{name}.jsonl" for name in parts]
    words = ("--model_name_or_path", folder, "--train_files", *files, "--eval_files", *files, "--max_length", 64)
    script("pretrain", *words, "--max_lost", 1, "--max_steps", 1, "--eval_on_start", "--output_dir", tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text("utf-8").splitlines()]
    (found,) = [line for line in lines if line["step"] == 0 and "eval/loss" in line]

    tokenizer = load_tokenizer(str(folder))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    nats, sizes = zip(*(nats_and_bytes(tokenizer, model, texts) for texts in parts.values()), strict=True)
    assert found["eval/bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-6)
    for name, of_part, size in zip(parts, nats, sizes, strict=True):
        assert found[f"eval/bits_per_byte/{name}.jsonl"] == pytest.approx(of_part / math.log(2) / size, rel=1e-6)


def nats_and_bytes(tokenizer: Any, model: Any, documents: list[str]) -> tuple[float, int]:
    """By plain transformers in float64: the nats of all predicted tokens of rows of 64, and the bytes of their text."""
    nats, bytes_of_text = 0.0, 0
    for document in documents:
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
        bytes_of_text += len(document.encode())
        for start in range(0, len(ids), 64):
            part = torch.tensor([ids[start : start + 64]])
            with torch.no_grad():
                logits = model(part).logits[0, :-1]
            nats += float(torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum"))
            # What stands at the cut is not predicted: the first token of each later piece.
            bytes_of_text -= 0 if start == 0 else len(token_text(tokenizer, int(part[0, 0])))
    return nats, bytes_of_text


def token_text(tokenizer: Any, number: int) -> bytes:
    token = tokenizer.convert_ids_to_tokens(number)
    return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("\u2581", " ").encode()
