"""answers.jsonl: what the model answered to the same prompts at each evaluation of a run, one a line."""

import json
from pathlib import Path
from typing import Any

from accel_llm.system.disk import write_atomically
from accel_llm.system.secrecy import hide_secrets

ANSWERS_FILE = "answers.jsonl"
# Bounds of the file: prompts of an evaluation, letters of a text, evaluations.
MAX_PROMPTS, MAX_LETTERS, MAX_EVALUATIONS = 8, 1_000, 64


def keep_answers(folder: Path, step: int, answers: list[dict[str, Any]]) -> None:
    """Add the answers of the evaluation at `step` to the file in `folder`, the output folder of a run.

    An earlier evaluation of the same step is replaced. When there are too many, every second one goes, but the first
    and the new one stay. Without answers nothing is written.
    """
    if not answers:
        return
    short = [{name: _shorten(value) for name, value in answer.items()} for answer in answers[:MAX_PROMPTS]]
    evaluations = {at: kept for at, kept in read_answers(folder).items() if at != step}
    if len(evaluations) >= MAX_EVALUATIONS:
        evaluations = {at: evaluations[at] for at in sorted(evaluations)[::2]}
    _write(folder, evaluations | {step: short})


def _shorten(value: Any) -> Any:
    return f"{value[:MAX_LETTERS]}…" if isinstance(value, str) and len(value) > MAX_LETTERS else value


def drop_answers_after(folder: Path, step: int) -> None:
    """Remove the evaluations after `step`, which a run that goes on from there does again."""
    evaluations = read_answers(folder)
    kept = {at: answers for at, answers in evaluations.items() if at <= step}
    if len(kept) < len(evaluations):
        _write(folder, kept)


def read_answers(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Return the answers of each evaluation by its step; lines that are none are passed over."""
    path = folder / ANSWERS_FILE
    if not path.is_file():
        return {}
    evaluations: dict[int, list[dict[str, Any]]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        answers = line.get("answers") if isinstance(line, dict) else None
        if isinstance(answers, list) and isinstance(line.get("step"), int):
            evaluations[line["step"]] = [
                answer for answer in answers if isinstance(answer, dict) and "prompt" in answer
            ]
    return evaluations


def _write(folder: Path, evaluations: dict[int, list[dict[str, Any]]]) -> None:
    lines = [
        json.dumps({"step": step, "answers": evaluations[step]}, ensure_ascii=False) for step in sorted(evaluations)
    ]
    write_atomically(folder / ANSWERS_FILE, hide_secrets("".join(f"{line}\n" for line in lines)))
