"""Encoding of rows: which tokens each policy keeps, and a ledger in which nothing is missing."""

import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import character_tokenizer
from tokenizers import processors

from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import Template, load_template
from accel_llm.config.data_options import DataOptions
from accel_llm.data import prepare
from accel_llm.data.encode import Chunk, Encoder, SourceRow, encode_chunk
from accel_llm.data.prepare import encode_conversations, encode_texts
from accel_llm.data.rows import Rows
from accel_llm.data.sources import RawRow
from accel_llm.errors import ConfigError, DataError

TOKENIZER = character_tokenizer()
CHATML = load_template(TOKENIZER, "chatml")
FIRST = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"  # 20 tokens
SECOND = "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"  # 21 tokens
TALK = [("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dddd")]


def conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def show(ids: list[int] | np.ndarray, labels: list[int] | np.ndarray) -> str:
    """The row as text, with ⟦ ⟧ around trained tokens. Fails if a label is not its token."""
    text, inside = "", False
    for token, label in zip(np.asarray(ids).tolist(), np.asarray(labels).tolist(), strict=True):
        assert label in (IGNORED, token)
        if (label != IGNORED) != inside:
            text += "⟧" if inside else "⟦"
            inside = not inside
        text += TOKENIZER.convert_ids_to_tokens(token)
    return text + ("⟧" if inside else "")


def encode_rows(rows: list[dict[str, Any]], options: DataOptions, template: Template | None = CHATML) -> Chunk:
    """Encode `rows` as the rows 1, 2, ... of the file `a`."""
    encoder = Encoder(options, TOKENIZER, template, ["a"], [(options.data_format, options.columns)])
    return encode_chunk([SourceRow(0, 0, RawRow("a", number, row)) for number, row in enumerate(rows, 1)], encoder)


def list_pieces(chunk: Chunk) -> list[tuple[int, list[int], list[int]]]:
    """(row number, ids, labels) of each encoded row."""
    ends = np.cumsum([0, *chunk.part.lengths]).tolist()
    ids, labels = chunk.part.input_ids.tolist(), chunk.part.labels.tolist()
    return [(number, ids[a:b], labels[a:b]) for number, a, b in zip(chunk.part.number, ends, ends[1:], strict=False)]


def show_all(rows: Rows) -> list[str]:
    return [show(*rows[k]) for k in range(len(rows))]


def encode(folder: Path, rows: list[dict[str, Any]], seed: int = 0, **changes: Any):
    values: dict[str, Any] = {
        "train_files": [write_rows(folder, rows)],
        "cache_dir": str(folder / "cache"),
        "max_lost": 1,
    }
    return encode_conversations(DataOptions(**values | changes), seed, TOKENIZER, CHATML)


def bins(ledger, file: str) -> dict[str, tuple[int, int, int]]:
    return {name: (c["rows"], c["supervised"], c["context"]) for name, c in ledger.bins[file].items()}


# The conversation is 50 tokens long, of which 3 + 5 are trained: 20 + 3 and 21 + 5, and the last newline.
WHOLE = f"{FIRST}⟦bb<|im_end|>⟧{SECOND}⟦dddd<|im_end|>⟧\n"
POLICIES = [
    ("drop", 50, [WHOLE], {"trained": (1, 8, 42)}),
    ("drop", 49, [], {"dropped: longer than max_length=49": (1, 8, 42)}),
    ("truncate", 50, [WHOLE], {"trained": (1, 8, 42)}),
    ("truncate", 49, [WHOLE[:-1]], {"trained": (1, 8, 41), "cut: longer than max_length=49": (0, 0, 1)}),
    (
        "truncate",
        48,
        [f"{FIRST}⟦bb<|im_end|>⟧"],
        {"trained": (1, 3, 20), "cut: longer than max_length=48": (0, 5, 22)},
    ),
    (
        "truncate",
        23,
        [f"{FIRST}⟦bb<|im_end|>⟧"],
        {"trained": (1, 3, 20), "cut: longer than max_length=23": (0, 5, 22)},
    ),
    ("truncate", 22, [], {"dropped: longer than max_length=22": (1, 8, 42)}),
    ("split", 50, [WHOLE], {"trained": (1, 8, 42)}),
    (  # the second piece begins with a trained token that no token predicts now
        "split",
        46,
        [f"{FIRST}⟦bb<|im_end|>⟧{SECOND}⟦dd⟧", "d⟦d<|im_end|>⟧\n"],
        {"trained": (1, 7, 42), "cut: longer than max_length=46": (0, 1, 0)},
    ),
    (  # a piece without a trained token is cut
        "split",
        15,
        [
            "tant\n⟦bb<|im_end|>⟧\n<|im_start|>user\n",
            "c<|im_end|>\n<|im_start|>assistant\n⟦d⟧",
            "d⟦dd<|im_end|>⟧\n",
        ],
        {"trained": (1, 7, 27), "cut: longer than max_length=15": (0, 1, 15)},
    ),
]


