"""The skills that the demo teaches, as generated conversations and plain text.

Each skill is a small function that draws a `Task`. Pretraining reads the prose of a task, and fine-tuning its chat
turns. A hash of the items in a task decides whether it is held out. So neither the conversations of the train split nor
the pretraining documents can contain a question of the eval split.
"""

import random
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple
from zlib import crc32

from accel_llm.demo.tokenizer import CAPITALS, SPECIAL_TOKENS, THINGS, WORDS

DOCUMENTS = 60_000  # for pretraining
CONVERSATIONS = {"train": 6000, "eval": 240}  # for fine-tuning
HELD_OUT_PERCENT = 20  # of all items

SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer with one word or number only.", "Give short answers.")


class Task(NamedTuple):
    """One drawn instance of a skill."""

    items: tuple[str, ...]  # the things it asks about; a task is in a split only if all its items are
    turns: tuple[tuple[str, str], ...]  # (user, assistant); only the last answer is checked
    prose: str  # the question as plain text; the last answer continues it


def is_held_out(item: str) -> bool:
    """Tell whether an item is in the eval split. It depends on the item alone, so it is the same in every run."""
    return crc32(item.encode()) % 100 < HELD_OUT_PERCENT


def invent_word(rng: random.Random, longest: int = 6) -> str:
    """Draw a word of 3 to `longest` letters that can be spoken and is not in the vocabulary, so it must be spelled."""
    while True:
        length = rng.randint(3, longest)
        word = "".join(rng.choice("aeiou" if i % 2 else "bdfgklmnprstvz") for i in range(length))
        # A word of the vocabulary would be one token.
        if not {word, word.capitalize()} & WORDS.keys():
            return word


def add(rng: random.Random) -> Task:
    a, b = rng.randint(0, 99), rng.randint(0, 9)
    question = rng.choice((f"What is {a} + {b}?", f"Add {b} to {a}.", f"How much is {a} plus {b}?"))
    return Task((f"add {a} {b}",), ((question, str(a + b)),), rng.choice((f"{a} + {b}", f"{a} plus {b}")))


def chain(rng: random.Random) -> Task:
    a, b, c = rng.randint(0, 80), rng.randint(0, 9), rng.randint(0, 9)
    follow_up = rng.choice((f"Now add {c}.", f"And plus {c}?"))
    return Task(
        (f"add {a} {b}", f"add {a + b} {c}", f"then {c}"),
        ((f"What is {a} + {b}?", str(a + b)), (follow_up, str(a + b + c))),
        f"{a} + {b} = {a + b}\n{rng.choice(('then add', 'and plus'))} {c}",
    )


def step(rng: random.Random) -> Task:
    number, (side, move) = rng.randint(1, 998), rng.choice((("after", 1), ("before", -1)))
    question = rng.choice((f"Which number comes {side} {number}?", f"What is the number {side} {number}?"))
    return Task((f"step {number}",), ((question, str(number + move)),), f"the number {side} {number}")


def sort(rng: random.Random) -> Task:
    digits = [str(rng.randint(0, 9)) for _ in range(rng.randint(3, 4))]
    numbers, answer = " ".join(digits), " ".join(sorted(digits))
    question = rng.choice((f"Sort {numbers}.", f"Write {numbers} in order."))
    return Task((f"sort {numbers}",), ((question, answer),), rng.choice((f"{numbers} in order", f"Sort {numbers}")))


def repeat(rng: random.Random) -> Task:
    word = invent_word(rng)
    question = rng.choice((f"Repeat the word {word}.", f"Say {word}."))
    return Task((word,), ((question, word),), rng.choice((f"the word {word}", f"Say {word}")))


def reverse(rng: random.Random) -> Task:
    word = invent_word(rng, longest=5)
    question = rng.choice(
        (f"Spell {word} backwards.", f"What is {word} spelled backwards?", f"Reverse the word {word}.")
    )
    return Task((word, word[::-1]), ((question, word[::-1]),), rng.choice((f"{word} backwards", f"Reverse {word}")))


def letter(rng: random.Random) -> Task:
    word, side = invent_word(rng), rng.choice(("first", "last"))
    answer = word[0] if side == "first" else word[-1]
    question = rng.choice((f"What is the {side} letter of {word}?", f"Give me the {side} letter of the word {word}."))
    return Task((word,), ((question, answer),), f"the {side} letter of {word}")


