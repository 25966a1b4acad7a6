"""show_data.py: rows and ledger, with --json and when piped; rows of plain text need no chat template."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from accel_llm.errors import ConfigError, DataError


def write_rows(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


CHAT = {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}


@pytest.fixture
def bare(tiny, tmp_path) -> Path:
    """A tokenizer without a chat template."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in tiny.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def test_rows_of_plain_text_need_no_template(script, bare, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", {"text": "one"}, {"text": "two"})
    script("show_data", "--tokenizer_name", bare, "--train_files", rows, "--max_length", 128, "--json")
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["file"], row["row"], row["text"].split("<")[0]) for row in shown] == [
        (str(rows), 1, "one"),
        (str(rows), 2, "two"),
    ]
    script("show_data", "--tokenizer_name", bare, "--train_files", rows, "--max_length", 128)
    assert "one" in capsys.readouterr().out


def test_a_conversation_without_a_template_is_named_with_file_and_row(script, bare, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", {"text": "one"}, CHAT)
    with pytest.raises(DataError) as error:
        script("show_data", "--tokenizer_name", bare, "--train_files", rows, "--max_length", 128)
    sentence = str(error.value)
    assert sentence.startswith(
        f"{rows}, row 2: chat_template: the tokenizer {str(bare)!r} has none of its own; set one "
    )
    assert "chatml" in sentence and ".jinja" in sentence and "\n" not in sentence
    script(
        "show_data", "--tokenizer_name", bare, "--train_files", rows, "--max_length", 128, "--chat_template", "chatml"
    )
    assert "2+2?" in capsys.readouterr().out


def test_a_template_that_cannot_be_used_is_still_an_error(script, bare, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", {"text": "one"})
    with pytest.raises(ConfigError, match="chat_template: "):
        script("show_data", "--tokenizer_name", bare, "--train_files", rows, "--chat_template", tmp_path / "no.jinja")
    (bare / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    with pytest.raises(ConfigError, match="chat_template: the tokenizer's own template is not valid Jinja"):
        script("show_data", "--tokenizer_name", bare, "--train_files", rows)


def test_the_ledger_is_whole_when_piped_and_on_stderr_with_json(script, tiny, tmp_path, capsys):
    folder = tmp_path / "data"
    write_rows(folder / "train.jsonl", CHAT, *[{"text": "ab"}] * 9)
    write_rows(folder / "test.jsonl", CHAT)
    options = ("--tokenizer_name", tiny, "--train_files", folder, "--max_length", 128)
    script("show_data", *options, "--json")
    captured = capsys.readouterr()
    assert [json.loads(line)["file"] for line in captured.out.splitlines()] == [str(folder / "train.jsonl")] * 10
    script("show_data", *options)
    piped = capsys.readouterr().out
    note = f"{folder}: only the files of its split train are read; left out: test (test.jsonl)."
    for text in (captured.err, piped):
        lines = [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]
        assert note in lines and any(line.startswith(f"{folder} read 10 ") for line in lines)
    ledger = captured.err[captured.err.index("Ledger") :].strip()
    assert ledger in piped and "Ledger" not in captured.out


def test_a_file_whose_name_is_no_utf_8_is_shown(script, tiny, tmp_path, capsys):
    rows = write_rows(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")), CHAT)
    options = ("--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128)
    script("show_data", *options, "--json")
    captured = capsys.readouterr()
    assert json.loads(captured.out)["file"] == str(rows) and r"caf\udce9.jsonl" in captured.err
    script("show_data", *options)
    assert r"caf\udce9.jsonl" in capsys.readouterr().out


def in_shell(command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | variables
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=folder, env=environment, capture_output=True
    )


@pytest.mark.long
def test_output_that_nobody_reads_and_output_that_is_not_utf_8(tiny, tmp_path):
    chat = {"messages": [{"role": "user", "content": "中 😀?"}, {"role": "assistant", "content": "é"}]}
    rows = write_rows(tmp_path / "rows.jsonl", *[chat] * 3000)
    script = f"$PYTHON launch/show_data.py --tokenizer_name {tiny} --train_files {rows} --max_length 512"
    script += f" --cache_dir {tmp_path / 'cache'}"
    root = Path(__file__).parents[2]
    ended = in_shell(f"{script} --json | head -1", root)
    assert (ended.returncode, json.loads(ended.stdout)["row"]) == (141, 1)
    assert b"Traceback" not in ended.stderr and b"BrokenPipe" not in ended.stderr
    # A short output breaks only when it is flushed at the end.
    ended = in_shell(f"{script} --limit_rows 1 --json | true", root)
    assert b"Traceback" not in ended.stderr and b"BrokenPipe" not in ended.stderr
    ended = in_shell(f"{script} --limit_rows 2 --json", root, PYTHONIOENCODING="ascii")
    lines = [json.loads(line) for line in ended.stdout.decode("ascii").splitlines()]
    assert ended.returncode == 0 and [line["trained_text"] for line in lines] == ["é<|im_end|>"] * 2
    ended = in_shell(f"{script} --limit_rows 2", root, PYTHONIOENCODING="ascii")
    assert ended.returncode == 0 and b"\\U0001f600?" in ended.stdout and b"Ledger" in ended.stdout


PAIR = {"prompt": "2+2?", "chosen": "It is 4.", "rejected": "It is 5.", "score_chosen": 3, "score_rejected": 1}


def test_pairs_and_labelled_answers_are_shown_as_they_are_trained(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", PAIR, {**PAIR, "chosen": "Four."})
    options = ("--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128)

    def shown(name: str, *more: str) -> list[dict]:
        script("show_data", name, *options, "--cache_dir", tmp_path / "cache", "--json", *more)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    pairs = shown("dpo")
    assert [(row["row"], row["pair"], row["side"], row["margin"]) for row in pairs] == [
        (1, 0, "chosen", 0),
        (1, 0, "rejected", 0),
        (2, 1, "chosen", 0),
        (2, 1, "rejected", 0),
    ]
    assert [row["trained_text"].split("<")[0] for row in pairs] == ["It is 4.", "It is 5.", "Four.", "It is 5."]
    assert all(
        row["input_ids"][: row["shared_tokens"]] == pairs[0]["input_ids"][: row["shared_tokens"]] for row in pairs
    )
    assert [row["margin"] for row in shown("reward")] == [2] * 4
    assert [row["label"] for row in shown("kto")] == [True, False] * 2

    # For people the prompt stands once.
    script("show_data", "dpo", *options)
    text = capsys.readouterr().out
    assert text.count("2+2?") == 2 and text.count("chosen: It is 4.") == 1 and text.count("rejected: It is 5.") == 2
    script("show_data", "kto", *options)
    text = capsys.readouterr().out
    assert (
        text.count("\ndesirable: ") == text.count("\nundesirable: ") == 2
        and "Answers to train on: 2 desirable, 2 undesirable." in text
    )


def test_scored_answers_are_the_best_and_the_worst_or_all_pairs(script, tiny, tmp_path, capsys):
    row = {"prompt": "2+2?", "responses": ["3", "4", "5"], "scores": [2, 3, 1]}
    rows = write_rows(tmp_path / "rows.jsonl", row)
    for name, more, expected in (
        ("dpo", (), ["4>5"]),
        ("dpo", ("--scored_answers", "all_pairs"), ["4>3", "4>5", "3>5"]),
        ("reward", ("--scored_answers", "all_pairs"), ["4>3", "4>5", "3>5"]),
        ("kto", (), ["4", "5"]),
    ):
        script("show_data", name, "--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128, "--json", *more)
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        texts = [line["trained_text"].split("<")[0] for line in lines]
        assert expected == (texts if name == "kto" else [">".join(texts[k : k + 2]) for k in range(0, len(texts), 2)])