@pytest.mark.parametrize("policy, max_length, expected, counted", POLICIES)
def test_each_policy_keeps_exactly_what_it_says(policy, max_length, expected, counted):
    options = DataOptions(overlong=policy, max_length=max_length)
    chunk = encode_rows([conversation(TALK)], options)
    assert [show(ids, labels) for _, ids, labels in list_pieces(chunk)] == expected
    assert chunk.part.number.tolist() == [1] * len(expected)
    assert bins(chunk.ledger, "a") == counted and chunk.ledger.inputs["a"] == {
        "rows": 1, "supervised": 8, "context": 42,
    }  # fmt: skip
    assert chunk.lengths == {50: 1}
    chunk.ledger.balance()


def test_rows_of_a_file_come_back_in_order(tmp_path):
    talks = [conversation([("user", "a"), ("assistant", "b" * k)]) for k in (1, 40, 2)]
    data = encode(tmp_path, talks, max_length=30)
    assert show_all(data.train) == [f"{FIRST}⟦b<|im_end|>⟧\n", f"{FIRST}⟦bb<|im_end|>⟧\n"]
    assert data.train.number.tolist() == [1, 3] and data.eval is None
    assert bins(data.ledger, f"{tmp_path}/a.jsonl") == {
        "trained": (2, 5, 42), "dropped: longer than max_length=30": (1, 41, 21),
    }  # fmt: skip


def test_train_on_all_cannot_train_a_first_token(tmp_path):
    data = encode(tmp_path, [conversation(TALK)], train_on="all")
    first, rest = WHOLE.replace("⟦", "").replace("⟧", "").split("user", 1)
    assert show_all(data.train) == [f"{first}⟦user{rest}⟧"]
    assert bins(data.ledger, f"{tmp_path}/a.jsonl") == {"trained": (1, 49, 1)}


def test_error_names_file_and_row(tmp_path):
    rows = [conversation(TALK[:2]), conversation(TALK)]
    with pytest.raises(DataError) as error:
        encode(tmp_path, rows, overlong="error", max_length=49)
    assert str(error.value) == (
        f"{tmp_path}/a.jsonl, row 2: 50 tokens are longer than max_length=49; "
        "raise it, or set overlong: drop, truncate or split."
    )
    assert len(encode(tmp_path, rows, overlong="error", max_length=50).train) == 2


def silent_row() -> dict[str, Any]:
    row = conversation(TALK[:2])
    row["messages"][1]["train"] = False
    return row


def test_rows_without_anything_to_train_are_counted(tmp_path):
    data = encode(tmp_path, [silent_row(), conversation(TALK[:2])])
    assert show_all(data.train) == [f"{FIRST}⟦bb<|im_end|>⟧\n"]
    assert bins(data.ledger, f"{tmp_path}/a.jsonl") == {"trained": (1, 3, 21), "dropped: nothing to train": (1, 0, 0)}


