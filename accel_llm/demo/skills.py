"""The embedded default: a tiny tokenizer, the shape of its base model, and self-made text and conversations.

Every skill is one small function that draws a `Task`. Pretraining reads the task's facts (plain prose); fine-tuning
reads its turns (chat). Whether a task is held out is decided by a hash of its operands, so neither the conversations
of the train split nor the pretraining documents can ever contain a question of the eval split.
"""

import random
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple
from zlib import crc32

from accel_llm.demo.tokenizer import CAPITALS, SPECIAL_TOKENS, THINGS, WORDS

DOCUMENTS = 60_000
CONVERSATIONS = {"train": 6000, "eval": 240}
HELD_OUT_PERCENT = 20


SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer with one word or number only.", "Give short answers.")


class Task(NamedTuple):
    """One drawn instance of a skill."""

    items: tuple[str, ...]  # what is asked about; a task belongs to a split only if all its items do
    turns: tuple[tuple[str, str], ...]  # (user, assistant); the last answer is the one that is checked
    prose: str  # plain text that the last answer continues


def held_out(item: str) -> bool:
    """Whether an item belongs to the eval split: a property of the item alone, the same in every run and version."""
    return crc32(item.encode()) % 100 < HELD_OUT_PERCENT


def made_up_word(rng: random.Random, longest: int = 6) -> str:
    """A word that can be said aloud and that the tokenizer has to spell."""
    while True:
        length = rng.randint(3, longest)
        word = "".join(rng.choice("aeiou" if i % 2 else "bdfgklmnprstvz") for i in range(length))
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
    given, answer = " ".join(digits), " ".join(sorted(digits))
    question = rng.choice((f"Sort {given}.", f"Write {given} in order."))
    return Task((f"sort {given}",), ((question, answer),), rng.choice((f"{given} in order", f"Sort {given}")))


def repeat(rng: random.Random) -> Task:
    word = made_up_word(rng)
    question = rng.choice((f"Repeat the word {word}.", f"Say {word}."))
    return Task((word,), ((question, word),), rng.choice((f"the word {word}", f"Say {word}")))


def reverse(rng: random.Random) -> Task:
    word = made_up_word(rng, longest=5)
    question = rng.choice(
        (f"Spell {word} backwards.", f"What is {word} spelled backwards?", f"Reverse the word {word}.")
    )
    return Task((word, word[::-1]), ((question, word[::-1]),), rng.choice((f"{word} backwards", f"Reverse {word}")))


def letter(rng: random.Random) -> Task:
    word, side = made_up_word(rng), rng.choice(("first", "last"))
    answer = word[0] if side == "first" else word[-1]
    question = rng.choice((f"What is the {side} letter of {word}?", f"Give me the {side} letter of the word {word}."))
    return Task((word,), ((question, answer),), f"the {side} letter of {word}")


def pick(rng: random.Random) -> Task:
    things, side = rng.sample(THINGS, 3), rng.choice(("first", "last"))
    answer, given = things[0] if side == "first" else things[-1], ", ".join(things)
    question = rng.choice((f"Which comes {side}: {given}?", f"Name the {side} of the list {given}."))
    return Task((f"pick {given}",), ((question, answer),), f"the {side} of {given}")


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
    names = [made_up_word(rng).capitalize() for _ in range(rng.randint(1, 2))]
    likes = dict(zip(names, rng.sample(THINGS, len(names)), strict=True))
    told = " and ".join(f"{name} likes {thing}" for name, thing in likes.items())
    name = rng.choice(names)
    question = rng.choice((f"What does {name} like?", f"Tell me what {name} likes."))
    turns = ((f"My friend {told}.", "OK."), (question, likes[name]))
    return Task(tuple(name.lower() for name in names), turns, f"{told}.\nwhat {name} likes")


FAMILIES = (add, chain, step, sort, repeat, reverse, letter, pick, capital, recall)


def draw(family: Callable[[random.Random], Task], rng: random.Random, split: Literal["train", "eval"]) -> Task:
    """A task of `family` all of whose items belong to `split`."""
    while True:
        task = family(rng)
        if all(held_out(item) == (split == "eval") for item in task.items):
            return task


def demo_conversations(split: Literal["train", "eval"], seed: int = 0) -> list[dict]:
    """Chat rows `{"messages": [...], "family": name}`; every family appears equally often, no row appears twice.

    A quarter of the rows has a system prompt, a third begins with a task of another family before the one that gives
    the row its name and its last, checked answer. No user question of one split occurs in the other, whatever the seeds.
    """
    rng = random.Random(f"{split} {seed}")
    rows, seen = [], set()
    while len(rows) < CONVERSATIONS[split]:
        family = FAMILIES[len(rows) % len(FAMILIES)]
        messages = []
        if rng.random() < 0.25:
            messages.append({"role": "system", "content": rng.choice(SYSTEM_PROMPTS)})
        turns = draw(rng.choice(FAMILIES), rng, split).turns if rng.random() < 0.33 else ()
        for user, assistant in turns + draw(family, rng, split).turns:
            messages.append({"role": "user", "content": user})
            messages.append({"role": "assistant", "content": assistant})
        if str(messages) not in seen:
            seen.add(str(messages))
            rows.append({"messages": messages, "family": family.__name__})
    return rows


def stretch(rng: random.Random) -> Task:
    """Nothing to be asked about: words and characters of all kinds, said twice, so that copying is learned early.

    It shows the base every token of the vocabulary. The embeddings of tokens that no text holds all drift the same way,
    and an adapter could then not tell the end of a turn from any other of them.
    """
    symbols = "".join(chr(rng.randint(33, rng.choice((0x7E, 0x7FF, 0xD7FF)))) for _ in range(2))
    text = " ".join([*rng.sample(list(WORDS), rng.randint(1, 3)), rng.choice((symbols, symbols, *SPECIAL_TOKENS[1:]))])
    return Task((), (("", text),), text)


def demo_documents(seed: int, count: int) -> Iterator[str]:
    """`count` pages of plain pretraining text: notes that end in an answer, and some of them again.

    Nothing held out is on them, except for capitals: a capital cannot be worked out, so the base has to have read it
    and fine-tuning only has to bring it out. Adding and remembering take longest to learn and are seen more often.
    """
    rng = random.Random(f"documents {seed}")
    for _ in range(count):
        notes: list[str] = []
        for _ in range(rng.randint(4, 12)):
            family = rng.choice((*FAMILIES, add, recall, recall, stretch))
            task = family(rng) if family is capital else draw(family, rng, "train")
            notes.append(task.prose + rng.choice((": ", "\n")) + task.turns[-1][1])
            if rng.random() < 0.15:
                notes.append(rng.choice(notes))
        yield "\n".join(notes)
