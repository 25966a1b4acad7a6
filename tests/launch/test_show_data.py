"""show_data.py: rows and ledger, with --json and when piped; rows of plain text need no chat template."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from screens import Screen

from accel_llm.errors import ConfigError, DataError
from accel_llm.report.row_text import mark_runs


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
        f"training would stop, because 1 of 2 rows are bad: {rows}, row 2: chat_template: the tokenizer {str(bare)!r} has "
        "none of its own; set one "
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


BAD = {"messages": [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": 7}]}
EMPTY = {"messages": [{"role": "user", "content": "5+5?"}, {"role": "assistant", "content": " "}]}


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_bad_rows_are_shown_beside_good_ones_and_the_last_line_says_that_training_stops(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", CHAT, BAD, *[CHAT] * 9, EMPTY, chat("8+8?", "16"))
    options = ("--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128)
    sentence = "messages[1].content: found 7; needs text (its keys: role, content)"
    with pytest.raises(DataError) as error:
        script("show_data", *options, "--rows", 3)
    assert str(error.value) == (
        f"training would stop, because 2 of 13 rows are bad: {rows}, row 2: {sentence}; on_bad_row: drop leaves such rows out."
    )
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    # The first three, and the bad one that comes later; then the numbers of all.
    shown = [line for line in lines if line.startswith(f"{rows}, row ") or f" {rows}, row " in line]
    names = [line.strip("─ ").removeprefix(f"{rows}, row ").partition(":")[0] for line in shown]
    assert names[:4] == ["1", "2", "3", "12"]
    at = lines.index(sentence)
    assert lines[at + 1] == f"the row: {json.dumps(BAD)}"
    assert "messages[1].content: the assistant's answer is empty; needs text to train on" in lines
    assert "Tokens a row" in printed and "Ledger" in printed
    assert printed.count("[[4<|im_end|>]]") == 2

    # Who leaves them out in training gets the same, and no error, if not too many are lost.
    script("show_data", *options, "--rows", 3, "--on_bad_row", "drop", "--max_lost", 0.5)
    assert [line for line in capsys.readouterr().out.splitlines() if line in lines] != []
    with pytest.raises(ConfigError, match=r"^training would stop: max_lost: 15\.4% of the rows"):
        script("show_data", *options, "--rows", 3, "--on_bad_row", "drop")
    assert sentence in capsys.readouterr().out

    # For programs: the trained rows, and then what is left out, each with its reason.
    with pytest.raises(DataError):
        script("show_data", *options, "--json")
    captured = capsys.readouterr()
    objects = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["row"] for row in objects] == [1, *range(3, 12), 13, 2, 12]
    assert objects[-2] == {"file": str(rows), "row": 2, "problem": sentence}
    assert "Ledger" in captured.err


def test_all_rows_are_bad_or_a_file_is_broken(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", BAD, EMPTY)
    options = ("--tokenizer_name", tiny, "--max_length", 128, "--train_files")
    with pytest.raises(DataError, match=r"^training would stop: .*, row 1: messages\[1\]"):
        script("show_data", *options, rows)
    assert capsys.readouterr().out.count("the row: ") == 2
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(CHAT) + "\n" + json.dumps(BAD) + "\n{", encoding="utf-8")
    with pytest.raises(DataError, match=r"^training would stop: .*broken\.jsonl, "):
        script("show_data", *options, broken)
    printed = capsys.readouterr().out
    assert "[[4<|im_end|>]]" in printed and "found 7" in printed


def test_rows_that_are_too_long_are_shown_with_the_reason(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", *[CHAT] * 150, chat("Hm. " * 40, "16"))
    options = ("--tokenizer_name", tiny, "--train_files", rows, "--max_length", 64)
    script("show_data", *options, "--rows", 1)
    printed = capsys.readouterr().out
    assert f"{rows}, row 151: not trained" in printed and "dropped: longer than max_length=64" in printed
    with pytest.raises(DataError, match=r"^training would stop: .*, row 151: \d+ tokens are longer than max_length=64"):
        script("show_data", *options, "--rows", 1, "--overlong", "error")
    printed = capsys.readouterr().out
    assert f"{rows}, row 151: bad" in printed and "Ledger" in printed
    script("show_data", *options, "--row", 151, "--overlong", "truncate", "--train_on", "all")
    assert "cut: longer than max_length=64" in capsys.readouterr().out


def test_one_row_by_its_number_or_its_name(script, tiny, tmp_path, capsys):
    one = write_rows(tmp_path / "one.jsonl", chat("a?", "one"), chat("b?", "two"), BAD)
    two = write_rows(tmp_path / "two.jsonl", chat("c?", "three"), chat("d?", "four"))
    options = ("--tokenizer_name", tiny, "--train_files", one, two, "--max_length", 128)
    for name, answers in (("2", ["two", "four"]), ("two.jsonl, row 1", ["three"]), (f"{one}, row 1", ["one"])):
        script("show_data", *options, "--row", name)
        printed = capsys.readouterr().out
        assert [answer for answer in ("one", "two", "three", "four") if f"[[{answer}<" in printed] == answers
        assert "Ledger" not in printed
    with pytest.raises(DataError, match=r"^training would stop: .*one\.jsonl, row 3: messages\[1\].content: found 7"):
        script("show_data", *options, "--row", 3)
    script("show_data", *options, "--row", 3, "--on_bad_row", "drop")
    capsys.readouterr()
    script("show_data", *options, "--row", 2, "--json")
    assert [json.loads(line)["trained_text"] for line in capsys.readouterr().out.splitlines()] == [
        "two<|im_end|>",
        "four<|im_end|>",
    ]
    with pytest.raises(ConfigError, match=r"^row: there is no row 9; give its number"):
        script("show_data", *options, "--row", 9)
    with pytest.raises(ConfigError, match=r"^rows: it cannot be combined with row"):
        script("show_data", *options, "--row", 1, "--rows", 2)

    script("show_data", *options, "--source", two)
    printed = capsys.readouterr().out
    assert "[[three<" in printed and "[[one<" not in printed and str(one) not in printed
    with pytest.raises(
        ConfigError, match=rf"^source: there is no three; the sources in train_files are {one}, {two}\.$"
    ):
        script("show_data", *options, "--source", "three")


def test_random_rows_depend_on_the_seed_alone(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", *[chat("a?", f"n{k}") for k in range(1, 201)])
    options = ("--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128, "--json", "--rows", 20)

    def numbers(*more: object) -> list[int]:
        script("show_data", *options, *more)
        return [json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()]

    assert numbers() == [*range(1, 21)]
    first = numbers("--random")
    assert first == sorted(first) == numbers("--random") and len(set(first)) == 20 and max(first) > 100
    assert numbers("--random", "--seed", 7) != first
    # Rows that are held out for evaluation are not trained, and not shown.
    held_out = ("--eval_share", 0.5)
    script("show_data", *options[:-2], *held_out)
    trained = {json.loads(line)["row"] for line in capsys.readouterr().out.splitlines()}
    assert 50 < len(trained) < 150 and numbers(*held_out) == sorted(trained)[:20]


def test_texts_with_labels(script, tiny, tmp_path, capsys):
    texts = [{"text": f"text {k} [[x]]", "label": ("bad", "good")[k % 2]} for k in range(8)]
    rows = write_rows(tmp_path / "rows.jsonl", *texts, {"text": "", "label": "good"}, {"text": "no label"})
    options = ("classify", "--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128)
    with pytest.raises(DataError, match=r"^training would stop, because 2 of 10 rows are bad: .*, row 9: "):
        script("show_data", *options, "--rows", 9)
    printed = capsys.readouterr().out
    assert "what is trained is its label" in printed and "text 3 [[x]]" in printed and "label good" in printed
    assert f"{rows}, row 9: bad" in printed and f"{rows}, row 10: bad" in printed and "Share of a row" not in printed
    with pytest.raises(DataError):
        script("show_data", *options, "--json")
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row.get("label") for row in objects] == ["bad", "good"] * 4 + [None] * 2
    assert [row["row"] for row in objects if "problem" in row] == [9, 10]


def test_the_notes_of_the_ledger_are_there_with_json_too(script, tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.jsonl", *[CHAT] * 3)
    script(
        "show_data", "--tokenizer_name", tiny, "--train_files", rows, "--max_length", 128, "--limit_rows", 2, "--json"
    )
    captured = capsys.readouterr()
    assert "limit_rows: at most the first 2 rows were read." in captured.err.splitlines()
    assert len(captured.out.splitlines()) == 2


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
    assert text.count("2+2?") == 2 and text.count("chosen: [[It is 4.") == 1 and text.count("rejected: [[It is 5.") == 2
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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize("width", [80, pytest.param(120, marks=pytest.mark.long)])
def test_on_a_terminal_colors_mark_what_is_trained_and_nothing_is_cut_off(width, tiny, tmp_path):
    folder = tmp_path / ("a-long-name-" * 4) / "rows"
    rows = write_rows(folder / "chats.jsonl", CHAT, BAD, chat("[[a]]", "b"))
    words = ("launch/show_data.py", "--tokenizer_name", tiny, "--train_files", rows, "--cache_dir", tmp_path / "cache")
    screen = Screen(*words, width=width)
    assert screen.end() == 2
    last = screen.text.rstrip().splitlines()[-1]
    assert last.startswith("error: training would stop, because 1 of 3 rows are bad: ")
    raw, text = screen.raw.decode(), screen.text
    assert "\x1b[32m4<|im_end|>" in raw and "\x1b[31mmessages[1].content: found 7" in raw and "[[4" not in text
    assert "green: trained, gray: context, red: bad or left out" in text and "[[a]]" in text and "…" not in text
    assert text.count(f"{rows}, row 2: bad") == 1  # the whole name, to copy it
    table = [line for line in text.splitlines() if line[:1] in "│┃┡┏└"]
    assert table and all(len(line) <= width for line in table)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in table if line.startswith("│")]
    assert "".join(row[0] for row in cells) == str(rows)
    numbers = [row[2:] for row in cells if any(row[2:])]
    assert [row[0] for row in numbers] == ["3", "2", "1"]


def decode_marks(text: str) -> list[tuple[bool, str]]:
    """Read what `mark_runs` writes, from left to right: two equal brackets together are a mark, with backslashes text."""
    runs, trained, part = [], False, ""
    while text:
        mark = ("[[", "]]")[trained]
        if text.startswith(mark):
            runs.append((trained, part))
            trained, part, text = not trained, "", text[2:]
            continue
        # A bracket, its backslashes, and the same bracket: one backslash is ours. So is the last one before a mark.
        if found := re.match(r"([\[\]])(\\+)(?=\1)", text):
            part, text = part + found[0][:-1], text[found.end() :]
        else:
            part, text = part + text[0], text[1:]
    runs.append((trained, part))
    return [(trained, part) for trained, part in runs if part or trained]


@given(st.lists(st.text("[]\\a", min_size=1, max_size=8), max_size=6), st.booleans())
def test_marks_are_unambiguous_whatever_brackets_a_text_has(texts, first):
    runs = [((k % 2 == 0) == first, text) for k, text in enumerate(texts)]
    assert decode_marks(mark_runs(runs)) == runs


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data folder")
def test_real_files_with_bad_rows_in_them(script, tmp_path, capsys):
    """Real chats, of which the first answer is compared with the file, and real texts with labels."""
    file = SHARED / "instruct" / "belle_format_from_sharegpt_zh_100.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()[:20]
    path = tmp_path / "chats.jsonl"
    text = "\n".join([*lines[:2], json.dumps(BAD), *lines[2:], json.dumps({"a": 1})])
    path.write_text(f"{text}\n", encoding="utf-8")
    options = ("--tokenizer_name", SHARED / "tokenizers" / "qwen3", "--train_files", path)
    with pytest.raises(DataError, match=r"^training would stop, because 2 of 22 rows are bad: .*chats\.jsonl, row 3: "):
        script("show_data", *options, "--rows", 4, "--max_length", 100_000)
    printed = capsys.readouterr().out
    assert [row for row in range(1, 23) if f"row {row}: bad" in printed] == [3, 22] and printed.count("the row: ") == 2
    turns = json.loads(lines[0])["conversations"]
    answers = [turn["value"].strip() for turn in turns if turn["from"] == "assistant"]
    assert all(f"{answer}<|im_end|>]]" in printed for answer in answers)
    assert all(f"]]{question}" not in printed for question in (turn["value"] for turn in turns[::2]))

    words = ("--tokenizer_name", SHARED / "tokenizers" / "bert-base-uncased", "--limit_rows", 50)
    script("show_data", "classify", *words, "--train_files", SHARED / "seqcls" / "SST-2" / "dev.tsv")
    printed = capsys.readouterr().out
    assert "row 1: 12 tokens, label 1" in printed and "a charming and often affecting journey" in printed
