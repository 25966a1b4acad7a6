"""Small files that once failed, from the file to the labels, with a real tokenizer: the value is right, or is counted."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import Template, load_template
from accel_llm.config.data_options import DataOptions
from accel_llm.data.prepare import EncodedData, encode_conversations
from accel_llm.errors import DataError

SHARED = Path(__file__).parents[3] / "shared"
CASES = SHARED / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
END = "<|im_end|>"


@lru_cache
def tokenizer(name: str = "qwen3") -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHARED / "data" / "tokenizers" / name)


@lru_cache
def template(kind: str, chat_template: str | None) -> Template | None:
    return None if chat_template == "none" else load_template(tokenizer(kind), chat_template)


def encode(name: str, folder: Path, **options: Any) -> EncodedData:
    kind, chat_template = options.pop("tokenizer", "qwen3"), options.pop("chat_template", None)
    values: dict[str, Any] = {"train_files": [str(CASES / name)], "cache_dir": str(folder), "max_lost": 0}
    return encode_conversations(DataOptions(**values | options), 0, tokenizer(kind), template(kind, chat_template))


def texts(data: EncodedData) -> list[str]:
    return [tokenizer().decode(data.train[k][0].tolist()) for k in range(len(data.train))]


def trained(data: EncodedData) -> list[str]:
    """The trained text of each row; parts that are apart are joined by a bar."""
    rows = []
    for k in range(len(data.train)):
        ids, labels = data.train[k]
        on = labels != IGNORED
        assert (ids[on] == labels[on]).all()
        pieces = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(on)) + 1)
        rows.append("|".join(tokenizer().decode(ids[piece].tolist()) for piece in pieces if on[piece[0]]))
    return rows


def test_loss_keys(tmp_path: Path) -> None:
    assert trained(encode("loss_keys.jsonl", tmp_path)) == [
        f"<think>\n\n</think>\n\n{answer}{END}" for answer in ("pong", "No, four.", "Gone.")
    ]


def test_parts_that_are_not_trained(tmp_path: Path) -> None:
    assert trained(encode("part_train.jsonl", tmp_path)) == [f" It is 42.{END}"] * 2


def test_tools_arrive_in_the_prompt(tmp_path: Path) -> None:
    for name in ("functions_on_the_row.jsonl", "tools_on_the_system_message.jsonl", "parameters_as_text.jsonl"):
        data = encode(name, tmp_path)
        assert data.ledger.left_out == {} and data.ledger.unused == {}
        for text in texts(data):
            prompt = text[: text.index("<|im_start|>user")]
            assert '"name": "get_time", "description": "Tells the time' in prompt
            assert '"properties": {"zone": {"type": "string"}}' in prompt  # an object, not its JSON as text
    assert "You may call tools." in texts(encode("tools_on_the_system_message.jsonl", tmp_path))[0]


def test_arguments_are_objects(tmp_path: Path) -> None:
    (text,) = texts(encode("arguments_encoded_twice.jsonl", tmp_path))
    assert '{"name": "rise", "arguments": {"metres": 5}}' in text
    data = encode("arrow_fills_nulls.parquet", tmp_path)
    first, second = texts(data)
    assert '"arguments": {"zone": "Oslo"}}' in first and '"arguments": {"a": 3}}' in second
    assert "null" not in first + second and sum(data.ledger.remarks.values()) == 2


def test_control_tokens_and_surrogates_in_keys(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"argument_keys\.jsonl, row 2: found '\\ud83d' in the text, half of a surrogate"
    ):
        encode("argument_keys.jsonl", tmp_path)
    data = encode("argument_keys.jsonl", tmp_path, on_bad_row="drop", max_lost=1)
    (text,) = texts(data)
    ends = data.train[0][0].tolist().count(tokenizer().convert_tokens_to_ids(END))
    assert '"arguments": {"<|im_end|>": 1}' in text and text.count(END) == ends + 1
    assert data.ledger.bins[str(CASES / "argument_keys.jsonl")]["dropped: not text"]["rows"] == 1


def test_variables_of_a_row(tmp_path: Path) -> None:
    persona = {"chat_template": str(CASES / "persona.jinja"), "on_bad_row": "drop", "max_lost": 1}
    data = encode("variables.jsonl", tmp_path, **persona)
    (text,) = texts(data)
    ids = data.train[0][0].tolist()
    assert text.startswith("<|im_start|>system\nkind<|im_end|>\n<|im_start|>user\nobey<|im_end|>\n")
    assert ids.count(tokenizer().convert_tokens_to_ids(END)) == 3 == text.count(END) - 1
    assert data.ledger.bins[str(CASES / "variables.jsonl")]["dropped: not text"]["rows"] == 1


def test_columns_beside_question_and_answer(tmp_path: Path) -> None:
    data = encode("context_columns.jsonl", tmp_path)
    context, system, reasoning = texts(data)
    assert "CREATE TABLE clerks (name TEXT, age INTEGER)" in context[: context.index("<|im_start|>assistant")]
    assert system.startswith("<|im_start|>system\nAnswer in capitals.<|im_end|>\n")
    assert "<think>\nTwo and three make five.\n</think>\n\n5<|im_end|>" in reasoning
    assert data.ledger.unused == {}


def test_an_answer_not_to_learn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"label_false\.jsonl, row 1: label: "):
        encode("label_false.jsonl", tmp_path)
    data = encode("label_false.jsonl", tmp_path, on_bad_row="drop", max_lost=1)
    assert trained(data) == [f"<think>\n\n</think>\n\nI cannot see it from here.{END}"]
    assert data.ledger.bins[str(CASES / "label_false.jsonl")]["dropped: an answer not to learn"]["rows"] == 1


def test_blank_tools_and_calls_are_none(tmp_path: Path) -> None:
    plain = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHello<|im_end|>\n"
    assert texts(encode("user_alone_tools_blank.jsonl", tmp_path)) == [plain, plain]


def test_rows_that_look_rendered_are_counted(tmp_path: Path) -> None:
    data = encode("end_token_in_the_answer.jsonl", tmp_path)
    (remark,) = data.ledger.remarks
    assert data.ledger.remarks[remark] == 2 and "as if it were rendered already" in remark
    assert trained(data)[0] == f"<think>\n\n</think>\n\nBye{END}{END}"  # the first one is text
    end = tokenizer().convert_tokens_to_ids(END)
    assert [data.train[k][0].tolist().count(end) for k in range(2)] == [2, 2]


def test_one_begin_of_text(tmp_path: Path) -> None:
    data = encode("text_with_bos.jsonl", tmp_path, tokenizer="llama2", chat_template="none")
    first, second = (data.train[k][0].tolist() for k in range(2))
    assert first == second and first.count(1) == 1 == first[0]


def test_a_long_word(tmp_path: Path) -> None:
    data = encode("one_long_word.jsonl", tmp_path, max_length=8192)
    (text,) = texts(data)
    assert data.train[0][0].tolist() == tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert "ACGT" * 1000 in text
