"""Lines that a person types, or that come through a pipe: texts of several lines, the end, and the history."""

import json
import stat
from pathlib import Path

import pytest

from accel_llm.system import line_input
from accel_llm.system.line_input import KEPT_ENTRIES, LineInput, history_path


def read_all(monkeypatch, tmp_path: Path, *lines: str) -> list[str]:
    """Return the texts of these lines, which come through a pipe."""
    left = list(lines)

    def next_line(prompt: str = "") -> str:
        assert prompt == ""  # nobody reads a prompt
        if not left:
            raise EOFError
        return left.pop(0)

    monkeypatch.setattr("builtins.input", next_line)
    reader, texts = LineInput(tmp_path / "history"), []
    while (text := reader.read("you> ")) is not None:
        texts.append(text)
    assert not (tmp_path / "history").exists()
    return texts


def test_lines_and_texts_of_several_lines(monkeypatch, tmp_path):
    assert read_all(monkeypatch, tmp_path) == []
    assert read_all(monkeypatch, tmp_path, " a ", "", "b \\") == ["a", "", "b \\"]
    assert read_all(monkeypatch, tmp_path, '"""one', "", '  two"""', "three") == ["one\n\n  two", "three"]
    assert read_all(monkeypatch, tmp_path, '"""', "one", '"""') == ["one"]
    assert read_all(monkeypatch, tmp_path, '"""one"""', 'say """', '"""') == ["one", 'say """', ""]
    # The end of the input ends a text that is begun.
    assert read_all(monkeypatch, tmp_path, '"""one', "two") == ["one\ntwo"]
    # A pasted text is taken as it is.
    assert read_all(monkeypatch, tmp_path, '"""doc"""\ncode\n') == ['"""doc"""\ncode']
    assert read_all(monkeypatch, tmp_path, "caf\udce9") == ["caf\ufffd"]


def test_ctrl_c_while_a_pipe_is_read_ends_the_program(monkeypatch, tmp_path):
    def interrupted() -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    with pytest.raises(KeyboardInterrupt):
        LineInput(tmp_path / "history").read("you> ")


def test_the_history_is_private_bounded_and_survives_broken_lines(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = history_path()
    assert path == tmp_path / "accel_llm" / "chat_history"
    assert line_input._load_history(path) == []
    path.parent.mkdir()
    lines = [json.dumps(f"question {k}\n中") for k in range(KEPT_ENTRIES + 5)]
    path.write_text("\n".join([*lines, "broken", "5"]) + "\n", encoding="utf-8")
    path.chmod(0o644)
    entries = line_input._load_history(path)
    assert entries == [f"question {k}\n中" for k in range(7, KEPT_ENTRIES + 5)]
    assert len(path.read_text(encoding="utf-8").splitlines()) == KEPT_ENTRIES
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]
