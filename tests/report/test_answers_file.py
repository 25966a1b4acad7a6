"""answers.jsonl: the answers of each evaluation, bounded, and right after a resume."""

import json

from accel_llm.report import answers_file
from accel_llm.report.answers_file import (
    ANSWERS_FILE,
    MAX_EVALUATIONS,
    MAX_LETTERS,
    MAX_PROMPTS,
    drop_answers_after,
    keep_answers,
    read_answers,
)


def answers(text: str, count: int = 1) -> list[dict[str, str]]:
    return [{"prompt": f"q{k}", "expected": "e", "generated": text} for k in range(count)]


def test_each_evaluation_is_kept_and_the_same_step_is_replaced(tmp_path):
    assert read_answers(tmp_path) == {}
    for step, text in ((10, "a"), (20, "b"), (10, "c")):
        keep_answers(tmp_path, step, answers(text))
    keep_answers(tmp_path, 30, [])
    assert read_answers(tmp_path) == {10: answers("c"), 20: answers("b")}


def test_a_run_that_goes_on_drops_what_it_does_again(tmp_path):
    for step in (10, 20, 30):
        keep_answers(tmp_path, step, answers("a"))
    drop_answers_after(tmp_path, 20)
    assert list(read_answers(tmp_path)) == [10, 20]
    drop_answers_after(tmp_path / "nothing", 20)


def test_the_file_is_bounded(tmp_path, monkeypatch):
    assert MAX_EVALUATIONS * MAX_PROMPTS * MAX_LETTERS * 3 < 2e6
    monkeypatch.setattr(answers_file, "MAX_EVALUATIONS", 8)
    long = "<" * 5_000
    for step in range(1, 41):
        keep_answers(tmp_path, step, answers(long, 50))
    kept = read_answers(tmp_path)
    assert 4 <= len(kept) <= 8 and min(kept) == 1 and max(kept) == 40
    assert all(len(of_step) == MAX_PROMPTS for of_step in kept.values())
    assert kept[1][0]["generated"] == "<" * MAX_LETTERS + "…"


def test_broken_lines_are_passed_over_and_secrets_are_hidden(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "0123456789abcdef")
    keep_answers(tmp_path, 1, answers("it is 0123456789abcdef \ud83d"))
    with (tmp_path / ANSWERS_FILE).open("a", encoding="utf-8") as file:
        file.write('[1]\n{"step": "x", "answers": []}\n{"step": 2, "answers": [3, {"generated": "x"}]}\n{"st')
    kept = read_answers(tmp_path)
    assert kept.keys() == {1, 2} and kept[2] == []
    assert kept[1][0]["generated"].startswith("it is *** ") and json.dumps(kept)