BAD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("unknown role", conversation([("user", "a"), ("wizard", "b")])),
    ("empty answer", conversation([("user", "a"), ("assistant", " ")])),
    ("two user turns in a row", conversation([("user", "a"), ("user", "b"), ("assistant", "c")])),
    ("assistant first", conversation([("assistant", "a"), ("user", "b"), ("assistant", "c")])),
    ("missing value", {"instruction": "a", "output": None}),
    ("not text", {"instruction": "a", "output": 3.3}),
    ("unknown shape", {"a": 1}),
    ("images", {**conversation(TALK[:2]), "images": ["a.png"]}),
    ("not text", conversation([("user", "a"), ("assistant", "b\ud800")])),
    ("not text", {"text": "b\udfff"}),
    ("noncharacters", conversation([("user", "\ufdd0"), ("assistant", "b")])),
]


@pytest.mark.parametrize("reason, row", BAD_ROWS, ids=[f"{k} {reason}" for k, (reason, _) in enumerate(BAD_ROWS)])
def test_a_bad_row_stops_the_run_or_is_dropped_and_counted(tmp_path, reason, row):
    rows = [conversation(TALK[:2]), row, conversation(TALK[:2])]
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: .*; on_bad_row: drop leaves such rows out\.$") as error:
        encode(tmp_path, rows)
    data = encode(tmp_path, rows, on_bad_row="drop")
    assert data.train.number.tolist() == [1, 3]
    assert bins(data.ledger, f"{tmp_path}/a.jsonl") == {"trained": (2, 6, 42), f"dropped: {reason}": (1, 0, 0)}
    sentence = str(error.value).removesuffix("; on_bad_row: drop leaves such rows out.")
    assert data.ledger.examples == {reason: [sentence]}


def test_the_first_three_dropped_rows_are_kept_and_max_lost_applies(tmp_path):
    rows = [row for _, row in BAD_ROWS[:2]] * 5 + [conversation(TALK[:2])]
    data = encode(tmp_path, rows, on_bad_row="drop")
    shown_rows = {
        reason: [sentence.split(":")[0] for sentence in some] for reason, some in data.ledger.examples.items()
    }
    name = f"{tmp_path}/a.jsonl, row"
    assert shown_rows == {
        "unknown role": [f"{name} {k}" for k in (1, 3, 5)], "empty answer": [f"{name} {k}" for k in (2, 4, 6)],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"max_lost: 90\.9% of the rows.*dropped: unknown role \(5 rows\)"):
        encode(tmp_path, rows, on_bad_row="drop", max_lost=0.9)


def test_a_row_that_the_template_refuses_is_a_bad_row(tmp_path):
    jinja = tmp_path / "strict.jinja"
    jinja.write_text("{%- if messages | length > 2 %}{{ raise_exception('too long') }}{%- endif %}" + CHATML.source)
    template, rows = load_template(TOKENIZER, str(jinja)), [conversation(TALK[:2]), conversation(TALK)]
    options = {"train_files": [write_rows(tmp_path, rows)], "cache_dir": str(tmp_path / "cache"), "max_lost": 1}
    with pytest.raises(DataError, match=r"row 2: the chat template refuses this conversation: too long; on_bad_row"):
        encode_conversations(DataOptions(**options), 0, TOKENIZER, template)
    data = encode_conversations(DataOptions(**options, on_bad_row="drop"), 0, TOKENIZER, template)
    assert bins(data.ledger, f"{tmp_path}/a.jsonl")["dropped: refused by the chat template"] == (1, 0, 0)


def test_one_file_may_hold_documents_tokens_and_conversations(tmp_path):
    rows = [{"text": "abc"}, conversation(TALK[:2]), {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"text": "d"}]
    data = encode(tmp_path, rows)
    assert show_all(data.train)[:2] == ["a⟦bc</s>⟧", f"{FIRST}⟦bb<|im_end|>⟧\n"] and len(data.train) == 4
    assert data.train[2][0].tolist() == [5, 6, 7] and data.train[2][1].tolist() == [-100, -100, 7]
    assert data.train.number.tolist() == [1, 2, 3, 4]


def test_weights_of_messages_reach_the_rows(tmp_path):
    row = conversation(TALK)
    row["messages"][1]["weight"] = 0.5
    data = encode(tmp_path, [conversation(TALK[:2]), row])
    weights = data.train.label_weights([0, 1])
    assert weights is not None and set(weights[0].tolist()) == {1.0}
    labels = data.train[1][1]
    assert weights[1][labels != IGNORED].tolist() == [0.5] * 3 + [1.0] * 5


