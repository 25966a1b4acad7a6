"""chat.py on a pseudo-terminal: line editing, history, pasted texts, Ctrl-C, two answers side by side; and in a pipe."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from screens import Screen, written
from support import ROOT, moved_adapter

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of PEFT's calls to transformers
]
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"


@pytest.fixture(scope="module")
def adapter(make_model, tmp_path_factory) -> Path:
    """An adapter of a base with many positions, which ends no answer by itself."""
    folder = tmp_path_factory.mktemp("run")
    base = make_model(folder / "base", max_position_embeddings=100_000)
    moved_adapter(base, folder / "adapter", by=0.3)
    return folder / "adapter"


def start(adapter: Path, cache: Path, tokens: int, width: int) -> Screen:
    words = ("launch/chat.py", "--model", adapter, "--max_new_tokens", tokens)
    screen = Screen(*words, width=width, XDG_CACHE_HOME=str(cache))
    screen.wait(lambda text: text.endswith("you> "))
    return screen


def test_a_chat_on_a_wide_terminal(adapter, tmp_path):
    saved = tmp_path / "chats.jsonl"
    screen = start(adapter, tmp_path, tokens=6, width=120)
    assert f"[{adapter} on base. On cpu, weights in float32. Greedy. /help lists commands.]" in screen.text
    first = screen.say("What is 3 + 4?")
    assert screen.say("").count("you>") == 1  # nothing was asked
    assert "did you mean /help?" in screen.say("/hepl")
    # Lines between fences, and a pasted text, are one question each.
    screen.type('"""two\n')
    screen.say('lines"""')
    screen.type("\x1b[200~pasted\ntext\x1b[201~")
    screen.say("")
    # The history: the pasted text again, and the line before the two, changed.
    screen.say(UP)
    screen.say(f"{UP * 4}\x7f!")
    compared = screen.say("/base")
    assert "bare model" in compared and "┃" in compared
    screen.say(f"/save {saved}")
    screen.type("/exit\n")
    assert screen.end() == 0
    (row,) = map(json.loads, saved.read_text(encoding="utf-8").splitlines())
    asked = [turn["content"] for turn in row["messages"] if turn["role"] == "user"]
    assert asked == ["What is 3 + 4?", "two\nlines", "pasted\ntext", "pasted\ntext", "What is 3 + 4!"]
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    assert answers[0] in first.replace("\r", "")
    entries = [json.loads(line) for line in written(tmp_path).splitlines()]
    assert entries[0] == "What is 3 + 4?" and "two\nlines" in entries and entries[-1] == "/exit"
    (file,) = tmp_path.rglob("chat_history")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600

    # The next chat knows what was typed in this one.
    screen = start(adapter, tmp_path, tokens=6, width=80)
    screen.say(UP * 4)
    compared = screen.say("/base")
    assert "bare model:" in compared and "┃" not in compared
    screen.type(CTRL_D)
    assert screen.end() == 0


def test_ctrl_c_stops_an_answer_and_twice_ends_the_chat(adapter, tmp_path):
    screen = start(adapter, tmp_path, tokens=90_000, width=80)
    screen.type("Hi\n")
    before = len(screen.text)
    screen.wait(lambda text: len(text) > before + 60)
    screen.type(CTRL_C)
    stopped = screen.wait(lambda text: text.endswith("you> ") and len(text) > before + 60)[before:]
    assert "[Stopped; this part of the answer is kept.]" in stopped
    # What is typed is dropped; at an empty line it says how to end.
    screen.type("draft")
    screen.wait(lambda text: text.endswith("you> draft"))
    screen.type(CTRL_C)
    screen.wait(lambda text: re.search(r"you> draft(\^C)?\nyou> $", text))
    screen.type(CTRL_C)
    screen.wait(lambda text: text.endswith("[Ctrl-C again, or Ctrl-D, ends.]\nyou> "))
    screen.type(CTRL_C)
    assert screen.end() == 0


def test_a_pipe_gets_the_answers_alone(adapter, tmp_path):
    command = [sys.executable, "launch/chat.py", "--model", str(adapter), "--max_new_tokens", "6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path)}
    asked = subprocess.run(
        command, input=b'Hi\n\n"""two\nlines"""\n/retry\n', cwd=ROOT, env=environment, capture_output=True, check=True
    )
    answers = asked.stdout.decode().split("\n")
    assert len(answers) == 4 and answers[1] == answers[2] and answers[3] == "" and all(answers[:3])
    assert b"you>" not in asked.stderr and b"\x1b" not in asked.stdout + asked.stderr
    assert not list(tmp_path.rglob("chat_history"))
