"""The lines of a ledger below its table, exactly."""

import json
import sys

import pytest

from accel_llm.data.ledger import Ledger, Unused
from accel_llm.report.ledger_text import ledger_lines, one_line
from accel_llm.report.page import write_report
from accel_llm.report.record import Record
from accel_llm.system.disk import write_atomically


def make_ledger() -> Ledger:
    ledger = Ledger(characters=20_000, tried=40)
    ledger.read("a.jsonl", rows=1500)
    ledger.skip_turns("the template trims it", 3)
    ledger.left_out["the description of a tool"] = 1200
    ledger.left_out["a tool result"] = 1
    ledger.remedies["split_turns: true"] = 38
    ledger.remedies["open_thought: close"] = 0
    ledger.remark("the answer ends in the template's end token", 1)
    ledger.remark("the prompt looks rendered already", 1234)
    ledger.leave_unused("notes", Unused(2, 100, "see page 5"))
    ledger.leave_unused("id", Unused(1, 300, "17", is_record=True))
    ledger.leave_unused("title", Unused(1500, 1001, "no record", is_record=True))
    for key, rows in (("a", 1000), ("b", 200), ("c", 99), ("d", 1)):
        ledger.remark(f"null values were removed, such as '{key}'", rows)
    ledger.leave_unused("context", Unused(1200, 9000, "Oslo is the capital of Norway"))
    ledger.leave_unused("source", Unused(1500, 400, "web", is_record=True))
    ledger.note("a note")
    ledger.example("broken row", "a.jsonl, row 3: no messages")
    return ledger


LINES = [
    "3 turns without a label: the template trims it",
    "1,200 rows: the template does not write the description of a tool",
    "1 row: the template does not write a tool result",
    "split_turns: true would train 38 of the 40 lost conversations that were tried with it",
    "1 row: the answer ends in the template's end token",
    "1,234 rows: the prompt looks rendered already",
    "1,300 rows: null values were removed, such as 'a', 'b', 'c' and 1 more",
    "Nothing reads context: 1,200 rows, 45.0% of all characters outside dropped rows, "
    "for example: Oslo is the capital of Norway",
    "Nothing reads title: 1,500 rows, 5.0% of all characters outside dropped rows, for example: no record",
    "Nothing reads notes: 2 rows, 0.5% of all characters outside dropped rows, for example: see page 5",
    "Records that nothing reads, with their rows and share of all characters outside dropped rows: "
    "source (1,500 rows, 2.0%), id (1 row, 1.5%)",
    "a note",
    "dropped, broken row: a.jsonl, row 3: no messages",
]


def test_each_fact_has_its_line():
    assert ledger_lines(make_ledger()) == LINES
    assert ledger_lines(Ledger.from_dict(json.loads(json.dumps(make_ledger().to_dict())))) == LINES
    assert ledger_lines(Ledger()) == []


def test_records_alone_or_unused_columns_alone_have_no_empty_line():
    ledger = Ledger(characters=20)
    ledger.leave_unused("id", Unused(1, 1, "7", is_record=True))
    assert ledger_lines(ledger) == [
        "Records that nothing reads, with their rows and share of all characters: id (1 row, 5.0%)"
    ]
    ledger = Ledger()
    ledger.leave_unused("empty", Unused(1))
    assert ledger_lines(ledger) == ["Nothing reads empty: 1 row, 0.0% of all characters, for example: "]


@pytest.mark.parametrize(
    "text, shown",
    [
        ("two\nlines\r\n", r"two\nlines\r\n"),
        ("a\tb\x1b[2J\x00\x85\u2028\u2029", r"a\tb\x1b[2J\x00\x85\u2028\u2029"),
        ("\ud800 \udfff", r"\ud800 \udfff"),
        ("naïve 中文\u3000 👩\u200d🔬 \\", "naïve 中文\u3000 👩\u200d🔬 \\"),
    ],
)
def test_a_text_becomes_one_line_that_utf_8_can_hold(text, shown):
    assert one_line(text) == shown
    assert one_line(text).splitlines() == [shown] and shown.encode()


def test_every_character_is_printed_on_one_line():
    text = "".join(map(chr, range(sys.maxunicode + 1)))
    assert len(one_line(text).splitlines()) == 1 and one_line(text).encode()


def test_the_page_and_run_json_have_the_same_facts_even_with_half_a_surrogate_pair(tmp_path):
    ledger = make_ledger()
    ledger.leave_unused("key \ud800", Unused(1, 1, "half \udfff"))
    ledger.read("caf\udce9.jsonl")
    Record(tmp_path, main=True).update(status="done", ledger=ledger.to_dict())
    run = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert Ledger.from_dict(run["ledger"]) == ledger
    Record(tmp_path, main=True).update(status="running")
    Record(tmp_path, main=False).fail("half \ud800")
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["error"] == "half \ud800"
    Record(tmp_path, main=True).update(status="done", ledger=ledger.to_dict())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert all(f"<p>{line.replace(chr(39), '&#x27;')}</p>" in page for line in ledger_lines(ledger))


def test_a_text_file_holds_half_a_surrogate_pair_as_its_escape(tmp_path):
    write_atomically(tmp_path / "x.json", json.dumps({"a\udce9": "中 \ud800"}, ensure_ascii=False))
    assert (tmp_path / "x.json").read_bytes() == '{"a\\udce9": "中 \\ud800"}'.encode()


def test_many_names_are_summed_up():
    ledger = Ledger(characters=10_000)
    for k in range(25):
        ledger.leave_unused(f"k{k:02}", Unused(2, 100 - k, "x"))
        ledger.leave_unused(f"r{k:02}", Unused(1, 10, "7", is_record=True))
    lines = ledger_lines(ledger)
    assert len(lines) == 22 and lines[19] == "Nothing reads k19: 2 rows, 0.8% of all characters, for example: x"
    assert lines[20] == "Nothing reads 5 more names, such as k20, k21, k22: 3.9% of all characters"
    assert lines[21].endswith("r19 (1 row, 0.1%), and 5 more")