def test_a_source_has_its_own_shape_columns_and_limit(tmp_path):
    plain = write_rows(tmp_path, [conversation(TALK[:2])] * 3, "plain.jsonl")
    renamed = write_rows(tmp_path, [{"q": "a", "r": "bb"}] * 3, "renamed.jsonl")
    sources = [
        {"path": plain, "limit_rows": 2},
        {"path": renamed, "data_format": "query_response", "columns": {"query": "q", "response": "r"}},
    ]
    data = encode(tmp_path, [], train_files=sources)
    assert show_all(data.train) == [f"{FIRST}⟦bb<|im_end|>⟧\n"] * 5
    assert data.train.source.tolist() == [0, 0, 1, 1, 1] and data.train.number.tolist() == [1, 2, 1, 2, 3]
    assert list(data.ledger.inputs) == [plain, renamed]
    with pytest.raises(ConfigError, match=r"columns: qq=q, but 'qq' is not a field"):
        encode(tmp_path, [], train_files=[plain], columns={"qq": "q"})


@pytest.mark.parametrize("limit, total", [(None, 12), (4, 7)])
def test_the_bar_counts_to_the_rows_that_are_read(tmp_path, monkeypatch, limit, total):
    bars, evaluation = [], write_rows(tmp_path, numbered_rows(3), "eval.jsonl")
    update = prepare.Bar.update
    monkeypatch.setattr(prepare.Bar, "update", lambda bar, done: (bars.append((done, bar.total)), update(bar, done)))
    encode(tmp_path, numbered_rows(9), eval_files=[evaluation], limit_rows=limit)
    assert bars[-1] == (total, total)


def test_what_truncate_does_with_a_long_chat_is_noted(tmp_path):
    chats = [conversation(TALK), conversation([("user", "a" * 30), ("assistant", "b")])]
    data = encode(tmp_path, chats, overlong="truncate", max_length=30)
    (note,) = data.ledger.notes
    assert note.startswith(
        "overlong: truncate leaves of a longer chat its turns up to the last whole answer, and drops"
    )
    assert show_all(data.train) == [f"{FIRST}⟦bb<|im_end|>⟧"]  # the second one has no whole answer
    for overlong, length in (("truncate", 60), ("split", 46)):
        assert encode(tmp_path, chats[:1], overlong=overlong, max_length=length).ledger.notes == []


def test_sources_are_mixed_by_weight_and_the_shares_are_noted(tmp_path):
    few = write_rows(tmp_path, [conversation(TALK[:2])] * 2, "few.jsonl")
    many = write_rows(tmp_path, [conversation(TALK[:2])] * 9, "many.jsonl")
    sources = [{"path": few, "weight": 1}, {"path": many, "weight": 3}]
    data = encode(tmp_path, [], train_files=sources)
    assert len(data.train) == 11
    assert data.ledger.notes == [
        f"Mixed by weight: {few} gives 25.0% of the rows (it has 2 documents, 48 tokens); {many} gives 75.0% of the rows "
        "(it has 9 documents, 216 tokens)."
    ]
    by_length = encode(tmp_path, [], train_files=sources, order="length")
    assert by_length.ledger.notes == [
        f"Mixed by weight: an epoch is {few} 25.0% of the rows (3 drawn from 2) and 25.0% of the tokens; "
        f"{many} 75.0% of the rows (9 drawn from 9) and 75.0% of the tokens."
    ]
    again = encode(tmp_path, [], train_files=[few, many])
    assert again.fingerprint != data.fingerprint or again.ledger.notes == []
    bad = write_rows(tmp_path, [{"a": 1}], "bad.jsonl")
    with pytest.raises(DataError, match=r"bad\.jsonl has a weight of 1\.0, but no row to train on is left"):
        encode(tmp_path, [], train_files=[sources[0], {"path": bad, "weight": 1}], on_bad_row="drop")


