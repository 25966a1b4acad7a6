"""Texts with labels become the token ids of the tokenizer's own call, and every row and token is accounted for."""

import csv
import json
import math
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from support import character_tokenizer
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data.encode_labelled import encode_text_pairs
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, Labels
from accel_llm.data.prepare import EncodedData, encode_labelled
from accel_llm.errors import ConfigError, DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOKENIZERS = ["bert-base-uncased", "bert-base-chinese", "qwen3", "llama2", "smollm"]
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
TEXTS = [
    "A short text.",
    "  spaces, 'quotes' and\nlines\t",
    "酒店的服务很好。房间 too small!",
    "naïve 🙂 e\u0301 İstanbul",
    "[SEP] </s> <|im_end|> in the text",
    "word " * 40,
    "x",
]
PAIRS = [(a, b) for a, b in zip(TEXTS, reversed(TEXTS), strict=True) if a != b]
TABLE = [{"text": "ab", "label": "no"}, {"text": "abcd", "label": "yes"}, {"text": "c", "label": "no"}]


@lru_cache
def real(name: str) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)


def encode(folder: Path, rows: list[dict[str, Any]] | None, tokenizer: Any = None, **changes: Any) -> EncodedData:
    """Encode rows of a file with a tokenizer of one token a character, unless another one is given."""
    kind = {name: changes.pop(name) for name in ("problem_type", "names") if name in changes}
    values: dict[str, Any] = {"cache_dir": str(folder / "cache"), "max_lost": 1}
    if rows is not None:
        (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        values["train_files"] = [str(folder / "a.jsonl")]
    options = DataOptions(**values | changes)
    return encode_labelled(options, 0, tokenizer or character_tokenizer(), **kind)


def ids_of(data: EncodedData) -> list[list[int]]:
    return [data.train[k][0].tolist() for k in range(len(data.train))]


def bins(data: EncodedData) -> dict[str, tuple[int, int]]:
    """Rows and tokens of each bin; no token of a text is supervised."""
    (one,) = data.ledger.bins.values()
    assert all(amount["supervised"] == 0 for amount in one.values())
    return {name: (amount["rows"], amount["context"]) for name, amount in one.items()}


@needs_data
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pairs", [False, True])
def test_ids_are_those_of_the_tokenizers_own_call(name: str, pairs: bool, tmp_path: Path) -> None:
    plain = tokenizer = real(name)
    parts = PAIRS if pairs else [(text,) for text in TEXTS]
    for max_length in (2048, 24, 9):
        rows = [dict(zip(("text", "text_pair"), part, strict=False)) | {"label": k % 2} for k, part in enumerate(parts)]
        data = encode(tmp_path, rows, tokenizer, max_length=max_length, overlong="truncate")
        expected = [plain(*part, truncation=True, max_length=max_length) for part in parts]
        assert ids_of(data) == [one["input_ids"] for one in expected]
        if "token_type_ids" in expected[0]:
            assert data.train.second_start is not None
            lengths = data.train.lengths.tolist()
            types = [[0] * k + [1] * (n - k) for k, n in zip(data.train.second_start.tolist(), lengths, strict=True)]
            assert types == [one["token_type_ids"] for one in expected]
            assert pairs == any(map(any, types))
            assert name == "bert-base-chinese"  # the other BERT has the class of DistilBERT, which has no types
        else:
            assert data.train.second_start is None
        whole = sum(len(plain(*part)["input_ids"]) for part in parts)
        kept = sum(len(one["input_ids"]) for one in expected)
        cut = {f"cut: longer than max_length={max_length}": (0, whole - kept)} if whole > kept else {}
        assert bins(data) == {"trained": (len(parts), kept)} | cut
        assert not (data.train.labels != -100).any()
    # Special tokens are there where the tokenizer has them.
    bare = [plain(*part, add_special_tokens=False)["input_ids"] for part in parts]
    assert (ids_of(encode(tmp_path, rows, tokenizer)) != bare) == (
        name in ("bert-base-uncased", "bert-base-chinese", "llama2")
    )


@needs_data
def test_truncation_and_padding_in_the_file_of_a_tokenizer_change_nothing(tmp_path: Path) -> None:
    tokenizer, plain = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "smollm"), real("smollm")
    texts = [("a b c " * 20, None), ("x", None)]
    expected = [plain(text)["input_ids"] for text, _ in texts]
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=16)
    assert [one.input_ids for one in encode_text_pairs(texts, tokenizer)] == expected
    assert [one.input_ids for one in encode_text_pairs(texts, tokenizer, 7)] == [ids[:7] for ids in expected]
    assert tokenizer.backend_tokenizer.truncation is None and tokenizer.backend_tokenizer.padding is None


