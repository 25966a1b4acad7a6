"""What the demo's classifier learns: which skill a question asks for."""

import random
from typing import Literal

from accel_llm.demo.skills import FAMILIES, draw_task

LABELLED_TEXTS = {"train": 1200, "eval": 200}


def demo_questions(split: Literal["train", "eval"], seed: int = 0) -> list[dict[str, str]]:
    """Generate rows `{"text": question, "label": name of the skill}`, no text twice and none of the other split.

    A skill that takes two turns has both questions in its text. Capitals run out before the others: they are the
    smallest class.
    """
    rng = random.Random(f"questions {split} {seed}")
    labels: dict[str, str] = {}  # by text
    while len(labels) < LABELLED_TEXTS[split]:
        family = rng.choice(FAMILIES)
        text = " ".join(question for question, _ in draw_task(family, rng, split).turns)
        labels[text] = family.__name__
    return [{"text": text, "label": label} for text, label in labels.items()]
