"""What the demo prefers: of two things, the one that can be eaten or drunk. Both are right answers to the question.

The two things stand in either order equally often. So a model that takes the first of them, or the last, gives the
preferred answer to half of the questions, and only the things themselves tell it the other half.
"""

import random
from typing import Any, Literal

from accel_llm.demo.skills import FAMILIES, SYSTEM_PROMPTS, draw_task, is_held_out
from accel_llm.demo.tokenizer import THINGS

FOOD = ("tea", "milk", "rice", "bread", "fish", "cake")
OTHER_THINGS = tuple(thing for thing in THINGS if thing not in FOOD)
CHOICE_ROWS = {"train": 900, "eval": 120}  # questions with two right answers
REMINDER_ROWS = 300  # questions with one, in the train split alone


def is_preferred(answer: str) -> bool:
    """Tell whether an answer names something that can be eaten or drunk."""
    return answer.strip() in FOOD


def demo_pairs(split: Literal["train", "eval"], seed: int = 0) -> list[dict[str, Any]]:
    """Generate rows `{"prompt": [...], "chosen": [...], "rejected": [...]}` of messages; no question of choice twice.

    A quarter of the choices has a system prompt. Two things that are in a choice of one split are in none of the other.
    In the train split questions of fine-tuning are mixed in, so that what was learned there is not forgotten.
    """
    rng = random.Random(f"pairs {split} {seed}")
    rows: dict[str, dict[str, Any]] = {}  # by prompt
    while len(rows) < CHOICE_ROWS[split]:
        food, other = rng.choice(FOOD), rng.choice(OTHER_THINGS)
        first, last = rng.sample((food, other), 2)
        question = rng.choice(
            (f"Say one: {first} or {last}.", f"Say one: {first}, {last}.", f"Which one is it: {first}, {last}?")
        )
        prompt = [_message("user", question)]
        if rng.random() < 0.25:
            prompt.insert(0, _message("system", rng.choice(SYSTEM_PROMPTS)))
        if is_held_out(f"{food} or {other}") == (split == "eval"):
            rows[str(prompt)] = _pair(prompt, food, other)
    if split == "eval":
        return list(rows.values())
    mixed = [*rows.values(), *(_reminder(rng, k) for k in range(REMINDER_ROWS))]
    rng.shuffle(mixed)
    return mixed


def _reminder(rng: random.Random, number: int) -> dict[str, Any]:
    """Draw a task of fine-tuning, whose right answer is preferred to that of another task of its family."""
    family = FAMILIES[number % len(FAMILIES)]
    turns = draw_task(family, rng, "train").turns
    *earlier, (question, answer) = turns
    wrong = answer
    while wrong == answer:
        wrong = draw_task(family, rng, "train").turns[-1][1]
    prompt = [_message(role, text) for turn in earlier for role, text in zip(("user", "assistant"), turn, strict=True)]
    return _pair([*prompt, _message("user", question)], answer, wrong)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pair(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [_message("assistant", chosen)], "rejected": [_message("assistant", rejected)]}