def test_rows_in_both_training_and_evaluation_are_counted_and_named(tmp_path):
    evaluation = write_rows(tmp_path, [conversation(TALK[:2]), *numbered_rows(3)], "eval.jsonl")
    data = encode(tmp_path, [*numbered_rows(2), conversation(TALK)], eval_files=[evaluation])
    assert data.ledger.notes == [
        f"2 of 4 rows to evaluate on are trained on as well: {evaluation}, row 2 = {tmp_path}/a.jsonl, row 1; "
        f"{evaluation}, row 3 = {tmp_path}/a.jsonl, row 2."
    ]


def test_too_many_lost_rows_stop_the_run_with_reasons_and_a_remedy(tmp_path):
    rows = [conversation([("user", "a"), ("assistant", "b" * (length - 22))]) for length in (30, 40, 50, 80)]
    options = {"max_length": 50, "max_lost": 0.2}
    with pytest.raises(ConfigError) as error:
        encode(tmp_path, rows, **options)
    assert str(error.value) == (
        "max_lost: 25.0% of the rows and 50.9% of the supervised tokens would be lost; allowed is 20.0%: "
        "dropped: longer than max_length=50 (1 rows); half of the rows have at most 45 tokens, 95% 75, 99% 79, "
        "the longest 80; raise max_length, set overlong: truncate or split, or raise max_lost."
    )
    for remedy in ({"max_length": 80}, {"overlong": "split"}, {"max_lost": 0.6}):
        assert len(encode(tmp_path, rows, **options | remedy).train) >= 3


def test_too_many_lost_supervised_tokens_stop_the_run(tmp_path):
    rows = [conversation(TALK)] * 3
    assert len(encode(tmp_path, rows, overlong="truncate", max_length=48, max_lost=5 / 8).train) == 3
    with pytest.raises(ConfigError, match=r"0\.0% of the rows and 62\.5% of the supervised tokens.*: cut: longer than"):
        encode(tmp_path, rows, overlong="truncate", max_length=48, max_lost=0.62)


def test_rows_without_a_label_stop_the_run_with_their_own_remedy(tmp_path):
    with pytest.raises(ConfigError) as error:
        encode(tmp_path, [silent_row(), conversation(TALK)], max_lost=0.01)
    assert str(error.value) == (
        "max_lost: 50.0% of the rows and 0.0% of the supervised tokens would be lost; allowed is 1.0%: dropped: nothing "
        "to train (1 rows); look at train_on, chat_template and the rows themselves, or raise max_lost."
    )
    with pytest.raises(DataError, match=rf"train_files: no row is left to train on \({tmp_path}/a\.jsonl\)"):
        encode(tmp_path, [silent_row()])


def numbered_rows(count: int) -> list[dict[str, Any]]:
    return [conversation([("user", str(k)), ("assistant", "b")]) for k in range(count)]


def test_limit_rows_takes_the_first_rows_and_says_so(tmp_path):
    data = encode(tmp_path, numbered_rows(9), limit_rows=4)
    assert data.train.number.tolist() == [1, 2, 3, 4]
    assert data.ledger.notes == ["limit_rows: at most the first 4 rows were read."]
    assert encode(tmp_path, numbered_rows(9)).ledger.notes == []


def test_eval_share_holds_out_rows_by_seed(tmp_path):
    parts = {}
    for seed in (1, 1, 2):
        data = encode(tmp_path, numbered_rows(200), seed=seed, eval_share=0.2)
        held, trained = data.eval.number.tolist(), data.train.number.tolist()
        assert sorted(held + trained) == list(range(1, 201)) and 20 < len(held) < 60
        assert bins(data.ledger, f"{tmp_path}/a.jsonl")["held out"] == (len(held), 0, 0)
        assert bins(data.ledger, f"{tmp_path}/a.jsonl")["trained"][0] == len(trained)
        assert parts.setdefault(seed, held) == held
    assert parts[1] != parts[2]
    elsewhere = encode(tmp_path, numbered_rows(200), seed=1, eval_share=0.2, cache_dir=str(tmp_path / "other"))
    assert elsewhere.eval.number.tolist() == parts[1]


