"""Helpers for tests of pages: the files of a run, its page, and a parser that sees each element."""

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from accel_llm.data.ledger import Ledger
from accel_llm.report.page import write_report

VOID = {"meta", "line", "input"}
HOSTILE = "</pre></script><script>alert(\"x\")</script><!-- <|im_end|> & 'quoted'"


class Page(HTMLParser):
    """Parses a page into elements (tag, attributes, text inside). Fails if a start tag and its end tag do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.source = html
        self.open: list[tuple[str, dict[str, Any], list[str]]] = []
        self.elements: list[tuple[str, dict[str, Any], str]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        if tag in VOID:
            self.elements.append((tag, dict(attrs), ""))
        else:
            self.open.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        if tag not in VOID:
            opened, attributes, text = self.open.pop()
            assert opened == tag, f"<{opened}> is closed by </{tag}>"
            self.elements.append((tag, attributes, "".join(text)))

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def texts(self, tag: str, look: str | None = None) -> list[str]:
        return [
            text for name, attributes, text in self.elements if name == tag and look in (None, attributes.get("class"))
        ]

    def all(self, tag: str, look: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes, _ in self.elements if name == tag and attributes.get("class") == look]

    def charts(self) -> dict[str, Any]:
        """What page.js gets to draw."""
        (data,) = [text for tag, attributes, text in self.elements if attributes.get("id") == "charts"]
        return json.loads(data)

    def tiles(self) -> dict[str, tuple[str, str]]:
        """Headline label -> (number, remark)."""
        section = re.findall(
            r'<div class="box"><small>(.*?)</small><b>(.*?)</b><small>(.*?)</small></div>', self.source
        )
        return {label: (number, remark) for label, number, remark in section}


def write_run(
    folder: Path, run: dict[str, Any], lines: Sequence[dict[str, Any]] = (), answers: Sequence[dict[str, Any]] = ()
) -> None:
    """Write the files of a run; `lines` are those of metrics.jsonl, `answers` those of answers.jsonl."""
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    for name, values in (("metrics", lines), ("answers", answers)):
        if values:
            text = "".join(json.dumps(value) + "\n" for value in values)
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def write_page(
    folder: Path, run: dict[str, Any], lines: Sequence[dict[str, Any]] = (), answers: Sequence[dict[str, Any]] = ()
) -> Page:
    write_run(folder, run, lines, answers)
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def ledger_values() -> dict[str, Any]:
    ledger = Ledger()
    ledger.read("a.jsonl", rows=1200, supervised=100, context=40)
    ledger.count("a.jsonl", "trained", rows=1100, supervised=75, context=40)
    ledger.count("a.jsonl", "cut: truncated", rows=0, supervised=25)
    ledger.count("a.jsonl", "dropped: broken row", rows=12)
    ledger.count("a.jsonl", "held out", rows=88)
    ledger.skip_turns("not the last one", 3)
    ledger.note("Rows of <b> were mixed.")
    return ledger.to_dict()


RUN = {
    "status": "done",
    "started": "2026-03-01T10:00:00+0000",
    "ended": "2026-03-01T10:12:31+0000",
    "options": {"run_name": "first-try", "learning_rate": 2e-05, "train_files": ["a", "b"], "bf16": True, "seed": None},
    "accelerate": {"strategy": "zero2", "deepspeed": {"zero_optimization": {"stage": 2}}},
    "packages": {"torch": "2.13.0"},
    "git_commit": "abc123-dirty",
    "python": "3.11.7",
    "ledger": ledger_values(),
    "samples": [
        {"prompt": "2+2=", "expected": "4<|im_end|>", "generated": "4<|im_end|>"},
        {"prompt": "3+3=", "expected": "6", "generated": "7"},
        {"prompt": "Once", "generated": "\nupon a time"},
    ],
    "data": {"hash": "cafe"},
}
METRICS = [
    {"step": 0, "eval/loss": 4.0, "eval/supervised_tokens": 77},
    {"step": 0, "eval/exact_match": 0.03125},
    {
        "step": 1,
        "loss": 4.0,
        "learning_rate": 1e-5,
        "grad_norm": 3.5,
        "tokens_per_second": 900.0,
        "peak_memory_mb": 1500,
    },
    {
        "step": 50,
        "loss": 2.0,
        "learning_rate": 2e-5,
        "grad_norm": 2.5,
        "tokens_per_second": 12345.6,
        "peak_memory_mb": 1700,
    },
    {
        "step": 100,
        "loss": 1.23456,
        "tokens_per_second": 13000.0,
        "epoch": 2.0,
        "supervised_tokens": 4321,
        "peak_memory_mb": 1600,
    },
    {"step": 100, "eval/loss": 1.5, "eval/supervised_tokens": 77},
    {"step": 100, "eval/exact_match": 0.96875},
]
DEGENERATE = {
    "empty": [],
    "evaluation only": [{"step": 0, "eval/loss": 1.0}],
    "one point": [{"step": 7, "loss": 1.5, "learning_rate": 0.0, "grad_norm": 0, "tokens_per_second": 10.0}],
    "constant": [{"step": k, "loss": 2.0, "grad_norm": -1.0} for k in range(5)],
    "same step twice": [{"step": 3, "loss": 2.0}, {"step": 3, "loss": 1.0}],
    "huge": [{"step": 1, "loss": 1e308, "grad_norm": 10**400}, {"step": 2, "loss": -1e299}, {"step": 3, "loss": 1e299}],
    "tiny": [{"step": 1, "loss": 5e-324}, {"step": 2, "loss": 1e-320}],
    "wrong types": [
        {"step": 1, "loss": "low", "grad_norm": None, "eval/loss": [1]},
        {"step": "2", "loss": 1.0},
        {"loss": 3.0},
    ],
}


def hostile_run() -> dict[str, Any]:
    """A run whose every name and text tries to become markup."""
    amount = {"rows": 1, "supervised": 1, "context": 1}
    sample = {"prompt": HOSTILE, "expected": HOSTILE, "generated": HOSTILE}
    lengths = {"shortest": 1, "median": 1, "longest": 1, "edges": [1, 2], "counts": [1]}
    shown = [{"name": HOSTILE, "texts": {HOSTILE: [[True, HOSTILE], [False, HOSTILE]]}}]
    return {
        "run_name": HOSTILE, "status": HOSTILE, "started": HOSTILE, "ended": HOSTILE, "error": HOSTILE,
        "python": HOSTILE, "git_commit": HOSTILE, "packages": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE,
        "options": {HOSTILE: HOSTILE, "listed": [HOSTILE]}, "accelerate": {HOSTILE: {HOSTILE: HOSTILE}},
        "samples": [sample], "rows": {"unit": HOSTILE, "count": 1, "lengths": lengths, "shown": shown},
        "memory": {"estimated_mb": {HOSTILE: 3}},
        "starts": [{"started": HOSTILE, "status": HOSTILE, "differ": {HOSTILE: [HOSTILE, HOSTILE]}}],
        "ledger": {"inputs": {HOSTILE: amount}, "bins": {HOSTILE: {f"cut: {HOSTILE}": amount, HOSTILE: amount}},
                   "turns_without_label": {HOSTILE: 1}, "notes": [HOSTILE]},
    }  # fmt: skip
