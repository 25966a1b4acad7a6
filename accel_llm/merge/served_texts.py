"""Texts on which a served model is compared with the trained one."""

import unicodedata
from collections.abc import Iterator
from typing import Any

TOKENS_PER_TEXT = 256  # tokens of the vocabulary in one text
# Questions, the first of which are answered; then what tokenizers cut in different ways.
SERVED_CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is 3 + 4?"}],
    [{"role": "user", "content": "Name three kinds of fruit, one on each line."}],
    [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And of Italy? Answer with one word."},
    ],
    [
        {"role": "system", "content": "You are a patient teacher. Answer in short sentences."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    [{"role": "user", "content": "请用三句话介绍长城。它有多长?为什么建造它?谢谢!"}],
    [
        {
            "role": "user",
            "content": "🙂👍🏽 naïve café, Zürich: 12345 + 0.75 = ½? It's 50% of £1,000; we'll see, THEY'RE sure.",
        }
    ],
    [
        {
            "role": "user",
            "content": 'def area(width, height):\n\tif width < 0:\n        raise ValueError(f"{width!r}")\n\n\n    return width*height  # ok\r\n',
        }
    ],
    [
        {
            "role": "user",
            "content": '  {"name": "Ada",   "born": 1815, "tags": ["x", "y_z"]}\n\n   trailing spaces   \t ',
        }
    ],
    [{"role": "user", "content": "Привет! Как дела? नमस्ते दुनिया, สวัสดี, 안녕하세요, こんにちは。 مرحبا"}],
]


def vocabulary_texts(spelled: list[str]) -> Iterator[str]:
    """Yield texts that hold each of the texts `spelled`, with a space between them."""
    for start in range(0, len(spelled), TOKENS_PER_TEXT):
        # Texts that are not in the normal form NFC differ where a tokenizer makes it: llama.cpp never does.
        yield unicodedata.normalize("NFC", " ".join(spelled[start : start + TOKENS_PER_TEXT]))