def test_a_row_held_out_stays_so_when_rows_are_added_or_the_share_grows(tmp_path):
    few = encode(tmp_path, numbered_rows(100), eval_share=0.2).eval.number.tolist()
    more = encode(tmp_path, numbered_rows(200), eval_share=0.2).eval.number.tolist()
    wider = encode(tmp_path, numbered_rows(100), eval_share=0.4).eval.number.tolist()
    assert [number for number in more if number <= 100] == few
    assert set(few) < set(wider)


def test_eval_files_are_encoded_alike_and_their_lost_rows_are_noted(tmp_path):
    evaluation = write_rows(tmp_path, [conversation(TALK[:2]), conversation(TALK)], "eval.jsonl")
    data = encode(tmp_path, [conversation(TALK[:2])] * 2, eval_files=[evaluation], max_length=40)
    assert len(data.train) == 2 and show_all(data.eval) == [f"{FIRST}⟦bb<|im_end|>⟧\n"]
    assert list(data.ledger.inputs) == [f"{tmp_path}/a.jsonl"]
    assert data.ledger.notes[:1] == [
        f"Evaluation, {evaluation}: 1 rows and 8 tokens dropped: longer than max_length=40."
    ]


def test_nothing_to_evaluate_on_is_an_error(tmp_path):
    evaluation = write_rows(tmp_path, [conversation(TALK)], "eval.jsonl")
    with pytest.raises(DataError, match=r"eval_files: .*eval\.jsonl leaves no row to evaluate on"):
        encode(tmp_path, numbered_rows(3), eval_files=[evaluation], max_length=40)
    with pytest.raises(
        DataError, match=r"eval_share: 0\.001 \(the chance of each row to be held out\) leaves no row to evaluate on"
    ):
        encode(tmp_path, numbered_rows(3), eval_share=0.001)


def test_worker_processes_change_nothing(tmp_path):
    rows = [conversation([("user", str(k)), ("assistant", "b" * (k % 60 + 1))]) for k in range(600)]
    options = {"max_length": 50, "overlong": "split", "eval_share": 0.1, "seed": 3}
    one = encode(tmp_path, rows, **options)
    two = encode(tmp_path, rows, **options, preprocessing_num_workers=2, cache_dir=str(tmp_path / "two"))
    for part in ("train", "eval"):
        for name in ("input_ids", "labels", "offsets", "number", "digest"):
            assert np.array_equal(getattr(getattr(one, part), name), getattr(getattr(two, part), name))
    assert one.ledger == two.ledger and one.fingerprint == two.fingerprint


def text_rows(folder: Path, rows: list[str], tokenizer=TOKENIZER, **changes: Any):
    values: dict[str, Any] = {"train_files": [write_rows(folder, [{"text": row} for row in rows])], "max_lost": 1}
    return encode_texts(DataOptions(cache_dir=str(folder / "cache"), **values | changes), 0, tokenizer, "text")


def with_bos(eos_too: bool = False):
    tokenizer = character_tokenizer()
    template = "<s> $A </s>" if eos_too else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[attr-defined]
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer, expected",
    [
        (TOKENIZER, ["a⟦bc</s>⟧", "d⟦</s>⟧"]),
        (with_bos(), ["<s>⟦abc</s>⟧", "<s>⟦d</s>⟧"]),
        (with_bos(eos_too=True), ["<s>⟦abc</s>⟧", "<s>⟦d</s>⟧"]),
    ],
)
def test_documents_end_once_and_are_trained_but_for_their_first_token(tmp_path, tokenizer, expected):
    assert show_all(text_rows(tmp_path, ["abc", "d"], tokenizer).train) == expected


def test_an_end_token_in_the_text_is_not_doubled_and_none_is_invented(tmp_path):
    assert show_all(text_rows(tmp_path, ["abc</s>"]).train) == ["a⟦bc</s>⟧"]
    endless = character_tokenizer()
    endless.eos_token = None
    assert show_all(text_rows(tmp_path, ["abc"], endless).train) == ["a⟦bc⟧"]


