"""The output on the screen: the ledger as a table, colored rows, and the check that answers will stop."""

import io

import numpy as np
import pytest
from rich.console import Console
from support import make_rows

from accel_llm.data.ledger import Ledger, Unused
from accel_llm.report import display, row_text
from accel_llm.report.display import show_ledger, show_stop_token_check
from accel_llm.report.row_text import color_row, trained_text


def make_ledger() -> Ledger:
    ledger = Ledger(characters=1000, tried=20)
    ledger.read("a.jsonl", rows=10, supervised=60, context=40)
    ledger.count("a.jsonl", "trained", rows=9, supervised=55, context=38)
    ledger.count("a.jsonl", "cut: truncated", rows=0, supervised=5, context=2)
    ledger.count("a.jsonl", "dropped: broken row", rows=1)
    ledger.example("broken row", "a.jsonl, row 3: no messages")
    ledger.read("large.jsonl", rows=0, context=1234567)
    ledger.skip_turns("the template trims it", 3)
    ledger.note("The template closes no turn.")
    return ledger


def screen_text(ledger: Ledger, **screen) -> str:
    file = io.StringIO()
    show_ledger(ledger, Console(file=file, highlight=False, **screen))
    return file.getvalue()


def screen_lines(ledger: Ledger, **screen) -> list[str]:
    """Return what is printed, with runs of spaces as one, and without the borders of the table."""
    text = screen_text(ledger, **screen).replace("│", " ").replace("┃", " ")
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_ledger_shows_every_bin_turn_and_note():
    lines = screen_lines(make_ledger(), width=140)
    assert "a.jsonl read 10 60 40" in lines
    assert "cut: truncated 0 5 2" in lines
    assert "large.jsonl read 0 0 1,234,567" in lines
    assert lines[-3:] == [
        "3 turns without a label: the template trims it",
        "The template closes no turn.",
        "dropped, broken row: a.jsonl, row 3: no messages",
    ]
    assert [row.style for row in display._ledger_table(make_ledger()).rows] == ["bold", None, "red", "red", "bold"]


LONG = "a very long sentence about the rows " * 20 + "which has an end."


def make_long_ledger() -> Ledger:
    ledger = make_ledger()
    ledger.read("folder/" * 30 + "rows.jsonl")
    ledger.count("folder/" * 30 + "rows.jsonl", f"dropped: {LONG}")
    ledger.note(LONG)
    ledger.remark(LONG, 1234)
    return ledger


def test_piped_output_is_whole_with_each_fact_on_one_line():
    lines = screen_lines(make_long_ledger(), width=80)
    assert LONG in lines and f"1,234 rows: {LONG}" in lines
    assert f"dropped: {LONG} 1 0 0" in lines and "folder/" * 30 + "rows.jsonl read 1 0 0" in lines
    assert "cut: truncated 0 5 2" in lines


def test_a_terminal_shows_all_of_it_too():
    lines = screen_text(make_long_ledger(), width=80, force_terminal=True, color_system=None).splitlines()
    assert LONG in lines and f"1,234 rows: {LONG}" in lines  # the terminal itself wraps them
    cells = [line.split("│") for line in lines if line.startswith("│")]
    assert {len("│".join(row)) for row in cells} == {80}
    sources, bins = ("".join(row[column].replace(" ", "") for row in cells) for column in (1, 2))
    assert "folder/" * 30 + "rows.jsonl" in sources and f"dropped:{LONG.replace(' ', '')}" in bins


def test_text_of_the_data_is_no_markup_and_breaks_no_line():
    ledger = Ledger(characters=10)
    ledger.read("[red]x[/red].jsonl", context=1)
    ledger.count("[red]x[/red].jsonl", "dropped: [/oops] :smile:")
    ledger.leave_unused("[bold]", Unused(1, 1, "two\nlines [/red] \x1b[2J \\"))
    lines = screen_lines(ledger, width=140)
    assert "[red]x[/red].jsonl read 1 1" in lines and "dropped: [/oops] :smile: 1 0" in lines
    assert (
        lines[-1] == "Nothing reads [bold]: 1 row, 10.0% of all characters, for example: two\\nlines [/red] \\x1b[2J \\"
    )