@needs_data
@pytest.mark.parametrize("name", ["bert-base-uncased", "llama2"])
def test_nothing_is_cut_to_special_tokens_alone(name: str, tmp_path: Path) -> None:
    tokenizer = real(name)
    special = tokenizer.backend_tokenizer.num_special_tokens_to_add
    rows = [{"text": "one two three", "text_pair": "four five", "label": k % 2} for k in range(2)]
    for max_length in range(2, 10):
        if max_length < special(True) + 2:
            with pytest.raises(DataError, match="no row is left"):
                encode(tmp_path, rows, tokenizer, max_length=max_length, overlong="truncate")
            continue
        data = encode(tmp_path, rows, tokenizer, max_length=max_length, overlong="truncate")
        plain = tokenizer("one two three", "four five", truncation=True, max_length=max_length)
        assert ids_of(data) == [plain["input_ids"]] * 2 and {0, 1} < set(plain.sequence_ids()) | {None}


@needs_data
def test_a_text_of_which_the_tokenizer_leaves_nothing_is_empty(tmp_path: Path) -> None:
    tokenizer, nothing = real("bert-base-uncased"), "\u200b\u200d"
    assert tokenizer(nothing)["input_ids"] == tokenizer("")["input_ids"]
    good = [{"text": "a", "text_pair": "b", "label": k} for k in range(2)]
    for row in ({"text": nothing, "label": 0}, {**good[0], "text_pair": nothing}, {**good[0], "text": nothing}):
        with pytest.raises(DataError, match=r"a\.jsonl, row 3: text: the tokenizer leaves nothing of it"):
            encode(tmp_path, [*good, row], tokenizer)
        data = encode(tmp_path, [*good, row], tokenizer, on_bad_row="drop")
        assert bins(data)["dropped: empty text"] == (1, 0) and len(data.train) == 2


def typed_tokenizer(*types: int) -> PreTrainedTokenizerFast:
    """A tokenizer of one token a character, whose texts begin with <s> and have these token types."""
    tokenizer, (begin, first, second) = character_tokenizer(), types
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s>:{begin} $A:{first}",
        pair=f"<s>:{begin} $A:{first} <s>:{second} $B:{second}",
        special_tokens=[("<s>", 1)],
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return tokenizer


def test_token_types_are_0_and_1_or_the_tokenizer_is_refused(tmp_path: Path) -> None:
    rows = [{"text": "ab", "text_pair": "c", "label": 0}, {"text": "d", "label": 1}]
    data = encode(tmp_path, rows, typed_tokenizer(0, 0, 1))
    assert data.train.second_start is not None and data.train.second_start.tolist() == [3, 2]
    for types in ((2, 0, 1), (0, 1, 0), (0, 0, 2)):  # the first as XLNet's
        with pytest.raises(ConfigError, match=r"tokenizer_name: the token types of its texts are \["):
            encode(tmp_path, rows, typed_tokenizer(*types))


def test_long_texts_are_dropped_cut_or_refused(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    whole = [tokenizer(row["text"])["input_ids"] for row in TABLE]
    data = encode(
        tmp_path, TABLE, max_length=3, names=("no", "yes", "maybe"), problem_type=SINGLE_LABEL, overlong="truncate"
    )
    assert ids_of(data) == [ids[:3] for ids in whole]
    assert bins(data) == {"trained": (3, 6), "cut: longer than max_length=3": (0, 1)}
    data = encode(tmp_path, [*TABLE, {"text": "d", "label": "yes"}], max_length=3)
    assert [row.tolist() for row in [data.train.number]] == [[1, 3, 4]]
    assert bins(data) == {"trained": (3, 4), "dropped: longer than max_length=3": (1, 4)}
    with pytest.raises(
        DataError, match=r"row 2: 4 tokens are longer than max_length=3; raise it, or set overlong: drop or t"
    ):
        encode(tmp_path, TABLE, max_length=3, overlong="error")
    with pytest.raises(
        ConfigError, match=r"max_lost: 25\.0% of the rows .*raise max_length, set overlong: truncate, or"
    ):
        encode(tmp_path, [*TABLE, {"text": "d", "label": "yes"}], max_length=3, max_lost=0.1)


def test_targets_lie_beside_the_rows(tmp_path: Path) -> None:
    data = encode(tmp_path, TABLE)
    assert data.labels == Labels(SINGLE_LABEL, ("no", "yes")) and data.train.problem_type == SINGLE_LABEL
    assert data.train.targets is not None and data.train.targets.dtype == np.float32
    assert data.train.targets.tolist() == [[0], [1], [0]]
    assert "Labels to train on (single_label_classification), by rows: no (2), yes (1)." in data.ledger.notes
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": ["z"]}]
    data = encode(tmp_path, rows)
    assert data.labels == Labels(MULTI_LABEL, ("x", "y", "z"))
    assert data.train.targets is not None and data.train.targets.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]
    data = encode(tmp_path, [{"text": "a", "label": 0.1}, {"text": "b", "label": "3"}])
    assert data.labels == Labels(REGRESSION, ("score",)) and data.train.problem_type == REGRESSION
    assert data.train.targets is not None and data.train.targets.tolist() == [[np.float32(0.1)], [3]]
    data = encode(tmp_path, [{"text": "a", "x": 0, "y": 1}, {"text": "b", "x": 1, "y": 1}], columns={"label": "y,x"})
    assert data.labels == Labels(MULTI_LABEL, ("y", "x"))
    assert data.train.targets is not None and data.train.targets.tolist() == [[1, 0], [1, 1]]