def test_a_long_document_is_split_or_cut(tmp_path):
    split = text_rows(tmp_path, ["abcdefgh"], overlong="split", max_length=4)
    assert show_all(split.train) == ["a⟦bcd⟧", "e⟦fgh⟧"]  # </s> would stand alone
    assert bins(split.ledger, f"{tmp_path}/a.jsonl") == {
        "trained": (1, 6, 1), "cut: longer than max_length=4": (0, 2, 0),
    }  # fmt: skip
    cut = text_rows(tmp_path, ["abcdefgh"], overlong="truncate", max_length=4)
    assert show_all(cut.train) == ["a⟦bcd⟧"]
    assert bins(cut.ledger, f"{tmp_path}/a.jsonl") == {
        "trained": (1, 3, 1), "cut: longer than max_length=4": (0, 5, 0),
    }  # fmt: skip


def test_a_row_without_text_names_file_and_row(tmp_path):
    text_rows(tmp_path, ["x"])
    file = write_rows(tmp_path, [{"text": "x"}, {"content": "y", "n": 1}])
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: .*text.*content, n"):
        encode_texts(DataOptions(train_files=[file], cache_dir=str(tmp_path)), 0, TOKENIZER, "text")
    file = write_rows(tmp_path, [{"content": "y", "n": 1}])
    data = encode_texts(DataOptions(train_files=[file], cache_dir=str(tmp_path)), 0, TOKENIZER, "content")
    assert show_all(data.train) == ["y⟦</s>⟧"]


def variants(folder: Path) -> dict[str, str]:
    """The fingerprint of an encoding, and those of encodings that differ from it in one thing."""
    rows, more = numbered_rows(40), write_rows(folder, numbered_rows(2), "b.jsonl")
    copy = write_rows(folder, rows, "copy.jsonl")
    options = {"eval_share": 0.5, "max_length": 64}
    changes: dict[str, dict[str, Any]] = {
        "nothing": {},
        "max_length": {"max_length": 63},
        "overlong": {"overlong": "split"},
        "train_on": {"train_on": "all"},
        "split_turns": {"split_turns": not DataOptions().split_turns},
        "limit_rows": {"limit_rows": 30},
        "eval_share": {"eval_share": 0.4},
        "eval_files": {"eval_share": 0.0, "eval_files": [more]},
        "more files": {"train_files": [str(folder / "a.jsonl"), more]},
        "name": {"train_files": [copy]},
        "seed": {"seed": 1},
        "train_on_eos": {"train_on_eos": "last"},
        "on_bad_row": {"on_bad_row": "drop"},
        "data_format": {"data_format": "messages"},
        "columns": {"columns": {"content": "content"}},
        "a source's limit": {"train_files": [{"path": str(folder / "a.jsonl"), "limit_rows": 30}]},
        "allow_special_in_text": {"allow_special_in_text": True},
        "chat_template_kwargs": {"chat_template_kwargs": {"x": 1}},
    }
    fingerprints = {name: encode(folder, rows, **options | change).fingerprint for name, change in changes.items()}
    fingerprints["content"] = encode(folder, numbered_rows(41), **options).fingerprint
    values = {"train_files": [write_rows(folder, rows)], "cache_dir": str(folder / "cache"), "max_lost": 1, **options}
    other = character_tokenizer()
    jinja = folder / "other.jinja"
    jinja.write_text(CHATML.source.replace("user", "human") + "{{- '' }}")
    fingerprints["template"] = encode_conversations(
        DataOptions(**values), 0, TOKENIZER, load_template(TOKENIZER, str(jinja))
    ).fingerprint
    other.add_tokens(["ab"])
    fingerprints["vocabulary"] = encode_conversations(
        DataOptions(**values), 0, other, load_template(other, "chatml")
    ).fingerprint
    other = character_tokenizer()
    other.eos_token = "<|im_end|>"
    fingerprints["eos"] = encode_conversations(
        DataOptions(**values), 0, other, load_template(other, "chatml")
    ).fingerprint
    return fingerprints


def test_everything_that_changes_the_encoding_changes_the_cache_key(tmp_path):
    fingerprints = variants(tmp_path)
    assert len(set(fingerprints.values())) == len(fingerprints) == 22
    assert variants(tmp_path) == fingerprints


