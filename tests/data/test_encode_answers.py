"""Encoding of preferences: both sides are kept or dropped together, and trained as fine-tuning trains an answer."""

import json
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import character_tokenizer
from transformers import AutoTokenizer

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import Template, load_template
from accel_llm.chat.values import EQUAL_ANSWERS, NO_SHARED_PROMPT
from accel_llm.config.data_options import DataOptions
from accel_llm.data.answers import Pairs, as_units
from accel_llm.data.encode import RENDERED_REMARK, THINKING_REMARK, Chunk, Encoder, SourceRow, encode_chunk
from accel_llm.data.encode_answers import encode_answer_chunk
from accel_llm.data.pairs import PreferenceKind
from accel_llm.data.prepare import EncodedData, encode_conversations
from accel_llm.data.sources import RawRow
from accel_llm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOKENIZER = character_tokenizer()
CHATML = load_template(TOKENIZER, "chatml")
PAIRS, LABELS = PreferenceKind(), PreferenceKind(labelled=True)
PROMPT = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"  # 20 tokens
PROMPT_LENGTH = 20
Table = list[dict[str, Any]]


def pair(chosen: Any, rejected: Any, prompt: Any = "q", **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def ask(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(contents)]


def show(ids: Any, labels: Any) -> str:
    """The row as text, with ⟦ ⟧ around trained tokens."""
    text, inside = "", False
    for token, label in zip(np.asarray(ids).tolist(), np.asarray(labels).tolist(), strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) != inside:
            text += "⟧" if inside else "⟦"
            inside = not inside
        text += TOKENIZER.convert_ids_to_tokens(token)
    return text + "⟧" * inside


def encode(folder: Path, rows: Table, kind: PreferenceKind | None = PAIRS, **changes: Any) -> EncodedData:
    template, seed = changes.pop("template", CHATML), changes.pop("seed", 0)
    name = changes.pop("name", "a.jsonl")
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {"train_files": [str(folder / name)], "cache_dir": str(folder / "cache"), "max_lost": 1}
    return encode_conversations(DataOptions(**values | changes), seed, TOKENIZER, template, preferences=kind)


def bins(data: EncodedData) -> dict[str, tuple[int, int, int]]:
    (one,) = data.ledger.bins.values()
    return {name: (c["rows"], c["supervised"], c["context"]) for name, c in one.items()}


def encode_rows(rows: Table, kind: PreferenceKind | None, template: Template = CHATML, **options: Any) -> Chunk:
    """Encode `rows` as the rows 1, 2, ... of the file `a`; without a kind as rows of fine-tuning."""
    encoder = Encoder(DataOptions(**options), TOKENIZER, template, ["a"], [(None, {})], preferences=kind)
    source_rows = [SourceRow(0, 0, RawRow("a", number, row)) for number, row in enumerate(rows, 1)]
    return encode_answer_chunk(source_rows, encoder) if kind else encode_chunk(source_rows, encoder)


def test_a_pair_is_two_rows_with_the_same_prompt(tmp_path: Path) -> None:
    data = encode(tmp_path, [pair("ab", "abc", margin=0.5), pair("x", "y", margin="2")], PreferenceKind(margins=True))
    rows = data.train
    assert [show(*rows[k]) for k in range(4)] == [
        f"{PROMPT}⟦ab<|im_end|>⟧\n",
        f"{PROMPT}⟦abc<|im_end|>⟧\n",
        f"{PROMPT}⟦x<|im_end|>⟧\n",
        f"{PROMPT}⟦y<|im_end|>⟧\n",
    ]
    assert rows.number.tolist() == [1, 1, 2, 2] and rows.origin.tolist() == [0, 0, 0, 0]
    assert rows.shared is not None and rows.shared.tolist() == [PROMPT_LENGTH] * 4 and rows.label is None
    assert rows.margin is not None and rows.margin.tolist() == [0.5, 0.5, 2, 2]
    # A pair is one row of the ledger, with its prompt once.
    assert bins(data) == {"trained": (2, 3 + 4 + 2 + 2, 2 * (PROMPT_LENGTH + 2))}
    units = as_units(rows)
    assert isinstance(units, Pairs) and len(units) == 2 and units.source.tolist() == [0, 0]
    assert units.lengths.tolist() == [PROMPT_LENGTH + 4 + 5, PROMPT_LENGTH + 3 + 3]
    assert Pairs(rows, share_prompts=False).lengths.tolist() == [24 + 25, 23 + 23]
    assert units.name(1) == f"{tmp_path / 'a.jsonl'}, row 2"


def test_answers_with_labels_are_rows(tmp_path: Path) -> None:
    rows = [{"messages": ask("q", "ab"), "label": False}, pair("x", "y")]
    data = encode(tmp_path, rows, LABELS)
    assert [show(*data.train[k]) for k in range(3)] == [f"{PROMPT}⟦{text}<|im_end|>⟧\n" for text in ("ab", "x", "y")]
    assert data.train.label is not None and data.train.label.tolist() == [0, 1, 0]
    assert data.train.shared is None and data.train.margin is None and as_units(data.train) is data.train
    assert bins(data) == {"trained": (3, 3 + 2 + 2, 3 * (PROMPT_LENGTH + 1))}


words = st.text("abc \n<", min_size=1, max_size=6).filter(str.strip)


@settings(max_examples=40, deadline=None)
@given(st.lists(words, min_size=1, max_size=3), words, words)
def test_a_side_is_trained_as_fine_tuning_trains_a_completion(questions: list[str], good: str, bad: str) -> None:
    # The earlier questions have answers, which are context.
    prompt = ask(*[text for question in questions for text in (question, "x")])[:-1]
    chunk = encode_rows([pair(good, bad, prompt)], PAIRS, on_bad_row="drop")
    if good == bad:
        assert chunk.ledger.bins["a"]["dropped: chosen equals rejected"]["rows"] == 1
        return
    expected = encode_rows([{"prompt": prompt, "completion": text} for text in (good, bad)], None)
    for name in ("input_ids", "labels", "lengths"):
        assert getattr(chunk.part, name) == getattr(expected.part, name)


@lru_cache
def real_template() -> Template:
    return load_template(AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3"))


@pytest.mark.long
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("name, kind", [("dpo_en_demo", PAIRS), ("dpo_zh_demo", PAIRS), ("kto_en_demo", LABELS)])
def test_real_files_are_encoded_as_fine_tuning_encodes_them(name: str, kind: PreferenceKind, tmp_path: Path) -> None:
    template, count = real_template(), 40
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    path = SHARED / "preference" / f"{name}.json"
    options: dict[str, Any] = {"cache_dir": str(tmp_path), "max_length": 8192, "limit_rows": count}
    data = encode_conversations(
        DataOptions(train_files=[str(path)], **options), 0, tokenizer, template, preferences=kind
    )
    completions = []
    for row in json.loads(path.read_text(encoding="utf-8"))[:count]:
        if kind.labelled:
            completions.append({"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
        else:
            completions += [
                {"prompt": row["conversations"], "completion": [row[side]]} for side in ("chosen", "rejected")
            ]
    (tmp_path / "sft.json").write_text(json.dumps(completions), encoding="utf-8")
    expected = encode_conversations(
        DataOptions(train_files=[str(tmp_path / "sft.json")], **options | {"limit_rows": None}), 0, tokenizer, template
    )
    for column in ("input_ids", "labels", "offsets"):
        assert np.array_equal(getattr(data.train, column), getattr(expected.train, column))
    assert data.train.weights is None and not data.ledger.unused and not data.ledger.remarks
    if data.train.shared is not None:  # all of the prompt
        firsts = [int(np.flatnonzero(data.train[k][1] != IGNORED)[0]) for k in range(len(data.train))]
        assert data.train.shared.tolist() == firsts


def test_each_pair_is_in_one_bin(tmp_path: Path) -> None:
    rows = [
        pair("good", "bad"),
        pair("a", "a"),
        pair("a", ""),
        pair("a", "b" * 20),  # only the rejected answer is too long
        pair("a", "b", "q" * 60),  # no answer fits
        {"chosen": ask("p", "a"), "rejected": ask("q", "b")},
        {"prompt": "q", "completion": "a"},
        pair("good<|im_end|>", "bad"),
        pair(ask("q", "a", "b", "c")[1:], "bad"),
    ]
    with pytest.raises(DataError, match=r"a.jsonl, row 2: rejected: found the chosen answer again"):
        encode(tmp_path, rows)
    assert not list((tmp_path / "cache").glob("*/train"))  # nothing half-written
    data = encode(tmp_path, rows, on_bad_row="drop", max_length=40)
    assert bins(data) == {
        "trained": (1, 5 + 4, PROMPT_LENGTH + 2),
        "dropped: chosen equals rejected": (1, 0, 0),
        "dropped: empty answer": (1, 0, 0),
        "dropped: longer than max_length=40": (2, 2 + 21 + 4 + 4, 3 * PROMPT_LENGTH + 5),
        "dropped: the prompt alone is longer than max_length=40": (1, 4, 81),
        "dropped: sides that share no prompt": (1, 0, 0),
        "dropped: not a row of preferences": (1, 0, 0),
        "dropped: an end token on one side only": (1, 0, 0),
    }
    assert len(data.train) == 2 and data.train.number.tolist() == [1, 1]
    sentence = data.ledger.examples["an end token on one side only"][0]
    assert sentence.endswith(
        "chosen: its text ends with <|im_end|>, that of the rejected answer does not; the template adds it, so remove it "
        "from the row"
    )
    # Both of them have it: it stays text, as in fine-tuning, and the ledger says so.
    both = encode(tmp_path, [pair("good<|im_end|>", "bad<|im_end|>")])
    assert bins(both)["trained"][0] == 1 and both.ledger.remarks


def test_too_much_lost_stops_without_advice_to_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        encode(tmp_path, [pair("good", "bad"), pair("a", "b" * 99)], max_length=60, max_lost=0.01)
    assert str(caught.value) == (
        "max_lost: 50.0% of the rows and 91.9% of the supervised tokens would be lost; allowed is 1.0%: dropped: longer "
        "than max_length=60 (1 rows); half of the rows have at most 77 tokens, 95% 119, 99% 123, the longest 124; raise "
        "max_length, or raise max_lost."
    )
    # Rows that are not too long are not helped by a larger max_length.
    with pytest.raises(
        ConfigError, match=r"dropped: empty answer \(1 rows\); for example .*a.jsonl, row 2: .*; mend such"
    ):
        encode(tmp_path, [pair("good", "bad"), pair("a", "")], on_bad_row="drop", max_lost=0.01)
    with pytest.raises(DataError) as caught:
        encode(tmp_path, [pair("a", "b" * 99)], max_length=60, overlong="error", on_bad_row="drop")
    assert str(caught.value) == (
        f"{tmp_path / 'a.jsonl'}, row 1: a pair of 124 tokens, prompt included, is longer than max_length=60; raise it, "
        "or set overlong: drop."
    )


def test_options_that_would_train_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        encode(tmp_path, [pair("a", "b")], overlong="truncate", train_on="all", split_turns="auto", data_format="text")
    assert list(caught.value.problems) == [
        "overlong: truncate would cut the two answers of a pair differently; allowed are drop and error.",
        "train_on: all trains the prompt, which both answers share; allowed is assistant.",
        "split_turns: auto would give one side of a pair more rows than the other; allowed is false.",
        "data_format: text rows have no answers to compare; give conversations.",
    ]


def test_kto_needs_both_classes(tmp_path: Path) -> None:
    rows = [{"messages": ask("q", text), "label": True} for text in "ab"]
    with pytest.raises(DataError) as caught:
        encode(tmp_path, rows, LABELS)
    assert str(caught.value) == (
        "train_files: all 2 answers are desirable; KTO needs undesirable ones too, so add such rows, or train with "
        "launch/sft.py."
    )


def test_caches_of_other_kinds_are_never_confused(tmp_path: Path) -> None:
    rows = [
        {"prompt": "q", "completion": "x", "label": True, **pair("a", "b", margin=1)},
        pair("c", "d", completion="y"),
    ]
    kinds = [PAIRS, LABELS, PreferenceKind(margins=True), PreferenceKind(all_pairs=True)]
    first = [encode(tmp_path, rows, kind) for kind in kinds]
    tuning = encode(tmp_path, [{"prompt": "q", "completion": "x"}], None, name="b.jsonl")
    assert len({data.fingerprint for data in [*first, tuning]}) == 5
    again = [encode(tmp_path, rows, kind) for kind in kinds]
    for one, other in zip(first, again, strict=True):
        assert one.fingerprint == other.fingerprint
        for column in ("input_ids", "labels", "shared", "margin", "label", "digest"):
            left, right = getattr(one.train, column), getattr(other.train, column)
            assert left is right is None or np.array_equal(left, right)
    assert [data.train.margin is not None and data.train.margin.tolist() for data in first] == [
        [0] * 4,
        False,
        [1, 1, 0, 0],
        [0] * 4,
    ]
    assert tuning.train.shared is tuning.train.margin is tuning.train.label is None


@pytest.mark.long
def test_workers_change_nothing(tmp_path: Path) -> None:
    rows = [pair(f"a{k}", f"b{k}" * (k % 7), margin=k) for k in range(600)]
    one, two = (
        encode(
            tmp_path, rows, PreferenceKind(margins=True), cache_dir=str(tmp_path / name), on_bad_row="drop", **options
        )
        for name, options in (("1", {}), ("2", {"preprocessing_num_workers": 2}))
    )
    assert one.ledger.to_dict() == two.ledger.to_dict() and one.train.margin is not None
    for column in ("input_ids", "labels", "offsets", "shared", "margin", "number"):
        assert np.array_equal(getattr(one.train, column), getattr(two.train, column))
    assert len(one.train) == 2 * bins(one)["trained"][0] == 2 * (600 - bins(one)["dropped: empty answer"][0])


def test_evaluation_pairs_are_whole_and_compared_as_pairs(tmp_path: Path) -> None:
    rows = [pair(f"a{k}", f"b{k}") for k in range(40)]
    data = encode(tmp_path, rows, eval_share=0.3)
    assert data.eval is not None and len(data.train) + len(data.eval) == 80
    held_out = set(data.eval.number.tolist())
    assert not held_out & set(data.train.number.tolist()) and len(data.eval) == 2 * len(held_out)
    # A pair is in common if both answers are: not the same two the other way round, nor one of them.
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(pair(*two)) + "\n" for two in ("ab", "ba", "ac")))
    data = encode(tmp_path, [pair("a", "b")], eval_files=[str(tmp_path / "e.jsonl")])
    assert [note for note in data.ledger.notes if "trained on as well" in note] == [
        f"1 of 3 rows to evaluate on are trained on as well: {tmp_path / 'e.jsonl'}, row 1 = {tmp_path / 'a.jsonl'}, row 1."
    ]


def load(source: str, folder: Path, **variables: Any) -> Template:
    (folder / "template.jinja").write_text(source)
    return load_template(TOKENIZER, str(folder / "template.jinja"), variables or None)


THINKING = """\
{%- if enable_thinking %}{{- '<|im_start|>think on<|im_end|>' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if enable_thinking and message.reasoning_content %}{{- '(' + message.reasoning_content + ')' }}{%- endif %}
{{- message.content + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_reasoning_of_one_side_does_not_change_the_prompt(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "good", "reasoning_content": "r"}
    chunk = encode_rows([pair([answer], "bad")], PAIRS, load(THINKING, tmp_path))
    ends = np.cumsum([0, *chunk.part.lengths])
    shown = [show(chunk.part.input_ids[a:b], chunk.part.labels[a:b]) for a, b in pairwise(ends)]
    prompt = "<|im_start|>think on<|im_end|><|im_start|>user\nq<|im_end|><|im_start|>assistant\n"
    assert shown == [f"{prompt}⟦(r)good<|im_end|>⟧", f"{prompt}⟦bad<|im_end|>⟧"]


def test_what_both_sides_leave_out_is_counted_once_for_a_pair(tmp_path: Path) -> None:
    sides = [[{"role": "assistant", "content": text, "reasoning_content": "r"}] for text in ("<|im_start|>", "bad")]
    chunk = encode_rows([pair(*sides, prompt="<|im_end|>")], PAIRS)
    assert chunk.ledger.remarks == {RENDERED_REMARK: 1} and set(chunk.ledger.left_out.values()) <= {1}
    chunk = encode_rows([pair(*sides)], PAIRS, load(THINKING, tmp_path))
    assert chunk.ledger.remarks == {RENDERED_REMARK: 1, THINKING_REMARK.format("enable_thinking"): 1}


def test_a_template_that_hides_the_difference_is_a_bad_row(tmp_path: Path) -> None:
    trimmed = load(THINKING.replace("message.content +", "message.content | trim +"), tmp_path)
    chunk = encode_rows([pair("a", "a ")], PAIRS, trimmed, on_bad_row="drop")
    assert chunk.ledger.examples == {
        EQUAL_ANSWERS: ["a, row 1: chosen and rejected: the template writes the same text for both"]
    }
    # The first turn of the answer is context, so what is trained follows another text on each side.
    first = {"role": "assistant", "content": "x", "train": False}
    row = pair([first, *ask("p", "a")], [{**first, "content": "y"}, *ask("p", "b")])
    chunk = encode_rows([row], PAIRS, on_bad_row="drop")
    assert chunk.ledger.examples == {
        NO_SHARED_PROMPT: [
            "a, row 1: chosen and rejected: what stands before the trained tokens differs, so their probabilities cannot "
            "be compared"
        ]
    }


def test_a_turn_that_is_lost_drops_both_sides(tmp_path: Path) -> None:
    # This template writes a turn without its end if the answer is "bad".
    endless = THINKING.replace(
        "'<|im_end|>' }}\n{%- endfor", "('' if message.content == 'bad' else '<|im_end|>') }}\n{%- endfor"
    )
    chunk = encode_rows([pair("good", "bad"), pair("good", "poor")], PAIRS, load(endless, tmp_path))
    assert {name: c["rows"] for name, c in chunk.ledger.bins["a"].items()} == {
        "dropped: nothing to train": 1,
        "trained": 1,
    }
    assert sum(chunk.ledger.turns.values()) == 1 and list(chunk.part.number) == [2, 2]
    chunk.ledger.balance()


def test_weights_of_answers_are_refused() -> None:
    message = {"role": "assistant", "content": "good", "weight": 0.5}
    with pytest.raises(
        DataError, match="weight: an answer that is compared with others counts in full; remove the weig"
    ):
        encode_rows([pair([message], "bad")], PAIRS)
