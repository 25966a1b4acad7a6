"""Bars: what a terminal shows, what a log gets, and that nothing is left of them at the end."""

import io
import itertools
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from accel_llm.system import progress
from accel_llm.system.progress import Bar, close_display, format_seconds, shown, tracked

ROOT = Path(__file__).parents[2]
SILENCE = 3.0  # seconds


@pytest.fixture
def screen(monkeypatch):
    text = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=text, force_terminal=True, width=100, highlight=False))
    yield text
    close_display()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0, "0:00"), (7.4, "0:07"), (187, "3:07"), (7451, "2:04:11"), (90_000, "1 day 1:00:00")],
)
def test_times_are_written_as_people_write_them(seconds, text):
    assert format_seconds(seconds) == text


def test_bars_stand_below_each_other_and_leave_nothing(screen):
    with Bar("train", 1200, 300) as outer:
        outer.update(301, "epoch 0.25")
        assert [*tracked(range(3), "evaluate")] == [0, 1, 2]
        print("a line between")  # above the bars, by the same console
        progress._display.refresh()
        assert "301/1,200" in screen.getvalue() and "epoch 0.25" in screen.getvalue()
    assert progress._display is None
    shown_text = screen.getvalue()
    assert "evaluate" in shown_text and "a line between\n" in shown_text
    assert shown_text.rindex("\x1b[?25h") > shown_text.rindex("\x1b[?25l")  # the cursor is there again


def test_a_function_has_a_bar_also_when_it_fails(screen):
    @shown("load")
    def load(value: int) -> int:
        progress._display.refresh()
        return 6 // value

    assert load(2) == 3 and "load" in screen.getvalue()
    with pytest.raises(ZeroDivisionError):
        load(0)
    assert progress._display is None


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    bar, silent, train = Bar("encode", 1000), Bar("load"), Bar("train", 10, logged=False)
    for second in range(0, 100, 5):
        now[0] = second
        for each in (bar, silent, train):
            each.update(second * 10 // (1 if each is bar else 100))
    assert capsys.readouterr().out.splitlines() == [
        "encode: 350 of 1,000, 1:05 left",
        "encode: 700 of 1,000, 0:30 left",
    ]


def test_other_processes_show_nothing(monkeypatch, screen, capsys):
    monkeypatch.setenv("RANK", "1")
    assert [*tracked([1, 2], "evaluate")] == [1, 2]
    assert screen.getvalue() == "" and capsys.readouterr().out == ""


def output_of_terminal(
    command: list[str], folder: Path, code: int = 0, ctrl_c_at: bytes = b""
) -> list[tuple[float, bytes]]:
    """Run a command in a pseudo-terminal; return what it wrote, each part with its time since the start.

    With `ctrl_c_at` it is interrupted once it has written that.
    """
    leader, follower = pty.openpty()
    start = time.monotonic()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "HF_HOME": str(folder / "hf")}
    process = subprocess.Popen(command, cwd=ROOT, stdin=follower, stdout=follower, stderr=follower, env=environment)
    os.close(follower)
    parts = []
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        parts.append((time.monotonic() - start, part))
        if ctrl_c_at and ctrl_c_at in part:
            process.send_signal(signal.SIGINT)
            ctrl_c_at = b""
    os.close(leader)
    assert process.wait() == code, b"".join(part for _, part in parts).decode()
    return parts


def test_ctrl_c_while_libraries_are_imported_gives_the_cursor_back(tmp_path):
    command = [sys.executable, "launch/sft.py", "--max_steps", "1"]
    parts = output_of_terminal(command, tmp_path, -signal.SIGINT, b"import libraries")
    text = b"".join(part for _, part in parts)
    assert text.rindex(b"\x1b[?25h") > text.rindex(b"\x1b[?25l")


@pytest.mark.long
def test_no_phase_of_a_run_is_silent_on_a_terminal(tmp_path):
    words = ["--model_name_or_path", "demo", "--train_files", "demo", "--eval_files", "demo", "--eval_generate", "8"]
    words += ["--max_steps", "4", "--eval_steps", "2", "--max_length", "128", "--output_dir", str(tmp_path / "out")]
    parts = output_of_terminal([sys.executable, "launch/sft.py", *words], tmp_path)
    times = [0.0, *(moment for moment, _ in parts)]
    gaps = [(after - before, before) for before, after in itertools.pairwise(times)]
    assert max(gaps)[0] < SILENCE, max(gaps)
    text = b"".join(part for _, part in parts).decode()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for name in (
        "import libraries",
        "encode rows",
        "load model",
        "check model",
        "train",
        "evaluate",
        "generate",
        "export",
    ):
        assert f"{name} " in plain, name
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
