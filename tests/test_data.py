"""Files -> rows, with file and line of what is broken; the cache is built once, whole or not at all."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accel_llm.data import ARRAYS, Rows, build_rows, cache_folder, cached, fingerprint, problems, read_rows
from accel_llm.errors import DataError
from accel_llm.options import DataOptions

A, B, C = {"text": "é"}, {"text": "b", "n": 1}, {"text": "\u2028c"}
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in (A, B, C))


def written(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows_in(*files: str, limit: int | None = None) -> list[tuple[str, int, dict[str, Any]]]:
    return [(Path(name).name, number, row) for name, number, row in read_rows(list(files), limit)]


@pytest.mark.parametrize(
    "name, content",
    [
        ("list.json", json.dumps([A, B, C])),
        ("pretty.json", json.dumps([A, B, C], indent=2)),
        ("lines.json", LINES),
        ("lines.jsonl", LINES),
        ("ends.jsonl", LINES + "\n"),
        ("blank.jsonl", "\n  \n" + LINES.replace("\n", "\n\n \t\n") + "\n\n"),
        ("blank.json", "\n" + LINES.replace("\n", "\n\n")),
        ("bom.json", b"\xef\xbb\xbf" + json.dumps([A, B, C]).encode()),
        ("bom_lines.json", b"\xef\xbb\xbf" + LINES.encode()),
        ("bom.jsonl", b"\xef\xbb\xbf" + LINES.encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
    ],
)
def test_every_kind_of_json_gives_the_same_rows(tmp_path, name, content):
    assert rows_in(written(tmp_path, name, content)) == [(name, 1, A), (name, 2, B), (name, 3, C)]


@pytest.mark.parametrize("name", ["one.json", "one.jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_single_object_is_a_file_of_one_row(tmp_path, name, indent):
    file = written(tmp_path, name, json.dumps(B, indent=indent))
    if name == "one.jsonl" and indent:
        with pytest.raises(DataError, match=r"one\.jsonl, line 1: not JSON"):
            rows_in(file)
    else:
        assert rows_in(file) == [(name, 1, B)]


def test_a_text_file_is_a_document_a_line(tmp_path):
    file = written(tmp_path, "a.txt", b"\xef\xbb\xbf first \r\n\n\t\nsecond\xe2\x80\xa8still second\nlast")
    assert rows_in(file) == [
        ("a.txt", 1, {"text": " first "}),
        ("a.txt", 2, {"text": "second\u2028still second"}),
        ("a.txt", 3, {"text": "last"}),
    ]


def test_limit_counts_the_rows_of_all_files(tmp_path):
    first, second = written(tmp_path, "a.jsonl", LINES), written(tmp_path, "b.json", LINES)
    broken = written(tmp_path, "c.jsonl", "{")
    every = [*rows_in(first), *rows_in(second)]
    assert len(every) == 6
    for limit in range(1, 7):
        assert rows_in(first, second, broken, limit=limit) == every[:limit]
    assert rows_in(first, second, limit=100) == every
    with pytest.raises(DataError, match=r"c\.jsonl, line 1"):
        rows_in(first, second, broken, limit=7)


FAR = b'{"text": "a line among many"}\n' * 1000  # more than a reader's buffer


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"a": 1}\n\n{"a": ', "a.jsonl, line 3: not JSON (Expecting value)."),
        ("a.jsonl", '{"a": 1}\n[1]', "a.jsonl, line 2: is a list, must be an object."),
        ("a.jsonl", '{"a": 1} {"a": 2}', "a.jsonl, line 1: not JSON (Extra data)."),
        ("a.jsonl", FAR + b'{"text": "\xff"}', "a.jsonl, line 1001: not UTF-8 text."),
        ("a.json", b"[\n" + FAR.replace(b"\n", b",\n") + b'{"text": "\xff"}]', "a.json, line 1002: not UTF-8 text."),
        ("a.json", '{"a": 1}\n{"a" 2}', "a.json, line 2: not JSON (Expecting ':' delimiter)."),
        ("a.json", '[{"a": 1},\n {"a": 2}', "a.json, line 2: not JSON (Expecting ',' delimiter)."),
        ("a.json", '[\n{"a": 1}\n]\nmore', "a.json, line 4: not JSON (Extra data)."),
        ("a.json", '[{"a": 1}, 2]', "a.json, row 2: is a int, must be an object."),
        ("a.json", "3", "a.json: holds one int; a list of objects, or one object a line, is needed."),
        ("a.txt", b"fine\n" * 5000 + b"caf\xe9", "a.txt, line 5001: not UTF-8 text."),
        ("a.csv", "x,y", "a.csv: files of kind '.csv' are not read; allowed: .json, .jsonl, .txt."),
        ("a", "x", "a: files of kind '(none)' are not read; allowed: .json, .jsonl, .txt."),
        *((f"a{kind}", blank, f"a{kind}: the file has no rows.") for kind in (".json", ".jsonl", ".txt") for blank in ("", "\n \n")),
        ("a.json", "[]", "a.json: the file has no rows."),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    file = written(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        rows_in(file)
    assert str(error.value) == f"{tmp_path}/{message}"


def test_rows_before_a_broken_line_were_whole(tmp_path):
    read = read_rows([written(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n{')])
    assert [next(read)[2], next(read)[2]] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="line 3"):
        next(read)


def test_problems_names_every_file_at_once(tmp_path):
    good, table = written(tmp_path, "a.jsonl", LINES), written(tmp_path, "a.csv", "x")
    options = DataOptions(train_files=[good, "none.json", str(tmp_path)], eval_files=[table])
    assert problems(options) == [
        "train_files: none.json does not exist; name a .json, .jsonl or .txt file.",
        f"train_files: {tmp_path} is a folder; name a .json, .jsonl or .txt file.",
        f"eval_files: {table} is of kind '.csv'; name a .json, .jsonl or .txt file.",
    ]
    assert problems(DataOptions()) == ["train_files: is missing; name at least one .json, .jsonl or .txt file."]
    assert problems(DataOptions(train_files=[good])) == []


ENCODED = [(1, [5, 6, 7], [-100, 6, 7]), (4, [8], [-100]), (9, [2, 3], [-100, 3])]


def test_rows_lie_flat_and_come_back_one_by_one():
    rows = build_rows(iter(ENCODED))
    assert len(rows) == 3
    assert rows.input_ids.tolist() == [5, 6, 7, 8, 2, 3] and rows.labels.tolist() == [-100, 6, 7, -100, -100, 3]
    assert rows.offsets.tolist() == [0, 3, 4, 6] and rows.lengths.tolist() == [3, 1, 2]
    assert rows.source.tolist() == [1, 4, 9]
    assert [[part.tolist() for part in rows[k]] for k in range(3)] == [[ids, labels] for _, ids, labels in ENCODED]
    assert {name: str(getattr(rows, name).dtype) for name in ARRAYS} == {
        "input_ids": "int32", "labels": "int32", "offsets": "int64", "source": "int64",
    }  # fmt: skip
    assert len(build_rows(iter([]))) == 0


class Builder:
    """Counts how often it is asked to build."""

    def __init__(self, encoded: list[tuple[int, list[int], list[int]]], seconds: float = 0):
        self.encoded, self.seconds, self.calls = encoded, seconds, 0

    def __call__(self) -> tuple[dict[str, Rows], dict[str, Any]]:
        self.calls += 1
        time.sleep(self.seconds)
        parts = {"train": build_rows(iter(self.encoded)), "eval": build_rows(iter(self.encoded[:1]))}
        return parts, {"rows": len(self.encoded)}


def test_the_cache_is_built_once_and_read_from_memory_maps(tmp_path):
    build = Builder(ENCODED)
    for _ in range(2):
        parts, facts = cached(tmp_path / "c" / "key", build)
        assert facts == {"rows": 3} and parts.keys() == {"train", "eval"}
        for name, expected in build()[0].items():
            for array in ARRAYS:
                found = getattr(parts[name], array)
                assert isinstance(found, np.memmap) and not found.flags.writeable
                assert found.dtype == getattr(expected, array).dtype
                assert np.array_equal(found, getattr(expected, array))
        build.calls -= 1
    assert build.calls == 1


def test_another_key_never_meets_it(tmp_path):
    first, second = Builder(ENCODED), Builder(ENCODED[:2])
    assert cached(tmp_path / "a", first)[1] == {"rows": 3}
    assert cached(tmp_path / "b", second)[1] == {"rows": 2}
    assert cached(tmp_path / "a", second)[1] == {"rows": 3}
    assert (first.calls, second.calls) == (1, 1)


def test_parts_without_rows_survive(tmp_path):
    parts, _ = cached(tmp_path / "a", Builder([]))
    assert len(parts["train"]) == 0 and parts["train"].lengths.tolist() == []


@pytest.mark.parametrize("error", [DataError("broken row"), KeyboardInterrupt()])
def test_a_build_that_fails_leaves_nothing_to_be_found(tmp_path, error):
    def build():
        raise error

    with pytest.raises(type(error)):
        cached(tmp_path / "key", build)
    assert [path.name for path in tmp_path.iterdir()] == ["key.lock"]
    assert cached(tmp_path / "key", Builder(ENCODED))[1] == {"rows": 3}


class DiesWhenSaved:
    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise KeyboardInterrupt


def test_a_build_that_dies_while_it_is_written_is_built_again(tmp_path):
    good = build_rows(iter(ENCODED))
    torn = Rows(good.input_ids, good.labels, DiesWhenSaved(), good.source)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "key", lambda: ({"gone": good, "train": torn}, {}))
    left = tmp_path / "key.partial"
    assert not (tmp_path / "key").exists() and (left / "gone" / "labels.npy").is_file()
    parts, facts = cached(tmp_path / "key", Builder(ENCODED))
    assert facts == {"rows": 3} and parts.keys() == {"train", "eval"} and not left.exists()


def test_those_that_come_at_once_build_once(tmp_path):
    build, found = Builder(ENCODED, seconds=0.2), []
    threads = [threading.Thread(target=lambda: found.append(cached(tmp_path / "key", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert build.calls == 1
    assert [parts["train"].input_ids.tolist() for parts, _ in found] == [[5, 6, 7, 8, 2, 3]] * 4


def test_fingerprints_tell_apart_what_differs(tmp_path):
    one, same, other = (
        Path(written(tmp_path, name, text)) for name, text in {"1": "abc", "2": "abc", "3": "abd"}.items()
    )
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    different = [("a", "b"), ("ab",), ("b", "a"), ("a", "b", None), (1, 2), ("1", "2"), (True,), (one,), ("abc",), ()]
    assert len({fingerprint(*parts) for parts in different}) == len(different)
    assert fingerprint("a", 1) == fingerprint("a", 1) and len(fingerprint()) == 24


def test_cache_folder_is_where_the_person_says(tmp_path):
    assert cache_folder(DataOptions(cache_dir=str(tmp_path))) == tmp_path
    assert cache_folder(DataOptions(cache_dir="~/c")) == Path.home() / "c"
    assert cache_folder(DataOptions()).name == "accel_llm"
