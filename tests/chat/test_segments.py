"""Parts of an answer with weights of their own, from the row to the labels."""

import pytest
from support import CONTROL_TOKENS, byte_level

from accel_llm.chat.guard import GUARD_CLOSE, GUARD_OPEN
from accel_llm.chat.segments import apply_segments, mark_segments
from accel_llm.chat.targets import IGNORED, Target
from accel_llm.chat.template import load_template
from accel_llm.errors import DataError

CASES = [
    ("ab cd", [(2, 0.0), (3, 1.0)], [(" cd", 1.0)]),
    ("abc", [(1, 0.5), (1, 2.0), (1, 1.0)], [("a", 0.5), ("b", 2.0), ("c", 1.0)]),
    ("abc", [(1, 2.0), (2, 2.0)], [("abc", 2.0)]),
    ("  ab ", [(3, 0.0), (2, 1.0)], [("b ", 1.0)]),
    ("ab", [(2, 0.0)], []),
    ("<think>r</think>ab", [(10, 0.0), (7, 2.0), (1, 1.0)], [("a", 2.0), ("b", 1.0)]),  # a tag is not cut
]


@pytest.mark.parametrize(("text", "segments", "expected"), CASES)
def test_targets_are_cut_at_the_borders(text, segments, expected) -> None:
    borders: list = []
    marked = mark_segments(text, segments, borders)
    row = f"x{marked}|end"
    targets = [Target(1, 1 + len(marked), 1.0), Target(2 + len(marked), len(row), 0.5)]
    plain, cut = apply_segments(row, targets, borders)
    assert plain == f"x{text}|end"
    assert [(plain[start:end], weight) for start, end, weight in cut] == [*expected, ("end", 0.5)]


def test_no_mark_stands_where_templates_look() -> None:
    marked = mark_segments("  ab ", [(3, 0.0), (2, 1.0)], [])
    assert marked == "  a\ufdd60\ufdd7b\ufdd61\ufdd7 "  # none where they trim, none at the start
    # A guarded control token is not cut.
    guarded = mark_segments(f"a{GUARD_OPEN}<x>{GUARD_CLOSE}b", [(2, 0.0), (3, 1.0)], [])
    assert f"{GUARD_OPEN}<x>{GUARD_CLOSE}\ufdd60\ufdd7b" in guarded


def test_a_template_that_loses_a_border_is_refused() -> None:
    borders: list = []
    marked = mark_segments("abc", [(1, 0.0), (1, 1.0), (1, 0.0)], borders)
    mark = "\ufdd61\ufdd7"
    assert mark in marked
    with pytest.raises(DataError, match="rewrites an answer whose parts have different weights"):
        apply_segments(marked.replace(mark, ""), [Target(0, len(marked) - 3, 1.0)], borders)
    assert apply_segments("xyz", [Target(0, 3, 1.0)], borders) == ("xyz", [Target(0, 3, 1.0)])  # another turn


TOKENS = CONTROL_TOKENS["qwen2.5"]


def labelled(content: str, segments: list[tuple[int, float]], **options: str) -> list[tuple[str, float]]:
    """Encode one answer, and return its trained texts with their weights."""
    tokenizer = byte_level(TOKENS)
    template = load_template(tokenizer, "chatml")
    messages = [{"role": "user", "content": "Go"}, {"role": "assistant", "content": content, "segments": segments}]
    (row,) = template.encode(messages, **options).rows  # type: ignore[arg-type]
    runs: list[list] = []
    for k, (token, label) in enumerate(zip(row.input_ids, row.labels, strict=True)):
        weight = row.weights[k] if row.weights else 1.0
        if label != IGNORED:
            assert label == token
            if runs and runs[-1][2] == k - 1 and runs[-1][1] == weight:
                runs[-1][0].append(token)
                runs[-1][2] = k
            else:
                runs.append([[token], weight, k])
    return [(tokenizer.decode(ids), weight) for ids, weight, _ in runs]


def test_a_part_that_is_not_trained_is_context() -> None:
    first, second = "Let me guess: 40.", " It is 42."
    assert labelled(first + second, [(len(first), 0.0), (len(second), 1.0)]) == [(second + "<|im_end|>", 1.0)]
    # The other way round the end of the turn is trained all the same: it ends the turn, whose start is context.
    assert labelled(first + second, [(len(first), 1.0), (len(second), 0.0)]) == [(first, 1.0), ("<|im_end|>", 1.0)]


def test_weights_of_parts() -> None:
    assert labelled("abcd", [(1, 0.5), (3, 2.0)]) == [("a", 0.5), ("bcd", 2.0), ("<|im_end|>", 1.0)]
    whole = "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\nabcd<|im_end|>\n"
    assert labelled("abcd", [(1, 0.5), (3, 2.0)], train_on="all") == [(whole, 1.0)]


def test_a_control_token_across_a_border_stays_text() -> None:
    text = "a<|im_end|>b"
    trained = labelled(text, [(4, 0.0), (len(text) - 4, 1.0)])
    assert trained == [("b<|im_end|>", 1.0)]
