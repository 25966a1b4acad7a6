"""Rows of texts with labels: which columns they are read from, and tables whose first line is a row."""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from accel_llm.chat.values import BAD_TARGET, EMPTY_TEXT, IMAGES, MISSING_VALUE, NO_COLUMN, NO_LABEL, NOT_TEXT
from accel_llm.config.fields import Source
from accel_llm.data.label_task import LabelTask, find_task
from accel_llm.data.labelled_rows import labelled_column_problems, name_columns, parse_labelled
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LabelKind, Labels
from accel_llm.data.sources import read_source
from accel_llm.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data" / "seqcls"
SST = ["it 's slow -- very , very slow . \t0", "a charming journey \t1", "unflinchingly bleak \t0", "fun \t1"]


def read(row: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[str, str | None, Any]:
    parsed = parse_labelled(row, columns or {})
    return parsed.text, parsed.text_pair, parsed.label


def refusal(row: dict[str, Any], columns: dict[str, str] | None = None) -> tuple[str, str]:
    with pytest.raises(DataError) as error:
        parse_labelled(row, columns or {})
    assert "\n" not in str(error.value) and len(str(error.value)) < 700
    return error.value.reason, str(error.value)


@pytest.mark.parametrize("text", ["text", "sentence", "content", "review", "Review", "reviewText", "tweet", "question"])
@pytest.mark.parametrize("label", ["label", "labels", "target", "class", "Category", "score", "stars", "Class Index"])
def test_columns_are_found_by_name(text: str, label: str) -> None:
    assert read({label: 1, "idx": 7, text: " a "}) == (" a ", None, "1")


@pytest.mark.parametrize(
    "first, second",
    [
        ("sentence1", "sentence2"),
        ("premise", "hypothesis"),
        ("question1", "question2"),
        ("question", "sentence"),
        ("text_a", "text_b"),
        ("text", "text_pair"),
        ("Sentence1", "sentence2"),
    ],
)
def test_two_texts_are_found_by_name(first: str, second: str) -> None:
    assert read({second: "b", "label": "x", first: "a", "genre": "g"}) == ("a", "b", "x")


def test_columns_may_be_named() -> None:
    row = {"headline": "h", "body": "b", "stars": 4, "label": "x", "other": "o"}
    assert read(row, {"text": "body", "label": "stars"}) == ("b", None, "4")
    assert read(row, {"text": "headline", "text_pair": "body", "label": "label"}) == ("h", "b", "x")
    assert read({"a": "1", "b": "2", "label": 0}, {"text": "b", "text_pair": "a"}) == ("2", "1", "0")
    # A text that is named is the only one, and what is named for the label is no text.
    assert read({"sentence1": "a", "sentence2": "b", "label": 0}, {"text": "sentence2"}) == ("b", None, "0")
    assert read({"text": "a", "title": "b"}, {"label": "title"}) == ("a", None, "b")
    assert read({"text": "a", "why": "b", "label": 1}, {"text_pair": "why"}) == ("a", "b", "1")


def test_columns_of_0_and_1_are_several_labels() -> None:
    columns = {"label": "toxic, insult,threat"}
    row = {"text": "a", "toxic": "1", "insult": 0, "threat": True}
    parsed = parse_labelled(row, columns)
    assert parsed.label == ("toxic", "threat") and parsed.names == ("toxic", "insult", "threat")
    assert refusal({**row, "insult": 2}, columns) == (
        BAD_TARGET,
        "insult: found 2; needs 0 or 1, as a column of one label",
    )
    assert refusal({**row, "insult": None}, columns)[0] == NO_LABEL
    assert refusal({"text": "a", "toxic": 1, "insult": 1}, columns)[0] == MISSING_VALUE
    # A column whose own name has a comma.
    assert read({"text": "a", "x,y": "l"}, {"label": "x,y"}) == ("a", None, "l")


def test_what_nothing_reads_is_counted() -> None:
    parsed = parse_labelled({"text": "abc", "label": "x", "idx": 3, "notes": "seven", "empty": None})
    assert [(name, values.characters) for name, values in parsed.unused] == [("column 'idx'", 1), ("column 'notes'", 5)]
    assert parsed.characters == 3 + 1 + 1 + 5


@pytest.mark.parametrize(
    "row, columns, reason, part",
    [
        ({"text": "", "label": 1}, {}, EMPTY_TEXT, "text: the text is empty"),
        ({"text": " \n", "label": 1}, {}, EMPTY_TEXT, "text: the text is empty"),
        ({"review": None, "label": 1}, {}, EMPTY_TEXT, "review: the text is empty (its keys: review, label)"),
        ({"text": "a", "text_pair": "", "label": 1}, {}, EMPTY_TEXT, "text_pair: the text is empty"),
        ({"text": ["a"], "label": 1}, {}, NOT_TEXT, 'text: found ["a"]; needs text'),
        ({"text": "\ud83d", "label": 1}, {}, NOT_TEXT, "half of a surrogate pair"),
        ({"text": "a", "label": None}, {}, NO_LABEL, "label: found no label"),
        ({"text": "a", "label": float("nan")}, {}, BAD_TARGET, "label: found nan; needs a finite number"),
        ({"text": "a"}, {}, NO_COLUMN, "no column is known as the label (its keys: text); known are label, labels"),
        ({"label": 1}, {}, NO_COLUMN, "no column is known as the text (its keys: label); known are text, sentence"),
        ({"text": "a", "content": "b", "label": 1}, {}, NO_COLUMN, "several columns may be the text: text, content;"),
        (
            {"premise": "a", "hypothesis": "b", "text": "c", "label": 1},
            {},
            NO_COLUMN,
            "several columns may be the text: premise, hypothesis, text; choose with columns: text=premise (and",
        ),
        ({"text": "a", "label": 1, "stars": 2}, {}, NO_COLUMN, "several columns may be the label: label, stars;"),
        ({"text": "a", "label": 1}, {"label": "stars"}, MISSING_VALUE, "columns: label is read from 'stars', which is"),
        ({"text": "a", "label": 1}, {"text": "body"}, MISSING_VALUE, "columns: text is read from 'body', which is"),
        ({"text": "a", "label": 1, "image": "x.png"}, {}, IMAGES, "image: found"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(row: dict, columns: dict, reason: str, part: str) -> None:
    found, sentence = refusal(row, columns)
    assert found == reason and part in sentence


def test_only_the_fields_of_a_text_with_a_label_are_renamed() -> None:
    assert labelled_column_problems({"text": "a", "text_pair": "b", "label": "c"}) == []
    assert labelled_column_problems({"prompt": "a"}) == [
        "columns: prompt=a, but 'prompt' is not a field of a text with a label; the fields are text, text_pair, label."
    ]


def cells(*lines: str) -> list[list[str]]:
    return [line.split("\t") for line in lines]


@pytest.mark.parametrize(
    "lines, columns, names",
    [
        (["text\tlabel", *SST], {}, None),
        (["Sentence\tLABEL", *SST], {}, None),
        (["what\tlabel", "a b\tx", "c d\tx"], {}, None),
        (["what\tmood", "a b\tx", "c d\ty"], {"text": "what", "label": "mood"}, None),
        (["what\tmood", "a b\tx", "c d\ty"], {}, None),  # refused at its first row
        (SST, {}, ["text", "label"]),
        (["1\tfun", "0\tbad"], {}, ["label", "text"]),
        # Words that are names of columns may be rows, too.
        (["content\t1", "bleak\t0"], {}, ["text", "label"]),
        (["content\tpos", "bleak\tneg", "good\tpos", "fine\tpos"], {}, ["text", "label"]),
        (SST, {"text": "0", "label": "1"}, ["0", "1"]),
        (["a\tb\tx", "c\td\ty"], {"text": "0", "text_pair": "1", "label": "2"}, ["0", "1", "2"]),
        (["a\t1\t0", "b\t0\t0"], {"text": "0", "label": "1,2"}, ["0", "1", "2"]),
        (["gj04\t1\t\tOur friends", "gj04\t0\t*\tOur"], {"text": "3", "label": "1"}, ["0", "1", "2", "3"]),  # CoLA
        (["0\t1", *SST], {"text": "0", "label": "1"}, None),  # as pandas writes columns without a name
    ],
)
def test_a_table_without_a_header_is_recognized(lines: list[str], columns: dict, names: list[str] | None) -> None:
    assert name_columns(cells(*lines), columns) == names


@pytest.mark.parametrize(
    "lines, columns, sentence",
    [
        (
            ["a\tb\t1", "c\td\t0"],
            {},
            "its first line is a row, not a header; name its columns by number, as in columns: ",
        ),
        (["1\t2", "3\t4"], {}, "its first line is a row, not a header"),
        (["text\tlabel", *SST], {"text": "0", "label": "1"}, "its first line is a header (text, label), so name"),
        (["what\tmood", *SST], {"text": "0", "label": "1"}, "its first line is a header (what, mood), so name"),
        (SST, {"text": "0", "label": "2"}, "columns: 2 is no column of its 2, which count from 0"),
    ],
)
def test_a_table_that_nobody_knows_is_refused(lines: list[str], columns: dict, sentence: str) -> None:
    with pytest.raises(DataError) as error:
        name_columns(cells(*lines), columns)
    assert sentence in str(error.value)


def write(folder: Path, name: str, *lines: str) -> Source:
    (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Source(path=str(folder / name))


def rows_of(source: Source, kind: LabelKind | None = None, **columns: str) -> tuple[list[tuple], LabelTask]:
    task = find_task(kind or LabelKind(), [source], [columns], 1, None)
    (reader,) = task.readers
    rows = [(row.number, reader.parse(row)) for row in reader.read()]
    return [(number, row.text, row.text_pair, row.label) for number, row in rows], task


@pytest.mark.parametrize("columns", [{}, {"text": "0", "label": "1"}])
def test_no_row_of_a_table_without_a_header_is_lost(tmp_path: Path, columns: dict[str, str]) -> None:
    expected = [(k, *line.split("\t")[:1], None, line.split("\t")[1]) for k, line in enumerate(SST, 1)]
    rows, task = rows_of(write(tmp_path, "a.tsv", *SST), **columns)
    assert rows == expected and task.vocabulary.labels == Labels(SINGLE_LABEL, ("0", "1"))
    assert task.readers[0].notes() == [
        f"{tmp_path / 'a.tsv'}: a file without a header; its columns are {'0, 1' if columns else 'text, label'}.",
        f"{tmp_path / 'a.tsv'}: {'text from 0, label from 1' if columns else 'text from text, label from label'}.",
    ]
    rows, task = rows_of(write(tmp_path, "b.tsv", "text\tlabel", *SST))
    assert rows == expected and task.readers[0].notes() == [f"{tmp_path / 'b.tsv'}: text from text, label from label."]
    # A row with another number of cells is not cut or filled.
    with pytest.raises(DataError, match=r"c\.tsv, line 5: has 1 cells, must have 2 as line 1 has \(text, label\)"):
        rows_of(write(tmp_path, "c.tsv", *SST, "odd"))
    with pytest.raises(DataError, match=r"d\.tsv: its first line is a row"):
        rows_of(write(tmp_path, "d.tsv", *(f"x\t{line}" for line in SST)))


def test_quotes_of_a_tsv_file_without_quoting_are_signs(tmp_path: Path) -> None:
    lines = ['"the office" is fun\t1', '" it begins and never ends\t0', 'he said "no"\t1', '"all of it"\t0']
    rows, _ = rows_of(write(tmp_path, "a.tsv", "sentence\tlabel", *lines))
    assert [row[1] for row in rows] == [line.split("\t")[0] for line in lines]
    # Where each quoted cell is whole, quotes are quoting, also over the end of a line.
    quoted = ['"a ""b"" c"\t1', '"two\nlines"\t0']
    rows, _ = rows_of(write(tmp_path, "b.tsv", "sentence\tlabel", *quoted))
    assert [row[1] for row in rows] == ['a "b" c', "two\nlines"]
    source = write(tmp_path, "c.tsv", "text", '"two\nlines"', '"one"')
    assert [row.fields["text"] for row in read_source(source)] == ["two\nlines", "one"]


TABLE = [{"review": 'good, "very" good\nyes', "stars": 5}, {"review": "été", "stars": 1}, {"review": "bad", "stars": 1}]


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "saved"])
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    path, data = tmp_path / f"a.{kind}", datasets.Dataset.from_list(TABLE)
    if kind in ("csv", "tsv"):
        with path.open("w", encoding="utf-8-sig", newline="") as file:  # with a byte order mark, as Excel writes it
            writer = csv.DictWriter(file, ["review", "stars"], delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(TABLE)
    elif kind == "json":
        path.write_text(json.dumps(TABLE), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, TABLE)), encoding="utf-8")
    elif kind == "parquet":
        data.to_parquet(str(path))
    else:
        data.save_to_disk(str(path))
    rows, task = rows_of(Source(path=str(path)))
    assert rows == [(k, row["review"], None, str(row["stars"])) for k, row in enumerate(TABLE, 1)]
    assert task.vocabulary.labels == Labels(SINGLE_LABEL, ("1", "5"))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_class_labels_of_datasets_keep_names_and_order(tmp_path: Path, kind: str) -> None:
    names = ["World", "Sports", "Business"]
    one = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    several = {**one, "label": datasets.List(datasets.ClassLabel(names=names))}

    def save(name: str, rows: list[dict[str, Any]], features: dict[str, Any]) -> Source:
        path = tmp_path / f"{name}.{kind}"
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        _ = data.to_parquet(str(path)) if kind == "parquet" else data.save_to_disk(str(path))
        return Source(path=str(path))

    rows, task = rows_of(save("one", [{"text": "a", "label": 1}, {"text": "b", "label": 0}], one))
    assert [row[3] for row in rows] == ["Sports", "World"]
    assert task.vocabulary.labels == Labels(SINGLE_LABEL, tuple(names))
    rows, task = rows_of(save("several", [{"text": "a", "label": [1, 2]}, {"text": "b", "label": []}], several))
    assert [row[3] for row in rows] == [("Sports", "Business"), ()]
    assert task.vocabulary.labels == Labels(MULTI_LABEL, tuple(names))
    # -1 is a row without a label.
    source = save("none", [{"text": "a", "label": -1}], one)
    with pytest.raises(DataError, match="found -1, which says that the row has no label"):
        rows_of(source)


def test_the_kind_of_labels_is_that_of_all_rows(tmp_path: Path) -> None:
    lines = ["text\tscore", *[f"t\t{k % 5}" for k in range(999)], "t\t2.5"]
    assert rows_of(write(tmp_path, "a.tsv", *lines))[1].vocabulary.labels.problem_type == REGRESSION
    source = write(tmp_path, "b.tsv", *lines).model_copy(update={"limit_rows": 999})
    assert rows_of(source)[1].vocabulary.labels == Labels(SINGLE_LABEL, tuple("01234"))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the shared data")
@pytest.mark.parametrize(
    "name, text, label, empty",
    [
        ("SST-2/dev.tsv", "text", "label", 0),
        ("SST-2/train_first10000.tsv", "text", "label", 0),
        ("ChnSentiCorp_htl_all.csv", "review", "label", 1),
    ],
)
def test_published_files_are_read_whole(name: str, text: str, label: str, empty: int) -> None:
    with (REAL / name).open(encoding="utf-8", newline="") as file:
        expected = list(csv.DictReader(file, delimiter="\t" if name.endswith("tsv") else ","))
    task = find_task(LabelKind(), [Source(path=str(REAL / name))], [{}], 1, None)
    (reader,) = task.readers
    rows, bad = [], []
    for row in reader.read():
        try:
            parsed = reader.parse(row)
            rows.append((parsed.text, parsed.label))
        except DataError as error:
            bad.append((row.number, error.reason))
    assert rows == [(row[text], row[label]) for row in expected if row[text].strip()]
    assert bad == [(k, EMPTY_TEXT) for k, row in enumerate(expected, 1) if not row[text].strip()] and len(bad) == empty
    assert Counter(label for _, label in rows).keys() == {"0", "1"}
    assert task.vocabulary.labels == Labels(SINGLE_LABEL, ("0", "1"))
    assert len(reader.notes()) == 1 and reader.notes()[0].endswith(f": text from {text}, label from label.")