def pick(rng: random.Random) -> Task:
    things, side = rng.sample(THINGS, 3), rng.choice(("first", "last"))
    answer, listing = things[0] if side == "first" else things[-1], ", ".join(things)
    question = rng.choice((f"Which comes {side}: {listing}?", f"Name the {side} of the list {listing}."))
    return Task((f"pick {listing}",), ((question, answer),), f"the {side} of {listing}")


def capital(rng: random.Random) -> Task:
    country, city = rng.choice(list(CAPITALS.items()))
    question = rng.choice(
        (
            f"What is the capital of {country}?",
            f"Name the capital of {country}.",
            f"Which city is the capital of {country}?",
        )
    )
    return Task((f"capital {country}",), ((question, city),), f"the capital of {country}")


def recall(rng: random.Random) -> Task:
    names = [invent_word(rng).capitalize() for _ in range(rng.randint(1, 2))]
    likes = dict(zip(names, rng.sample(THINGS, len(names)), strict=True))
    facts = " and ".join(f"{name} likes {thing}" for name, thing in likes.items())
    name = rng.choice(names)
    question = rng.choice((f"What does {name} like?", f"Tell me what {name} likes."))
    turns = ((f"My friend {facts}.", "OK."), (question, likes[name]))
    return Task(tuple(name.lower() for name in names), turns, f"{facts}.\nwhat {name} likes")


FAMILIES = (add, chain, step, sort, repeat, reverse, letter, pick, capital, recall)


def draw_task(family: Callable[[random.Random], Task], rng: random.Random, split: Literal["train", "eval"]) -> Task:
    """Draw tasks of `family` until all items of one are in `split`, and return it."""
    while True:
        task = family(rng)
        if all(is_held_out(item) == (split == "eval") for item in task.items):
            return task


def demo_conversations(split: Literal["train", "eval"], seed: int = 0) -> list[dict]:
    """Generate chat rows `{"messages": [...], "family": name}`, each family equally often and no row twice.

    A quarter of the rows has a system prompt. A third begins with a task of any family; after it comes the task that
    gives the row its family and its last answer. No user question of one split occurs in the other, whatever the seeds
    are.
    """
    rng = random.Random(f"{split} {seed}")
    rows, seen = [], set()
    while len(rows) < CONVERSATIONS[split]:
        family = FAMILIES[len(rows) % len(FAMILIES)]
        messages = []

        # Draw the system prompt, the first task and the task of the family.
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        turns = draw_task(rng.choice(FAMILIES), rng, split).turns if rng.random() < 0.33 else ()
        for user, assistant in turns + draw_task(family, rng, split).turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})

        if str(messages) not in seen:
            seen.add(str(messages))
            rows.append({"messages": messages, "family": family.__name__})
    return rows


def copy_text(rng: random.Random) -> Task:
    """Draw words and characters of all kinds, to be written twice, so that the base learns early to copy.

    This shows the base every token of the vocabulary. Tokens that are in no text would get embeddings that all drift in
    the same direction, and an adapter could not tell the end of a turn from the other ones.
    """
    # Characters of one, two and three bytes in UTF-8.
    symbols = "".join(chr(rng.randint(33, rng.choice((0x7E, 0x7FF, 0xD7FF)))) for _ in range(2))
    text = " ".join([*rng.sample(list(WORDS), rng.randint(1, 3)), rng.choice((symbols, symbols, *SPECIAL_TOKENS[1:]))])
    return Task((), (("", text),), text)


def demo_documents(seed: int, count: int) -> Iterator[str]:
    """Generate `count` pages of plain text for pretraining: notes that end with an answer, some of them repeated.

    They contain no item of the eval split except capitals: nobody can work out a capital, so the base must have read
    it, and fine-tuning only teaches to answer with it. Addition and recall take longest to learn, so they appear more
    often.
    """
    rng = random.Random(f"documents {seed}")
    for _ in range(count):
        notes: list[str] = []
        for _ in range(rng.randint(4, 12)):
            # Names in this tuple more than once are drawn more often.
            family = rng.choice((*FAMILIES, add, recall, recall, copy_text))
            task = family(rng) if family is capital else draw_task(family, rng, "train")
            notes.append(task.prose + rng.choice((": ", "\n")) + task.turns[-1][1])
            if rng.random() < 0.15:
                notes.append(rng.choice(notes))
        yield "\n".join(notes)
