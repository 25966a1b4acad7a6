"""What the demo prefers: of two things, the one that can be eaten or drunk. Both are right answers to the question.

The two things stand in either order equally often. So a model that takes the first of them, or the last, gives the
preferred answer to half of the questions, and only the things themselves tell it the other half.
"""

import random
import re
from typing import Any, Literal

from accel_llm.demo.skills import FAMILIES, SYSTEM_PROMPTS, draw_task, is_held_out
from accel_llm.demo.tokenizer import CAPITALS, THINGS

FOOD = ("tea", "milk", "rice", "bread", "fish", "cake")
OTHER_THINGS = tuple(thing for thing in THINGS if thing not in FOOD)
CHOICE_ROWS = {"train": 900, "eval": 120}  # questions with two right answers
REMINDER_ROWS = 900  # questions with one, in the train split alone
CITIES = tuple(CAPITALS.values())


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
    """Draw a question as fine-tuning asks it; its right answer is preferred to one that is nearly right."""
    turns = draw_task(FAMILIES[number % len(FAMILIES)], rng, "train").turns
    if rng.random() < 0.33:
        turns = draw_task(rng.choice(FAMILIES), rng, "train").turns + turns
    *earlier, (question, answer) = turns
    prompt = [_message("system", rng.choice(SYSTEM_PROMPTS))] if rng.random() < 0.25 else []
    for user, assistant in earlier:
        prompt += [_message("user", user), _message("assistant", assistant)]
    prompt.append(_message("user", question))
    asked = " ".join(message["content"] for message in prompt if message["role"] == "user")
    return _pair(prompt, answer, _nearly_right(rng, asked, answer))


def _nearly_right(rng: random.Random, asked: str, answer: str) -> str:
    """Draw a wrong answer that resembles the right one: what a model might take for it.

    To make an answer less likely that no model would give teaches nothing, and moves the weights all the same.
    """
    if answer.isdigit():
        return str(int(answer) + rng.choice((-1, 1))) if int(answer) else "1"
    for known in (THINGS, CITIES):
        if answer in known:
            named = [word for word in re.findall(r"\w+", asked) if word in known and word != answer]
            return rng.choice(named or [word for word in known if word != answer])
    if len(answer) == 1:  # a letter of the last word that has it
        word = next(word for word in reversed(re.findall(r"\w+", asked)) if answer in word)
        return rng.choice([letter for letter in word if letter != answer])
    # Two neighbours change places: of digits in order, or of the letters of an invented word.
    parts = answer.split(" ") if " " in answer else list(answer)
    places = [k for k in range(len(parts) - 1) if parts[k] != parts[k + 1]]
    if not places:
        return answer[:-1].rstrip()
    k = rng.choice(places)
    parts[k], parts[k + 1] = parts[k + 1], parts[k]
    return (" " if " " in answer else "").join(parts)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pair(prompt: list[dict[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": [_message("assistant", chosen)], "rejected": [_message("assistant", rejected)]}
