"""Which class is taken for which, on the screen: every count under its class, in 80 columns."""

import io

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from accel_llm.report import confusion
from accel_llm.report.confusion import confusion_text, show_confusion
from accel_llm.report.record import Record


def drawn_counts(classes: int, high: int = 90) -> np.ndarray:
    return np.random.default_rng(0).integers(1, high, (classes, classes))


def test_a_small_table_has_the_names_of_the_classes() -> None:
    assert confusion_text([[12, 3], [0, 1234]], ["negative", "good"]).split("\n") == [
        "true \\ taken for  negative   good",
        "negative                12      3",
        "good                     0  1,234",
    ]


def test_columns_of_long_names_have_numbers() -> None:
    names = [f"a long name of class {k}" for k in "abcde"]
    first, *others = confusion_text(drawn_counts(5), names).split("\n")
    assert first.split() == ["true", "\\", "taken", "for", "1", "2", "3", "4", "5"]
    for number, (name, line, counts) in enumerate(zip(names, others, drawn_counts(5), strict=True), 1):
        assert line.startswith(f"{number} {name}  ") and line.split()[-5:] == list(map(str, counts))


@pytest.mark.parametrize(
    "name", ["class", "a name that is far too long for any table " * 3, "中文的名字很长" * 6, "a\nb\x1b[31m"]
)
@pytest.mark.parametrize("classes", [2, 7, 12, 13, 50])
@pytest.mark.parametrize("high", [10, 10_000_000])
def test_no_line_is_longer_than_80_columns_and_none_is_torn(name: str, classes: int, high: int) -> None:
    counts = drawn_counts(classes, high)
    lines = confusion_text(counts, [f"{k} {name}" for k in range(classes)]).split("\n")
    assert max(map(cell_len, lines)) <= 80 and all(line.isprintable() for line in lines)
    if lines[0].startswith("true \\"):
        assert classes <= 12 and len(lines) == classes + 1
        assert len({cell_len(line) for line in lines}) == 1  # columns stand below each other
        assert [int(text.replace(",", "")) for text in lines[-1].split()[-classes:]] == counts[-1].tolist()
    else:
        assert classes > 12 or high > 10
        assert len(lines) == (16 if classes * (classes - 1) > 15 else classes * (classes - 1))


def test_many_classes_are_shown_by_their_most_confused_pairs() -> None:
    counts = np.diag(np.full(20, 99))
    names = [f"class {k}" for k in range(20)]
    assert confusion_text(counts, names) == "no text was taken for another class"
    counts[3, 4], counts[4, 3], counts[19, 0] = 2, 12, 2
    assert confusion_text(counts, names).split("\n") == [
        "true class 4 taken for class 3: 12",
        "true class 3 taken for class 4: 2",
        "true class 19 taken for class 0: 2",
    ]
    counts[0, 1:19] = 1
    assert confusion_text(counts, names).split("\n")[-1] == "and 6 more pairs, each with at most 1"


def test_the_last_evaluation_is_shown_if_it_has_a_matrix(tmp_path, monkeypatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(confusion, "console", Console(file=screen, width=30, highlight=False))
    record = Record(tmp_path, True)
    show_confusion(record)
    record.update(confusion_matrix=None)  # scores that are not finite, or no classes
    show_confusion(record)
    assert screen.getvalue() == ""
    matrix = {"names": ["[red]no", "yes"], "counts": [[3, 1], [0, 2]], "classes": 2, "rows": 6, "right": 5}
    record.update(confusion_matrix=matrix)
    show_confusion(record)
    assert screen.getvalue().split("\n") == [
        "Classes at the last evaluation, right for 5 of 6 texts:",
        "true \\ taken for  [red]no  yes",
        "[red]no                 3    1",
        "yes                     0    2",
        "",
    ]
