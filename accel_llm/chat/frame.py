"""Finds out, by a few renders, how a template writes an answer: what opens it, what closes it, what is a thought."""

import re
from collections.abc import Callable
from typing import Any

from accel_llm.chat.targets import AnswerFrame, Thought
from accel_llm.errors import DataError

# Control tokens as the known template families write them. Role names in brackets ([INST]) are plain text.
TOKEN_MARKER = re.compile(r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|<(?:start|end)_of_\w+>|<(?:bos|eos)>")
_ROLE_HEADER = re.compile(r"<\|(?:system|user|assistant|tool)\|>")
# What opens a thought and what closes it, as the known families write them.
_THOUGHT_TAG = re.compile(r"<((?:\w+:)?\w*(?:think|thought|reason)\w*)>")
_THOUGHT_TOKENS = {"<|START_THINKING|>": "<|END_THINKING|>", "[THINK]": "[/THINK]", "<|channel>thought": "<channel|>"}
_OPENERS = "|".join([_THOUGHT_TAG.pattern, *map(re.escape, _THOUGHT_TOKENS)])
_CLOSERS = "|".join([_THOUGHT_TAG.pattern.replace("<", "</", 1), *map(re.escape, _THOUGHT_TOKENS.values())])
_OPEN_AT_END = re.compile(rf"(?:{_OPENERS})$")
_AT_END = re.compile(rf"(?:{_OPENERS})\s*(?:{_CLOSERS})?\s*$")
# Noncharacters show where a template writes the answer, its reasoning and the question.
ANSWER_OPEN, ANSWER_CLOSE, REASONING_MARK, _ASKED = "\ufdd8", "\ufdd9", "\ufdd5", "\ufdda"
_QUESTION = {"role": "user", "content": _ASKED}
_ANSWER = {"role": "assistant", "content": f"{ANSWER_OPEN}b{ANSWER_CLOSE}"}

TryRender = Callable[[list[dict[str, Any]], bool], str]  # "" if the template refuses the messages


def find_frame(text: str, prompt: str, try_render: TryRender, added_pattern: str) -> AnswerFrame:
    """Return how a template writes the last answer of a conversation.

    `text` is the render of `FRAME_CHAT`, `prompt` that of its first message with the generation prompt.

    Raises:
        DataError: the template leaves out the answer.
    """
    before, mark, _ = text.partition(ANSWER_OPEN)
    if not mark:
        raise DataError("the chat template leaves out the assistant's answer")
    tail = text.rpartition(ANSWER_CLOSE)[2]
    opening = before.removeprefix(prompt) if before.startswith(prompt) else ""
    reasoned = try_render(
        [_QUESTION, _ANSWER | {"reasoning_content": REASONING_MARK, "thinking": REASONING_MARK}], False
    )
    around = _around_reasoning(reasoned, prompt)
    middle = try_render([_QUESTION, _ANSWER, _QUESTION], True).rpartition(ANSWER_CLOSE)[2]
    closing = _closing_length(tail, middle, prompt, added_pattern)
    question = try_render([_QUESTION], False)
    header = prompt.removeprefix(question) if question and prompt.startswith(question) else ""
    return AnswerFrame(opening, tail, closing, header, around, _find_thought(before, prompt, around))


FRAME_CHAT = [_QUESTION, _ANSWER]


def _around_reasoning(reasoned: str, prompt: str) -> tuple[str, str] | None:
    """Return what a template writes before the reasoning of an answer (after the prompt) and between the two."""
    before, mark, after = reasoned.partition(REASONING_MARK)
    if not mark:
        return None
    return before.removeprefix(prompt) if before.startswith(prompt) else "", after.partition(ANSWER_OPEN)[0]


def _closing_length(tail: str, middle: str, prompt: str, added_pattern: str) -> int:
    """Return how many characters of `tail`, which follows the last answer, close it.

    They are added tokens without anything between them: all that stand there both after the last answer and after one
    in the middle (Command R7B writes two). Some templates end a conversation with a further token that no earlier
    answer has: it does not count. If the two have nothing in common, all count that stand at the end.
    """
    run = re.match(rf"\s*(?:{added_pattern})+", tail)
    first = re.match(rf"\s*(?:{added_pattern})", tail)
    if not run or not first:
        return 0
    tokens = re.findall(added_pattern, run[0])
    common = next(
        (count for count in range(len(tokens), 0, -1) if middle.startswith(_first_tokens(run[0], tokens, count))), 0
    )
    more_follows = tail.strip() != run[0].strip()
    if not common:
        return first.end() if more_follows else run.end()
    # Some templates always write the next header (Command R7B with tools): its first token may be that of all headers.
    header = re.findall(added_pattern, prompt.rpartition(_ASKED)[2])[1:]
    if common > 1 and (more_follows or common < len(tokens)) and tokens[common - 1] in header:
        common -= 1
    return len(_first_tokens(run[0], tokens, common))


def _first_tokens(run: str, tokens: list[str], count: int) -> str:
    return run[: run.index(tokens[0])] + "".join(tokens[:count])


def _find_thought(before: str, prompt: str, around: tuple[str, str] | None) -> Thought | None:
    """Return the thought with which the prompt ends; None if it ends with none. `before` precedes the last answer."""
    start = next((k for k, pair in enumerate(zip(before, prompt, strict=False)) if pair[0] != pair[1]), len(prompt))
    start = min(start, len(before))
    # Not inside a token: `<think></think>` and `</think>` have their first character in common.
    opened = prompt.rfind("<", 0, start)
    if opened > prompt.rfind(">", 0, start):
        start = opened
    # The last answer may have the opening in common with the prompt, or all of the thought (Qwen3.5).
    if (match := _OPEN_AT_END.search(prompt[:start])) or (start == len(prompt) and (match := _AT_END.search(prompt))):
        start = match.start()
    opening, shown = prompt[start:], before[start:]
    pair = find_thought_tags(opening)
    if pair is None:
        return None
    if pair[1] in opening:
        closing = ""
    elif around and pair[1] in around[1]:
        closing = _up_to(around[1], pair[1])
    else:
        # What DeepSeek-R1 itself writes, and DeepSeek-V3.1 where no line end follows the opening.
        closing = f"\n{pair[1]}\n\n" if opening.endswith("\n") else pair[1]
    return Thought(opening, closing, _up_to(shown, pair[1]), pair)


def find_thought_tags(text: str) -> tuple[str, str] | None:
    """Return what opens the first thought in `text`, and what would close it; None if there is none."""
    if tag := _THOUGHT_TAG.search(text):
        return tag[0], f"</{tag[1]}>"
    return next((pair for pair in _THOUGHT_TOKENS.items() if pair[0] in text), None)


def _up_to(text: str, mark: str) -> str:
    """Return the start of `text` up to the mark and the spaces after it; "" if the mark is not in it."""
    before, found, after = text.partition(mark)
    return before + found + after[: len(after) - len(after.lstrip())] if found else ""


def split_tokens(text: str, tail: str, is_single: Callable[[str], bool], strict: bool) -> list[str]:
    """Return the control tokens of `text` that the tokenizer splits; none if every needed one is a single token.

    Needed is the token that closes a turn, at the beginning of `tail`. With `strict` all are needed, except role
    headers: some models learned those in pieces (Zephyr's `<|user|>`).
    """
    split = [marker for marker in dict.fromkeys(TOKEN_MARKER.findall(text)) if not is_single(marker)]
    closing = TOKEN_MARKER.match(tail.lstrip())
    needed = {closing[0]} if closing else set()
    if strict:
        needed |= {marker for marker in split if not _ROLE_HEADER.fullmatch(marker)}
    return split if needed & set(split) else []
