"""Rows from every kind of source, the errors of bad sources, and what makes a source a different one."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data import hub, standard_input
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.sources import ALLOWED_SOURCES, RawRow, as_source, read_source, source_identity, source_problems
from accel_llm.errors import DataError

REAL = Path(__file__).parents[3] / "shared" / "data"


def write_texts(path: Path, *texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def texts(place: object, **about: Any) -> list[str]:
    return [row.fields["text"] for row in read_source(Source(path=str(place), **about))]


def test_a_row_has_its_file_and_number(tmp_path):
    first, second = write_texts(tmp_path / "a.jsonl", "x", "y"), write_texts(tmp_path / "b.jsonl", "z")
    assert list(read_source(as_source(str(tmp_path)))) == [
        RawRow(str(first), 1, {"text": "x"}),
        RawRow(str(first), 2, {"text": "y"}),
        RawRow(str(second), 1, {"text": "z"}),
    ]
    source = Source(path="a.jsonl", weight=2)
    assert as_source(source) is source and as_source("a.jsonl") == Source(path="a.jsonl")


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "data [1]"
    write_texts(root / "b.jsonl", "b")
    write_texts(root / "a" / "z.JSONL", "z")
    (root / "a" / "deep").mkdir()
    (root / "a" / "deep" / "t.csv").write_text("text\nt\n", encoding="utf-8")
    (root / "a" / "y.txt").write_text("y\n", encoding="utf-8")
    (root / "README.md").write_text("no data", encoding="utf-8")
    (root / "t.parquet.gz").write_bytes(b"")
    write_texts(root / ".hidden.jsonl", "hidden")
    write_texts(root / ".cache" / "c.jsonl", "hidden")
    return root


def test_a_folder_is_all_files_below_it_sorted_but_for_hidden_ones(folder):
    assert texts(folder) == texts(f"{folder}/") == ["t", "y", "z", "b"]
    assert next(read_source(as_source(str(folder)))).file == str(folder / "a" / "deep" / "t.csv")


def test_a_hidden_folder_can_be_named(folder):
    assert texts(folder / ".cache") == ["hidden"] and texts(folder / ".hidden.jsonl") == ["hidden"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*", ["b"]),
        ("*.jsonl", ["b"]),
        ("a/*", ["y", "z"]),
        ("**", ["t", "y", "z", "b"]),
        ("**/*.jsonl", ["b"]),
        ("**/[yt].*", ["t", "y"]),
        ("?.jsonl", ["b"]),
    ],
)
def test_a_glob_is_sorted(folder, monkeypatch, pattern, expected):
    monkeypatch.chdir(folder)
    assert texts(pattern) == expected


def test_home_is_expanded_and_a_name_with_brackets_is_a_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_texts(tmp_path / "rows[1].jsonl", "x")
    write_texts(tmp_path / "rows1.jsonl", "y")
    assert texts("~/rows[1].jsonl") == ["x"]
    assert texts("~/rows?.jsonl") == ["y"] and texts("~") == ["y", "x"]


def test_limit_counts_the_rows_of_all_files_and_opens_no_more(tmp_path):
    write_texts(tmp_path / "a.jsonl", "a", "b")
    write_texts(tmp_path / "b.jsonl", "c", "d")
    (tmp_path / "c.jsonl").write_text("{", encoding="utf-8")
    for limit in range(1, 5):
        assert texts(tmp_path, limit_rows=limit) == ["a", "b", "c", "d"][:limit]
    with pytest.raises(DataError, match=r"c\.jsonl, line 1: not JSON"):
        texts(tmp_path, limit_rows=5)
    (tmp_path / "c.jsonl").unlink()
    assert texts(tmp_path, limit_rows=100) == ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def saved_datasets(tmp_path_factory) -> Path:
    """Saved datasets: `one` has one split, `two` has two; both have a column of mixed types."""
    root = tmp_path_factory.mktemp("saved")
    rows = [{"text": str(n), "x": [n, {"a": n}][n % 2]} for n in range(600)]
    datasets.disable_progress_bars()
    features = datasets.Features({"text": datasets.Value("string"), "x": datasets.Json()})
    one = datasets.Dataset.from_list(rows, features=features)
    one.save_to_disk(root / "one")
    datasets.DatasetDict(train=one, test=one.select([7, 3])).save_to_disk(root / "two")
    one.select([]).save_to_disk(root / "empty", num_shards=1)
    return root


def test_a_saved_dataset_is_read_with_its_split(saved_datasets):
    rows = list(read_source(Source(path=str(saved_datasets / "two"))))
    assert rows[0] == RawRow(str(saved_datasets / "two"), 1, {"text": "0", "x": 0})
    assert rows[599] == RawRow(str(saved_datasets / "two"), 600, {"text": "599", "x": {"a": 599}})
    assert [tuple(row) for row in read_source(Source(path=str(saved_datasets / "two"), split="test"))] == [
        (f"{saved_datasets}/two:test", 1, {"text": "7", "x": {"a": 7}}),
        (f"{saved_datasets}/two:test", 2, {"text": "3", "x": {"a": 3}}),
    ]
    assert (
        texts(saved_datasets / "one") == texts(saved_datasets / "two" / "train") == [row.fields["text"] for row in rows]
    )
    assert texts(saved_datasets / "two", limit_rows=300) == [str(n) for n in range(300)]
    with pytest.raises(DataError, match=r"/empty: the dataset has no rows\.$"):
        texts(saved_datasets / "empty")


@pytest.mark.parametrize(
    "split, by_default",
    [
        *[(name, True) for name in ("train", "train[:10%]", "chats", None)],
        *[(name, False) for name in ("test", "validation", "test_sft", "train+test", "dev[:5]")],
    ],
)
def test_a_saved_dataset_for_a_test_is_read_only_if_its_split_is_said(tmp_path, split, by_default):
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": ["x"]}, split=split and datasets.NamedSplit(split)).save_to_disk(tmp_path)
    assert texts(tmp_path, split=split or "train") == ["x"]
    if by_default:
        assert texts(tmp_path) == ["x"]
        return
    for look in (read_source, source_identity):
        with pytest.raises(DataError) as error:
            look(Source(path=str(tmp_path)))
        sentence = f"{tmp_path} has no split 'train'; it has {split}; set split to one of them."
        assert str(error.value) == sentence


def test_saved_datasets_without_a_train_split_are_listed(tmp_path):
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict(test=rows, validation=rows).save_to_disk(tmp_path)
    with pytest.raises(DataError) as error:
        read_source(Source(path=str(tmp_path)))
    sentence = f"{tmp_path} has no split 'train'; it has test, validation; set split to one of them."
    assert str(error.value) == sentence


def test_a_damaged_saved_dataset_is_named(saved_datasets, tmp_path):
    place = tmp_path / "one"
    datasets.load_from_disk(saved_datasets / "one").select([0]).save_to_disk(place)
    next(place.glob("*.arrow")).write_bytes(b"no arrow")
    with pytest.raises(DataError, match=rf"^{place}: cannot be read \(.+\)\.$"):
        list(read_source(as_source(str(place))))
    for broken, fault in (("{}", r"KeyError: '_split'"), ("[]", "TypeError: .*"), ("{", "JSONDecodeError: .*")):
        (place / "state.json").write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=rf"state\.json was not written by datasets \({fault}\)\.$"):
            read_source(as_source(str(place)))


@pytest.fixture(scope="module")
def cached_hub(tmp_path_factory) -> Path:
    """The cache of `datasets` after a download of `owner/talk`, with the configurations `en` and `zh`."""
    root = tmp_path_factory.mktemp("hub")
    card = ["---", "configs:"]
    for name in ("en", "zh"):
        write_texts(root / "talk" / f"{name}.jsonl", f"{name} 1", f"{name} 2")
        write_texts(root / "talk" / f"{name}_test.jsonl", f"{name} test")
        card += [f"- config_name: {name}", "  data_files:"]
        card += [f"  - {{split: train, path: {name}.jsonl}}", f"  - {{split: test, path: {name}_test.jsonl}}"]
    (root / "talk" / "README.md").write_text("\n".join([*card, "---"]), encoding="utf-8")
    datasets.disable_progress_bars()
    for name in ("en", "zh"):
        datasets.load_dataset(str(root / "talk"), name, cache_dir=str(root / "cache"))
    (root / "cache" / "talk").rename(root / "cache" / "owner___talk")
    return root / "cache"


@pytest.fixture
def offline(monkeypatch, tmp_path, cached_hub) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cached_hub)
    monkeypatch.chdir(tmp_path)
    hub.load_hub_dataset.cache_clear()


def test_a_hub_dataset_is_read_with_its_configuration_and_split(offline):
    assert list(read_source(Source(path="owner/talk", name="en"))) == [
        RawRow("owner/talk:en", 1, {"text": "en 1"}),
        RawRow("owner/talk:en", 2, {"text": "en 2"}),
    ]
    assert texts("owner/talk", name="zh", split="test") == ["zh test"]
    assert texts("owner/talk", name="zh", split="train[1:]") == ["zh 2"]
    parts: list[dict[str, Any]] = [{"name": "en"}, {"name": "zh"}, {"name": "en", "split": "test"}]
    assert len({data_fingerprint(source_identity(Source(path="owner/talk", **part))) for part in parts}) == 3
    revision = next(Path(datasets.config.HF_DATASETS_CACHE).glob("owner___talk/en/*/*/")).name
    assert texts("owner/talk", name="en", revision=revision) == ["en 1", "en 2"]


@pytest.mark.parametrize(
    "source, label, detail",
    [
        ({"path": "owner/talk"}, "owner/talk", "en, zh"),
        ({"path": "owner/talk", "name": "fr"}, "owner/talk:fr", "['en', 'zh']"),
        ({"path": "owner/talk", "name": "en", "revision": "v1"}, "owner/talk:en", "whether it is 'v1'"),
        ({"path": "nobody/none"}, "nobody/none", "Couldn't reach 'nobody/none' on the Hub"),
        ({"path": "none"}, "none", "Couldn't reach 'none' on the Hub"),
    ],
)
def test_a_missing_hub_dataset_is_reported_in_one_sentence(offline, source, label, detail):
    assert source_problems(DataOptions(train_files=[Source(**source)])) == []
    for look in (lambda source: list(read_source(source)), source_identity):
        with pytest.raises(DataError) as error:
            look(Source(**source))
        sentence = str(error.value)
        assert sentence.startswith(f"{label}: no file or folder has this name, and the hub gives no such dataset (")
        assert detail in sentence and "\n" not in sentence and sentence.endswith(").")


@pytest.mark.parametrize("split", ["dev", "train+dev", "train[:1]+dev[50%:]", "dev(33%)"])
def test_a_missing_split_of_a_hub_dataset_gives_the_list_of_its_splits(offline, split):
    for look in (lambda source: list(read_source(source)), source_identity):
        with pytest.raises(DataError) as error:
            look(Source(path="owner/talk", name="en", split=split))
        sentence = f"owner/talk:en has no split {split!r}; it has train, test; set split to one of them."
        assert str(error.value) == sentence
    assert texts("owner/talk", name="en", split="train+test") == ["en 1", "en 2", "en test"]


def test_a_hub_dataset_without_a_train_split_is_not_read_in_silence(offline, tmp_path, monkeypatch, cached_hub):
    write_texts(tmp_path / "quiz" / "test.jsonl", "question")
    write_texts(tmp_path / "quiz" / "dev.jsonl", "try")
    datasets.load_dataset(str(tmp_path / "quiz"), cache_dir=str(tmp_path / "cache"))
    (tmp_path / "cache" / "quiz").rename(tmp_path / "cache" / "owner___quiz")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(DataError) as error:
        read_source(Source(path="owner/quiz")).__next__()
    sentence = "owner/quiz has no split 'train'; it has validation, test; set split to one of them."
    assert str(error.value) == sentence
    assert texts("owner/quiz", split="test") == ["question"]


def test_a_local_folder_comes_before_the_hub(offline, tmp_path):
    write_texts(tmp_path / "owner" / "talk" / "a.jsonl", "local")
    assert texts("owner/talk") == ["local"]


MISTAKES = [
    ("", "'' is no path; name {ALLOWED}."),
    ("none.json", "none.json does not exist; name {ALLOWED}."),
    ("none.csv.zst", "none.csv.zst does not exist; name {ALLOWED}."),
    ("./none", "./none does not exist; name {ALLOWED}."),
    ("~nobody-of-this-name/x", "~nobody-of-this-name/x does not exist; name {ALLOWED}."),
    ("/no/thing", "/no/thing does not exist; name {ALLOWED}."),
    ("a/b/c", "a/b/c does not exist; name {ALLOWED}."),
    ("two words", "two words does not exist; name {ALLOWED}."),
    ("none/*.jsonl", "none/*.jsonl matches no file that can be read; name {ALLOWED}."),
    ("*.md", "*.md matches no file that can be read; name {ALLOWED}."),
    ("empty", "empty is a folder and holds no file that can be read; name {ALLOWED}."),
    ("a.md", "a.md is of kind '.md'; name {ALLOWED}."),
    ("bare", "bare is of kind '(none)'; name {ALLOWED}."),
    ("a.tar.gz", "a.tar.gz is of kind '.tar.gz'; name {ALLOWED}."),
    ("a.parquet.gz", "a.parquet.gz is a compressed .parquet file; decompress it, .parquet is compressed by itself."),
    ("https://x.org/a.json", "https://x.org/a.json is an address, and addresses cannot be read; download the file and name it."),
    ("s3://bucket/a.jsonl", "s3://bucket/a.jsonl is an address, and addresses cannot be read; download the file and name it."),
    ("json", "json is a kind of file, not a dataset; name {ALLOWED}."),
    ({"path": "a.jsonl", "split": "test"}, "a.jsonl takes no split, found 'test'; only a folder or glob or saved dataset or hub dataset has one."),
    ({"path": "*.jsonl", "name": "en"}, "*.jsonl takes no name, found 'en'; only a hub dataset has one."),
    ({"path": "two", "revision": "v1"}, "two takes no revision, found 'v1'; only a hub dataset has one."),
    ({"path": "-", "split": "test"}, "- takes no split, found 'test'; only a folder or glob or saved dataset or hub dataset has one."),
    ({"path": "two", "split": "dev"}, "two has no split 'dev'; it has train, test; set split to one of them."),
    ({"path": "one", "split": "test"}, "one has no split 'test'; it has train; set split to one of them."),
    (".", ". holds the saved dataset one; name each saved dataset by itself."),
]  # fmt: skip


def test_source_problems_names_every_mistake_at_once(tmp_path, saved_datasets, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.md", "bare", "a.tar.gz", "a.parquet.gz"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "empty" / "inside").mkdir(parents=True)
    write_texts(tmp_path / "a.jsonl", "x")
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(saved_datasets / name)
    places = [Source(**place) if isinstance(place, dict) else place for place, _ in MISTAKES]
    expected = [sentence.replace("{ALLOWED}", ALLOWED_SOURCES) for _, sentence in MISTAKES]
    assert source_problems(DataOptions(train_files=places)) == [f"train_files: {sentence}" for sentence in expected]
    assert source_problems(DataOptions(train_files=["a.jsonl"], eval_files=["a.md"])) == [
        f"eval_files: a.md is of kind '.md'; name {ALLOWED_SOURCES}."
    ]
    for place, sentence in zip(places, expected, strict=True):
        for look in (read_source, source_identity):  # without asking for problems first
            with pytest.raises(DataError) as error:
                look(as_source(place))
            assert str(error.value) == sentence
    right = ["a.jsonl", "*.jsonl", Source(path="two", split="test"), Source(path="one", split="train"), "owner/name"]
    assert source_problems(DataOptions(train_files=right)) == []
    assert source_problems(DataOptions()) == [f"train_files: is missing; name at least one source: {ALLOWED_SOURCES}."]


def test_a_misspelt_source_is_found_before_the_hub_is_asked(tmp_path, monkeypatch):
    def ask() -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "ask_hub", ask)
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "data" / "chats.jsonl", "x")
    (tmp_path / "data" / "held_out").mkdir()
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    reasons = {
        "data/chat.jsonl": "does not exist, but data/chats.jsonl does",
        "data/heldout": "does not exist, but data/held_out does",
        "data/evaluation": "does not exist in the folder data "
        "(to take this name from the hub, start in another folder)",
        "link.jsonl": "is a symbolic link to gone.jsonl, which does not exist",
        "x" * 300: "cannot be read (File name too long)",
    }
    for place, reason in reasons.items():
        with pytest.raises(DataError) as error:
            texts(place)
        assert str(error.value) == f"{place} {reason}; name {ALLOWED_SOURCES}."


@pytest.mark.parametrize("name", ["with space", "日本", "#1", "[ab]", "-dash", "a*b", "?", "{x}", "$HOME", "'\""])
def test_odd_names_of_folders_and_files_are_names(tmp_path, monkeypatch, name):
    write_texts(tmp_path / "data" / name / f"{name}.jsonl", "x")
    write_texts(tmp_path / "data" / "a" / "other.jsonl", "y")
    monkeypatch.chdir(tmp_path / "data")
    for place in (name, f"{name}/", f"{name}/{name}.jsonl", f"./{name}", f"{name}/*.jsonl", f"{name}/**/*.jsonl"):
        assert texts(place) == ["x"], place
    assert texts(".") == texts("*/*.jsonl") != ["x"]


def test_a_link_that_leads_nowhere_is_no_file_less(tmp_path):
    """glob leaves it out, so its rows would be missing without a word."""
    write_texts(tmp_path / "a.jsonl", "x")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "notes.md").symlink_to("gone.md")
    for place in (tmp_path, tmp_path / "*.jsonl"):
        with pytest.raises(DataError) as error:
            texts(place)
        assert str(error.value) == (
            f"{place}: its file {tmp_path / 'b.jsonl'} is a symbolic link to gone.jsonl, which does not exist; repair or "
            "remove it."
        )
    write_texts(tmp_path / "gone.jsonl", "z")
    assert texts(tmp_path) == ["x", "z", "z"]


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    """glob follows such a link forty times, so each row would be trained forty times."""
    write_texts(tmp_path / "data" / "a.jsonl", "x")
    write_texts(tmp_path / "data" / "in" / "b.jsonl", "y")
    write_texts(tmp_path / "elsewhere" / "c.jsonl", "z")
    (tmp_path / "data" / "again").symlink_to(".")
    (tmp_path / "data" / "in" / "up").symlink_to("..")
    (tmp_path / "data" / "more").symlink_to("../elsewhere")
    (tmp_path / "link").symlink_to("data")
    for place in ("data", "link"):
        assert texts(tmp_path / place) == ["x", "y", "z"], place
    # A `**` follows each link itself; two of them would take it hours.
    write_texts(tmp_path / "one" / "a.jsonl", "x")
    (tmp_path / "one" / "again").symlink_to(".")
    assert texts(tmp_path / "one" / "**" / "*.jsonl") == ["x"]


def test_identity_is_of_the_content_and_its_order(tmp_path, saved_datasets):
    write_texts(tmp_path / "a.jsonl", "x")
    write_texts(tmp_path / "b.jsonl", "y")

    def identity(**about: Any) -> str:
        return data_fingerprint(source_identity(Source(path=str(tmp_path), **about)))

    first = identity()
    assert identity() == first == identity(limit_rows=1, weight=2)
    assert source_identity(Source(path=str(tmp_path)))[0] == (
        f"{tmp_path}/a.jsonl",
        data_fingerprint(tmp_path / "a.jsonl"),
    )
    identities = {first}
    write_texts(tmp_path / "b.jsonl", "Y")
    identities.add(identity())
    (tmp_path / "b.jsonl").rename(tmp_path / "A.jsonl")
    identities.add(identity())
    write_texts(tmp_path / "c.jsonl", "z")
    identities.add(identity())
    assert len(identities) == 4
    (tmp_path / "README.md").write_text("no rows", encoding="utf-8")
    assert identity() in identities
    parts = [source_identity(Source(path=str(saved_datasets / "two"), split=split)) for split in ("train", "test")]
    assert parts[0] != parts[1] and len(parts[0]) == 3


def test_a_changed_byte_of_a_saved_dataset_is_another_source(saved_datasets, tmp_path):
    datasets.load_from_disk(saved_datasets / "one").select([0]).save_to_disk(tmp_path / "one")
    before = source_identity(Source(path=str(tmp_path / "one")))
    arrow = next((tmp_path / "one").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes() + b"\0")
    assert source_identity(Source(path=str(tmp_path / "one"))) != before


def test_fingerprint_depends_on_the_borders_between_its_parts(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    assert (
        len(
            {
                data_fingerprint("ab", "c"),
                data_fingerprint("a", "bc"),
                data_fingerprint("abc"),
                data_fingerprint(tmp_path / "a"),
            }
        )
        == 4
    )
    assert data_fingerprint(tmp_path / "a") == data_fingerprint(tmp_path / "a")


@pytest.fixture
def piped_source(tmp_path, monkeypatch):
    monkeypatch.setattr(standard_input, "HF_HOME", str(tmp_path / "home"))
    with write_texts(tmp_path / "in", "x", "y").open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield tmp_path / "home" / "accel_llm" / "stdin"


def test_standard_input_is_kept_in_a_file_to_be_read_again(piped_source):
    assert source_problems(DataOptions(train_files=["-"])) == []
    assert list(read_source(as_source("-"))) == [
        RawRow("standard input", 1, {"text": "x"}),
        RawRow("standard input", 2, {"text": "y"}),
    ]
    assert texts("-", limit_rows=1) == ["x"]
    spool = next(piped_source.glob("*/*.jsonl"))
    assert source_identity(as_source("-")) == [("standard input", data_fingerprint(spool))]
    assert spool.name.startswith(f"{os.getpid()}-") and str(hash(psutil.Process())) in spool.name


def test_standard_input_of_ended_runs_is_removed(piped_source):
    assert texts("-", limit_rows=1) == ["x"]
    spool = next(piped_source.glob("*/*.jsonl"))
    ended, alive = spool.with_name("4194305-1.jsonl"), spool.with_name(f"{os.getppid()}-1.jsonl")  # no id is so large
    spool.unlink()
    ended.write_text("{}", encoding="utf-8")
    alive.write_text("{}", encoding="utf-8")
    sys.stdin.seek(0)
    assert texts("-") == ["x", "y"]
    assert not ended.exists() and alive.exists()


def test_standard_input_without_rows_or_with_a_broken_one_is_named(piped_source, tmp_path):
    list(read_source(as_source("-")))
    spool = next(piped_source.glob("*/*.jsonl"))
    spool.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"^standard input: the file has no rows\.$"):
        texts("-")
    spool.write_text('{"text": "x"}\n{', encoding="utf-8")
    with pytest.raises(DataError, match=r"^standard input, line 2: not JSON"):
        texts("-")


def test_a_terminal_as_standard_input_is_an_error(monkeypatch):
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        sentence = "- is standard input, and nothing is piped into it; give it JSON lines or name a file."
        assert source_problems(DataOptions(train_files=["-"])) == [f"train_files: {sentence}"]
        with pytest.raises(DataError) as error:
            read_source(as_source("-"))
        assert str(error.value) == sentence
    os.close(ours)


def test_processes_of_a_launch_share_one_pipe(tmp_path):
    code = "from accel_llm.data.sources import as_source, read_source\nfor row in read_source(as_source('-')): print(row.fields['text'])"
    lines = [f"{n} " + "x" * 100 for n in range(2000)]  # more than a pipe holds
    end, start = os.pipe()
    environment = {**os.environ, "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=end, stdout=subprocess.PIPE, env={**environment, "RANK": str(rank)}
        )
        for rank in range(2)
    ]
    os.close(end)
    with os.fdopen(start, "w") as pipe:
        pipe.writelines(json.dumps({"text": line}) + "\n" for line in lines)
    for rank in ranks:
        assert rank.communicate()[0].decode().splitlines() == lines
        assert rank.returncode == 0


INSTRUCT = {
    "alpaca_en_demo.json": 999,
    "alpaca_zh_demo.json": 1000,
    "axolotl_conversation.json": 1,
    "axolotl_conversation.missingturns.json": 1,
    "belle_format_from_sharegpt_zh_100.jsonl": 100,
    "belle_readme_conversations.jsonl": 2,
    "dummy_conversation.json": 500,
    "glaive_toolcall_en_demo.json": 300,
    "identity.json": 91,
    "ms-swift/alpaca.csv": 3,
    "ms-swift/alpaca.jsonl": 3,
    "ms-swift/chatml.jsonl": 3,
    "ms-swift/conversations.jsonl": 3,
    "ms-swift/sharegpt.jsonl": 3,
    "ms-swift/swift_multi.json": 3,
    "ms-swift/swift_multi.jsonl": 3,
    "ms-swift/swift_pre.jsonl": 3,
    "ms-swift/swift_single.csv": 3,
    "ms-swift/swift_single.jsonl": 3,
    "reason_tool_use_demo_50.jsonl": 50,
    "v1_sft_demo.jsonl": 500,
}


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the data kept beside the project")
def test_real_files_give_all_their_rows():
    folder = REAL / "instruct"
    counts = Counter(row.file for row in read_source(as_source(str(folder))))
    assert {str(Path(file).relative_to(folder)): count for file, count in counts.items()} == INSTRUCT
    assert [row.fields for row in read_source(as_source(str(folder / "ms-swift" / "alpaca.csv")))] == [
        {"system": "00000", "instruction": "11111", "input": "22222", "output": "3.3"},
        {"system": None, "instruction": "aaaaa", "input": None, "output": "ccccc"},
        {"system": None, "instruction": "AAAAA", "input": "BBBBB", "output": "CCCCC"},
    ]
    assert sum(1 for _ in read_source(as_source(str(REAL / "seqcls" / "*.csv")))) == 7169
    assert sum(1 for _ in read_source(as_source(str(REAL / "seqcls" / "SST-2" / "dev.tsv")))) == 872