def test_other_options_do_not_change_the_cache_key(tmp_path):
    plain = encode(tmp_path, numbered_rows(5))
    for change in ({"seed": 7}, {"packing": False}, {"max_lost": 0.5}, {"order": "length"}):
        assert encode(tmp_path, numbered_rows(5), **change).fingerprint == plain.fingerprint
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_another_end_of_text_token_has_another_cache(tmp_path):
    assert show_all(text_rows(tmp_path, ["abc"]).train) == ["a⟦bc</s>⟧"]
    other = character_tokenizer()
    other.eos_token = "<|im_end|>"
    assert show_all(text_rows(tmp_path, ["abc"], other).train) == ["a⟦bc<|im_end|>⟧"]


CONTENT = st.text(string.ascii_letters + " \n.", max_size=40)
ANSWER = CONTENT.map(lambda text: "x" + text)
TALKS = st.lists(st.tuples(CONTENT, ANSWER), min_size=1, max_size=4).map(
    lambda pairs: [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
)
OPTIONS = st.builds(
    DataOptions,
    overlong=st.sampled_from(["drop", "truncate", "split"]),
    train_on=st.sampled_from(["assistant", "last_assistant", "all"]),
    max_length=st.integers(2, 150),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(TALKS, max_size=4), OPTIONS)
def test_the_ledger_balances_for_any_rows(talks, options):
    rows = [conversation(talk) for talk in talks]
    chunk = encode_rows(rows, options)
    chunk.ledger.balance()
    whole = list_pieces(encode_rows(rows, options.model_copy(update={"max_length": 10_000})))
    assert len(whole) == len(rows) and sorted(chunk.lengths.elements()) == sorted(len(ids) for _, ids, _ in whole)
    uncut, pieces = {number: (ids, labels) for number, ids, labels in whole}, list_pieces(chunk)
    trained = chunk.ledger.bins.get("a", {}).get("trained", {"supervised": 0, "context": 0})
    supervised = sum(len(labels) - labels.count(IGNORED) for _, _, labels in pieces)
    assert trained["supervised"] == supervised
    assert trained["context"] == sum(len(ids) for _, ids, _ in pieces) - supervised - sum(
        # labels that a piece's first token loses are counted as cut, though the token stays as context
        uncut[number][1][start] != IGNORED
        for number, start in _starts(pieces, uncut)
    )
    for number, ids, labels in pieces:
        assert len(ids) <= options.max_length and labels[0] == IGNORED and any(label != IGNORED for label in labels)
        if options.overlong == "drop":
            assert (ids, labels) == uncut[number]
        if options.overlong == "truncate":
            assert (ids, labels) == tuple(part[: len(ids)] for part in uncut[number])
            if len(ids) < len(uncut[number][0]) and options.train_on != "all":
                assert ids[-1] == labels[-1] == CHATML.turn_end_id


def _starts(pieces: list, uncut: dict[int, tuple[list[int], list[int]]]) -> list[tuple[int, int]]:
    """(row number, position in the uncut row) of every piece; equal pieces come in order."""
    starts, reached = [], dict.fromkeys(uncut, 0)
    for number, ids, labels in pieces:
        start = reached[number]
        while (
            uncut[number][0][start : start + len(ids)] != ids
            or uncut[number][1][start + 1 : start + len(ids)] != labels[1:]
        ):
            start += 1
        reached[number] = start + len(ids)
        starts.append((number, start))
    return starts


def test_what_nothing_reads_reaches_the_ledger_and_the_cache(tmp_path: Path) -> None:
    rows = [conversation(TALK) | {"remark": "nobody reads these words" * 6} for _ in range(2)]
    rows[0]["messages"][1]["mood"] = "kind"
    rows.append(conversation(TALK))
    for _ in range(2):  # the second time from the cache
        ledger = encode(tmp_path, rows).ledger
        assert {name: (unused.rows, unused.characters) for name, unused in ledger.unused.items()} == {
            "column 'remark'": (2, 288),
            "'mood' of messages": (1, 4),
        }
        assert ledger.characters > 292
    marked = conversation([("user", "a"), ("assistant", "b<|im_end|>")])
    (remark,) = encode(tmp_path, [marked], cache_dir=str(tmp_path / "other")).ledger.remarks.items()
    assert "as if it were rendered already" in remark[0] and remark[1] == 1
