"""The output on the screen: the ledger as a table, colored rows, and the check that answers will stop."""

import io

import numpy as np
import pytest
from rich.console import Console
from support import make_rows

from accel_llm.data.ledger import Ledger
from accel_llm.report import display
from accel_llm.report.display import color_row, ledger_table, show_stop_token_check, trained_text


def test_the_ledger_table_shows_every_bin_turn_and_note():
    ledger = Ledger()
    ledger.read("a.jsonl", rows=10, supervised=60, context=40)
    ledger.count("a.jsonl", "trained", rows=9, supervised=55, context=38)
    ledger.count("a.jsonl", "cut: truncated", rows=0, supervised=5, context=2)
    ledger.count("a.jsonl", "dropped: broken row", rows=1)
    ledger.example("broken row", "a.jsonl, row 3: no messages")
    ledger.read("large.jsonl", rows=0, context=1234567)
    ledger.skip_turns("the template trims it", 3)
    ledger.note("The template closes no turn.")
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(ledger_table(ledger))
    lines = [" ".join(line.split()) for line in console.export_text().replace("│", " ").replace("┃", " ").splitlines()]
    assert "a.jsonl read 10 60 40" in lines
    assert "cut: truncated 0 5 2" in lines
    assert "large.jsonl read 0 0 1,234,567" in lines
    assert "3 turns without a label: the template trims it" in lines
    assert "The template closes no turn." in lines
    assert "dropped, broken row: a.jsonl, row 3: no messages" in lines
    assert [row.style for row in ledger_table(ledger).rows] == ["bold", None, "red", "red", "bold"]


def runs(labels: list[int]) -> list[tuple[bool, list[int]]]:
    return display._runs(np.arange(1, len(labels) + 1), np.array(labels))


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
        f"stop token: <|im_end|> is the last trained token of {ended} of {len(documents)} documents and an eos of the "
        "generation config that will be saved"
    )


def test_the_stop_proof_names_a_template_that_closes_no_turn(accelerator, tokenizer, monkeypatch):
    output = proof(accelerator, tokenizer, monkeypatch, [[-100, 9]], turn_end=None)
    assert output == "stop token: the template closes no turn; answers will not stop by themselves"