def test_rows_to_evaluate_on_have_the_classes_of_training(tmp_path: Path) -> None:
    path = tmp_path / "eval.csv"
    path.write_text("label,text\nyes,e\nno,f\nmaybe,g\n")
    with pytest.raises(DataError) as error:
        encode(tmp_path, TABLE, eval_files=[str(path)])
    assert str(error.value) == (
        f'{path}, row 3: label: found "maybe", which is unknown; known are no, yes; on_bad_row: drop leaves such rows out.'
    )
    data = encode(tmp_path, TABLE, eval_files=[str(path)], on_bad_row="drop")
    assert data.eval is not None and data.eval.targets is not None and data.eval.targets.tolist() == [[1], [0]]
    assert data.eval.problem_type == SINGLE_LABEL
    assert f"Evaluation, {path}: 1 rows and 0 tokens dropped: unknown label." in data.ledger.notes
    data = encode(tmp_path, TABLE, eval_files=[str(path)], names=("maybe", "no", "yes"))
    assert data.eval is not None and data.eval.targets is not None and data.eval.targets.tolist() == [[2], [1], [0]]


def test_which_classes_there_are_does_not_depend_on_what_is_held_out(tmp_path: Path) -> None:
    rows = [{"text": f"{k}", "label": f"class {k % 9}"} for k in range(40)]
    data = encode(tmp_path, rows, eval_share=0.5)
    assert data.eval is not None and len(data.train) + len(data.eval) == 40 and 5 < len(data.eval) < 35
    assert data.labels == encode(tmp_path, rows).labels
    assert bins(data)["held out"] == (40 - len(data.train), 0)
    data = encode(tmp_path, rows, limit_rows=4)
    assert len(data.train) == 4 and data.labels == Labels(SINGLE_LABEL, tuple(f"class {k}" for k in range(4)))


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"text": "", "label": "no"}, "text: the text is empty"),
        ({"text": "x", "label": None}, "label: found no label"),
        ({"text": "x"}, "no column is known as the label"),
        ({"text": "x", "label": math.nan}, "label: found nan; needs a finite number"),
        ({"text": "x", "label": ["a", None]}, "label: found no label"),
        ({"text": "x", "label": {"a": 1}}, 'label: found {"a": 1}'),
    ],
)
def test_a_bad_row_is_refused_or_counted(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        encode(tmp_path, [*TABLE, row])
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, row 4: {problem}") and "\n" not in str(error.value)
    data = encode(tmp_path, [*TABLE, row], on_bad_row="drop")
    assert bins(data) == {"trained": (3, 7), f"dropped: {error.value.reason}": (1, 0)}
    with pytest.raises(ConfigError, match="max_lost: 25"):
        encode(tmp_path, [*TABLE, row], on_bad_row="drop", max_lost=0.2)


@pytest.mark.parametrize(
    "rows, sentence",
    [
        (TABLE[:1] * 3, "train_files: the label of all 3 rows is no; a classifier needs rows of two labels or more."),
        (
            [{"text": "a", "label": 7 * k} for k in range(30)],
            "label: found 30 different numbers from 0 to 203 in 30 rows",
        ),
        ([{"text": "a", "label": f"text {k}"} for k in range(30)], "label: 30 of 30 labels are those of a single row"),
        ([{"text": "", "label": "x"}], "a.jsonl, row 1: text: the text is empty"),
    ],
)
def test_labels_that_teach_nothing_are_refused(rows: list[dict], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        encode(tmp_path, rows)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_options_without_meaning_are_refused(tmp_path: Path) -> None:
    for change, sentence in (
        ({"overlong": "split"}, "overlong: split would give each piece the label of the whole text"),
        ({"data_format": "messages"}, "data_format: messages has no label"),
        ({"columns": {"prompt": "text"}}, "columns: prompt=text, but 'prompt' is not a field of a text with a label"),
    ):
        with pytest.raises(ConfigError) as error:
            encode(tmp_path, TABLE, **change)
        assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_the_cache_knows_what_was_asked_for(tmp_path: Path) -> None:
    tokenizer = character_tokenizer()
    first, again = encode(tmp_path, TABLE, tokenizer), encode(tmp_path, TABLE, tokenizer)
    assert first.fingerprint == again.fingerprint and first.labels == again.labels
    assert first.ledger.to_dict() == again.ledger.to_dict()
    other = [encode(tmp_path, TABLE, tokenizer, names=("yes", "no")), encode(tmp_path, TABLE, problem_type=MULTI_LABEL)]
    left = character_tokenizer()
    left.truncation_side = "left"
    other.append(encode(tmp_path, TABLE, left))
    assert len({first.fingerprint, *(data.fingerprint for data in other)}) == 4


@pytest.mark.long
def test_workers_give_the_same_rows(tmp_path: Path) -> None:
    rows = [{"text": f"{k % 7}" * (1 + k % 5), "label": k % 3} for k in range(600)] + [{"text": "", "label": 9}]
    one = encode(tmp_path, rows, on_bad_row="drop")
    two = encode(tmp_path, rows, on_bad_row="drop", preprocessing_num_workers=2, cache_dir=str(tmp_path / "other"))
    for name in ("input_ids", "offsets", "number", "targets", "digest", "second_start"):
        a, b = getattr(one.train, name), getattr(two.train, name)
        assert (a is None and b is None) or np.array_equal(a, b), name
    assert one.ledger.to_dict() == two.ledger.to_dict() and one.labels == two.labels


def test_sources_may_have_weights_and_columns_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "b.tsv").write_text("".join(f"good text {k}\tyes\nbad text {k}\tno\n" for k in range(5)))
    datasets.Dataset.from_list([{"body": "a", "y": 1}, {"body": "b", "y": 0}]).cast_column(
        "y", datasets.ClassLabel(names=["no", "yes"])
    ).to_parquet(str(tmp_path / "c.parquet"))
    sources = [
        Source(path=str(tmp_path / "b.tsv"), weight=1),
        Source(path=str(tmp_path / "c.parquet"), weight=3, columns={"text": "body", "label": "y"}),
    ]
    data = encode(tmp_path, None, train_files=sources)
    assert data.labels == Labels(SINGLE_LABEL, ("no", "yes"))
    assert data.train.targets is not None and data.train.targets[:, 0].tolist() == [1, 0] * 6
    notes = " ".join(data.ledger.notes)
    assert "Mixed by weight" in notes and "b.tsv: a file without a header; its columns are text, label." in notes


@needs_data
@pytest.mark.parametrize(
    "name, file",
    [
        ("bert-base-uncased", "SST-2/dev.tsv"),
        pytest.param("bert-base-chinese", "ChnSentiCorp_htl_all.csv", marks=pytest.mark.long),
    ],
)
def test_published_files_are_encoded_whole(name: str, file: str, tmp_path: Path) -> None:
    path = SHARED / "seqcls" / file
    with path.open(encoding="utf-8", newline="") as lines:
        expected = list(csv.DictReader(lines, delimiter="\t" if file.endswith("tsv") else ","))
    column = "text" if "text" in expected[0] else "review"
    expected = [row for row in expected if row[column]]
    data = encode(
        tmp_path,
        None,
        real(name),
        train_files=[str(path)],
        on_bad_row="drop",
        max_length=512,
        overlong="truncate",
        max_lost=0.01,
    )
    assert len(data.train) == len(expected)
    assert data.train.targets is not None
    assert data.train.targets[:, 0].astype(int).astype(str).tolist() == [row["label"] for row in expected]
    counts = Counter(row["label"] for row in expected)
    assert f"by rows: 0 ({counts['0']:,}), 1 ({counts['1']:,})." in " ".join(data.ledger.notes)
    for k in range(0, len(expected), 97):
        plain = real(name)(expected[k][column], truncation=True, max_length=512)
        assert data.train[k][0].tolist() == plain["input_ids"]