def test_half_a_surrogate_pair_is_printed_as_its_escape(monkeypatch, tokenizer):
    ledger = Ledger(characters=1)
    ledger.read("caf\udce9.jsonl", context=1)
    ledger.count("caf\udce9.jsonl", "dropped: \ud800", 1, 0, 1)
    for add in (ledger.note, ledger.remark, ledger.skip_turns, lambda text: ledger.example(text, text)):
        add("half \ud800")
    ledger.leave_unused("key \ud800", Unused(1, 1, "half \udfff"))
    ledger.leave_unused("id \ud800", Unused(1, 0, "1", is_record=True))
    ledger.left_out["part \ud800"] = ledger.remedies["set \ud800"] = 1
    written = io.BytesIO()
    with io.TextIOWrapper(written, encoding="utf-8") as file:
        show_ledger(ledger, Console(file=file, width=80))
        monkeypatch.setattr(row_text, "console", Console(file=file, width=80))
        rows = make_rows([(1, [9, 9], [-100, 9])])
        monkeypatch.setattr(type(rows), "name", lambda rows, k: "caf\udce9.jsonl, row 1")
        row_text.show_rows(tokenizer, rows, 1)
        file.flush()
        shown = written.getvalue().decode()
    assert shown.count(r"caf\udce9.jsonl") == 2 and shown.count(r"half \ud800") == 5 and r"half \udfff" in shown
    assert all(
        part in shown for part in (r"key \ud800", r"id \ud800", r"part \ud800", r"set \ud800", r"dropped: \ud800")
    )


def runs(labels: list[int]) -> list[tuple[bool, list[int]]]:
    return row_text._runs(np.arange(1, len(labels) + 1), np.array(labels))


def test_runs_of_trained_and_context_tokens():
    assert runs([-100, -100, 3, 4, -100, 6]) == [(False, [1, 2]), (True, [3, 4]), (False, [5]), (True, [6])]
    assert runs([1, 2]) == [(True, [1, 2])] and runs([-100]) == [(False, [1])] and runs([]) == []


def test_trained_tokens_are_green_and_context_is_grey(tokenizer):
    text = "ask</s>answer</s>\n"
    ids = np.array(tokenizer(text)["input_ids"])
    labels = np.where((np.arange(len(ids)) >= 4) & (np.arange(len(ids)) < 11), ids, -100)
    colored = color_row(tokenizer, ids, labels)
    assert colored.plain == text
    spans = [(colored.plain[span.start : span.end], span.style) for span in colored.spans]
    assert spans == [("ask</s>", "bright_black"), ("answer</s>", "green"), ("\n", "bright_black")]
    assert trained_text(tokenizer, ids, labels) == "answer</s>"


END = 4  # <|im_end|>


def proof(accelerator, tokenizer, monkeypatch, documents: list[list[int]], turn_end: int | None = END) -> str:
    screen = io.StringIO()
    monkeypatch.setattr(display, "console", Console(file=screen, width=400))
    rows = make_rows((1, [9] * len(labels), labels) for labels in documents)
    show_stop_token_check(accelerator, rows, tokenizer, turn_end, [END, 2])
    return screen.getvalue().strip()


@pytest.mark.parametrize(
    "documents, ended",
    [
        ([[-100, 9, END], [-100, END]], 2),
        ([[-100, 9, END, -100, -100], [-100, END, -100, 9]], 1),  # what is trained last counts
        ([[-100, -100], [-100, END]], 1),  # a document without labels is no other's
        ([[-100, END], [-100, -100]], 1),
        ([[-100, END], [-100, -100], [-100, END], [-100, 9]], 2),
        ([[-100, -100], [-100, -100]], 0),
        ([[-100, 9], [END, -100]], 1),
    ],
)
def test_the_stop_proof_counts_documents(accelerator, tokenizer, monkeypatch, documents, ended):
    assert proof(accelerator, tokenizer, monkeypatch, documents) == (
        f"stop token: <|im_end|> is the last trained token of {ended} of {len(documents)} documents; generation "
        "stops at <|im_end|>, </s>, as the generation config that will be saved says"
    )


def test_the_stop_proof_names_a_template_that_closes_no_turn(accelerator, tokenizer, monkeypatch):
    output = proof(accelerator, tokenizer, monkeypatch, [[-100, 9]], turn_end=None)
    assert output == "stop token: the template closes no turn; answers will not stop by themselves"
