"""Names of files and folders: the home folder, and why there is nothing at a place."""

from pathlib import Path

import pytest

from accel_llm.system.places import close_path, expand_home, is_there, missing_reason

ODD_NAMES = ["with space", "日本語", "#1", "[x]", "-dash", "~tilde", "$HOME", "a'b\"c", "two\nlines", "%s {}", "*"]


def test_only_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/of")
    assert expand_home("~") == "/home/of" and expand_home("~/a b/c") == "/home/of/a b/c"
    assert expand_home("~root").startswith("/")
    for name in ("./~/a", "a~", "a/~/b", "owner/name", "~nobody has this name/a", ""):
        assert expand_home(name) == name


@pytest.mark.parametrize("name", ODD_NAMES)
def test_an_odd_name_is_a_name(tmp_path, name):
    assert missing_reason(tmp_path / name) == "does not exist"
    (tmp_path / name).mkdir()
    assert missing_reason(tmp_path / name) == missing_reason(f"{tmp_path / name}/") == ""


def test_links_that_lead_nowhere_are_named(tmp_path):
    dangling, circle = tmp_path / "model", tmp_path / "circle"
    dangling.symlink_to("gone/away")
    circle.symlink_to("circle")
    link = "a symbolic link to gone/away, which does not exist"
    assert missing_reason(dangling) == f"is {link}"
    assert missing_reason(dangling / "adapter") == f"does not exist, because {dangling} is {link}"
    assert missing_reason(circle) == "cannot be read (Too many levels of symbolic links)"
    (tmp_path / "gone" / "away").mkdir(parents=True)
    assert missing_reason(dangling) == ""


def test_names_that_no_file_can_have(tmp_path):
    assert missing_reason(tmp_path / ("x" * 300)) == "cannot be read (File name too long)"
    assert missing_reason("a\0b") == "cannot be the name of a file"
    assert not is_there("x" * 300) and not is_there("a\0b")
    (tmp_path / "file").touch()
    assert missing_reason(tmp_path / "file" / "x") == "does not exist"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("output/chats/modle", "output/chats/model"),
        ("ouptut/chats/model", "output/chats/model"),
        ("Output/Chats/Model", "output/chats/model"),
        ("output/chat", "output/chats"),
        ("train.json", "train.jsonl"),
        ("train-2.jsonl", None),  # another number is another file
        ("output/chats/weights", None),
        ("tain", None),
        ("hiden", None),
        ("train.jsonl/model", None),
        ("nowhere/chats/model", None),
    ],
)
def test_a_misspelt_path_names_the_one_that_is_meant(tmp_path, monkeypatch, typed, meant):
    (tmp_path / "output" / "chats" / "model").mkdir(parents=True)
    for name in ("train.jsonl", "train-1.jsonl", ".hidden", "main"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert close_path(Path(typed)) == (Path(meant) if meant else None)
    assert missing_reason(typed) == (f"does not exist, but {meant} does" if meant else "does not exist")
    assert close_path(tmp_path / typed) == (tmp_path / meant if meant else None)
