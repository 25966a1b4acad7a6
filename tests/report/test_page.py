"""report.html: every section, correct charts, and no text of a run that becomes HTML."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from accel_llm.data.ledger import Ledger
from accel_llm.report import page as page_module
from accel_llm.report.page import write_report

VOID = {"meta", "line"}  # `line` is written <line .../> inside an SVG
HOSTILE = "</pre><script>alert(\"x\")</script> <|im_end|> & 'quoted'"
SECTIONS = ["Curves", "Ledger", "Samples", "Settings", "In force", "Versions", "Also recorded"]


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

    def tiles(self) -> dict[str, tuple[str, str]]:
        """Headline label -> (number, remark)."""
        section = re.findall(
            r'<div class="box"><small>(.*?)</small><b>(.*?)</b><small>(.*?)</small></div>', self.source
        )
        return {label: (number, remark) for label, number, remark in section}


def write_page(folder: Path, run: dict[str, Any], lines: list[dict[str, Any]] | None = None) -> Page:
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
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


def test_title_and_headline_numbers(tmp_path):
    page = write_page(tmp_path, RUN, METRICS)
    assert page.texts("h1") == ["first-try"] and page.texts("title")[0] == "first-try: done"
    assert page.texts("p")[0] == "done started 2026-03-01T10:00:00+0000, ended 2026-03-01T10:12:31+0000"
    assert page.tiles() == {
        "Final loss": ("1.235", "step 100"),
        "eval/loss": ("4 → 1.5", "at step 0 and 100"),
        "eval/exact_match": ("0.03125 → 0.9688", "at step 0 and 100"),
        "Tokens per second": ("12,346", "median, all processes"),
        "Peak memory": ("1,700 MiB", "main process"),
        "Steps": ("100", "2 epochs, 4,321 supervised tokens"),
    }


def test_each_evaluated_number_has_a_chart_with_its_values_in_training(tmp_path):
    lines = [{"step": step, "rewards/margins": step / 8, "loss": 1.0} for step in (1, 2, 3)]
    lines += [{"step": step, "eval/loss": 1.0, "eval/rewards/margins": 0.5, "eval/once": 1.0} for step in (0, 3)]
    del lines[-1]["eval/once"]
    captions = write_page(tmp_path, RUN, [*lines, {"step": 3, "eval/<b>": 1}, {"step": 4, "eval/<b>": 2}]).texts(
        "figcaption"
    )
    assert captions[:3] == [
        "Loss by step ● train ● eval",
        "rewards/margins by step ● train ● eval",
        "<b> by step ● eval",
    ]
    assert len(captions) == 3 + len(page_module.METRIC_CHARTS)


def test_name_is_the_runs_own_else_its_option_else_the_folder(tmp_path):
    assert write_page(tmp_path, RUN | {"run_name": "mine"}).texts("h1") == ["mine"]
    assert write_page(tmp_path, {"options": {"run_name": None}}).texts("h1") == [tmp_path.name]


def test_a_failed_run_shows_its_error(tmp_path):
    page = write_page(tmp_path, {"status": "failed", "error": "ValueError: a < b"})
    assert page.texts("pre", "failed") == ["\nValueError: a < b"] and page.texts("span", "status failed") == ["failed"]
    assert write_page(tmp_path, RUN).texts("pre", "failed") == []


def test_problems_of_a_run_that_is_done_stand_at_the_top(tmp_path):
    page = write_page(tmp_path, RUN | {"status": "done", "problems": ["wandb <is> away", "No card."]})
    assert page.texts("pre", "failed") == ["\nwandb <is> away", "\nNo card."]


def test_every_section_stands_once_and_in_order(tmp_path):
    for run in (RUN, {}):
        assert write_page(tmp_path, run, METRICS).texts("h2") == SECTIONS


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = write_page(tmp_path, RUN, METRICS)
    assert not {tag for tag, _, _ in page.elements} & {"script", "link", "img", "iframe", "object", "base", "use"}
    assert not {name for _, attributes, _ in page.elements for name in attributes} & {"src", "href", "style", "onload"}
    (style,) = page.texts("style")
    assert "@media (prefers-color-scheme: dark)" in style and "url(" not in style and "@import" not in style
    metas = [attributes for tag, attributes, _ in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    assert any(meta.get("content", "").startswith("default-src 'none'") for meta in metas)


def test_ledger_table_has_every_bin_and_the_lost_share(tmp_path):
    page = write_page(tmp_path, RUN)
    assert page.texts("tr", "read") == ["a.jsonlread1,20010040"]
    assert page.texts("tr", "trained") == ["trained1,1007540"] and page.texts("tr", "held out") == ["held out8800"]
    assert page.texts("tr", "lost") == ["dropped: broken row1200", "cut: truncated0250"]
    assert page.texts("p")[1:4] == [
        "1.00% of the rows and 25.00% of the supervised tokens were cut or dropped.",
        "3 turns without a label: not the last one",
        "Rows of <b> were mixed.",
    ]


def test_samples_are_marked_right_wrong_or_not_at_all(tmp_path):
    page = write_page(tmp_path, RUN)
    right, incorrect, open_ended = page.texts("div", "box")[-3:]
    # The newline after <pre> is the browser's to drop; the second one of the last sample is the model's own.
    assert right == "prompt\n2+2=expected\n4<|im_end|>generated\n4<|im_end|>✓ right"
    assert incorrect == "prompt\n3+3=expected\n6generated\n7✗ wrong"
    assert open_ended == "prompt\nOncegenerated\n\nupon a time"


def test_many_samples_are_folded_and_none_is_lost(tmp_path):
    samples = [{"prompt": f"question {k}."} for k in range(25)]
    page = write_page(tmp_path, {"samples": samples})
    (folded,) = page.texts("details")
    assert folded == "5 more" + "".join(f"prompt\nquestion {k}." for k in range(20, 25))
    assert page.texts("pre") == [f"\nquestion {k}." for k in range(25)]
    assert write_page(tmp_path, {"samples": samples[:20]}).texts("details") == []


def test_settings_and_versions_are_tables_with_nested_ones_folded(tmp_path):
    page = write_page(tmp_path, RUN)
    settings_table, in_force, versions, others = page.texts("table", "pairs")
    assert settings_table == 'run_namefirst-trylearning_rate2e-05train_files[\n  "a",\n  "b"\n]bf16trueseednull'
    assert in_force.startswith("strategyzero2deepspeed1 values\n{")
    assert versions == "python3.11.7git_commitabc123-dirtytorch2.13.0"
    assert others.startswith("data1 values")
    assert page.texts("details")[0] == '1 values\n{\n  "zero_optimization": {\n    "stage": 2\n  }\n}'


def test_a_curve_of_three_points_lies_where_a_ruler_puts_it(tmp_path):
    # Plot area: x 56..406 for steps 0..100, y 10 (top) .. 190 for the outermost ticks: 1..4 and 0..2e-05.
    lines = [
        {"step": 0, "loss": 4.0, "eval/loss": 3.0, "learning_rate": 0.0},
        {"step": 50, "loss": 2, "learning_rate": 2e-5},
        {"step": 100, "loss": 1.0, "eval/loss": 1.5, "learning_rate": 1e-5},
    ]
    page = write_page(tmp_path, {}, lines)
    assert [path["d"] for path in page.all("path", "train")] == [
        "M56.0,10.0 L231.0,130.0 L406.0,190.0",
        "M56.0,190.0 L231.0,10.0 L406.0,100.0",
    ]
    assert [path["d"] for path in page.all("path", "eval")] == ["M56.0,70.0 L406.0,160.0"]
    dots = [(float(dot["cx"]), float(dot["cy"])) for dot in page.all("circle", "train")]
    assert sorted(dots[:3]) == [(56.0, 10.0), (231.0, 130.0), (406.0, 190.0)]
    assert sorted(page.texts("title")[1:4]) == ["step 0: 4", "step 100: 1", "step 50: 2"]
    loss_axes = ["1", "2", "3", "4", "0", "50", "100"]
    assert page.texts("text") == [*loss_axes, "0", "5e-06", "1e-05", "1.5e-05", "2e-05", "0", "50", "100"]


def test_a_value_that_is_not_finite_breaks_the_line_and_is_reported(tmp_path):
    values = [4.0, 3.0, math.nan, 2.0, math.inf, 1.0]
    page = write_page(tmp_path, {}, [{"step": k, "loss": value} for k, value in enumerate(values)])
    (path,) = page.all("path", "train")
    assert re.sub(r"[\d.,]+", "", path["d"]) == "M L M M"
    assert page.texts("span", "wrong") == ["not a finite number at step 2, 4"]
    assert page.tiles()["Final loss"] == ("1", "step 5")
    page = write_page(tmp_path, {}, [{"step": k, "loss": math.nan} for k in range(1, 9)])
    assert page.texts("span", "wrong") == ["not a finite number at step 1, 2, 3, 4, 5 and 3 more"]
    assert page.tiles()["Final loss"] == ("nan", "step 8") and page.all("path", "train") == []


def test_long_runs_keep_every_point_in_the_line_and_thin_the_dots(tmp_path):
    page = write_page(tmp_path, {}, [{"step": k, "loss": 1000.0 / k} for k in range(1, 1002)])
    (path,) = page.all("path", "train")
    assert len(path["d"].split()) == 1001
    dots = page.texts("circle", "train hidden")
    assert 150 <= len(dots) <= 200 and dots[0] == "step 1,001: 0.999"


def confusions(counts: list[list[int]], names: list[str] | None = None, **more: Any) -> dict[str, Any]:
    total, right = sum(map(sum, counts)), sum(row[k] for k, row in enumerate(counts))
    names = names or [f"class {k}" for k in range(len(counts))]
    return {"names": names, "counts": counts, "classes": len(counts), "rows": total, "right": right} | more


def test_the_confusion_matrix_is_a_table_of_shares(tmp_path):
    page = write_page(tmp_path, RUN | {"confusion_matrix": confusions([[8, 2, 0], [0, 0, 0], [1, 0, 3]])}, METRICS)
    assert page.texts("h2") == [SECTIONS[0], "Confusion matrix", *SECTIONS[1:]]
    caption = "Rows are the true classes, columns what the model took a text for. Right: 11 of 14 texts."
    assert caption in page.texts("figcaption")
    cells = [(name["class"], float(name["fill-opacity"])) for tag, name, _ in page.elements if tag == "rect"]
    # 0.06 + 0.54 * 0.8 is the share of 8 in the 10 texts of its class.
    assert cells[:3] == [("right", 0.49), ("wrong", 0.17), ("wrong", 0.0)]
    assert [shade for _, shade in cells[3:]] == [0.0, 0.0, 0.0, 0.2, 0.0, 0.47] and cells[8][0] == "right"
    assert page.texts("rect")[1] == "class 0 taken for class 1: 2"
    assert page.texts("text")[-4:] == ["8", "2", "1", "3"]
    # A row is a true class: its cells lie at one height, next to its name.
    rects = [attributes for tag, attributes, _ in page.elements if tag == "rect"]
    assert len({rect["y"] for rect in rects[:3]}) == 1 and len({rect["x"] for rect in rects[:3]}) == 3
    assert not {name for _, attributes, _ in page.elements for name in attributes} & {"src", "href", "style", "onload"}
    # Without one, or if scores were not finite, there is no such section.
    assert write_page(tmp_path, RUN | {"confusion_matrix": None}, METRICS).texts("h2") == SECTIONS


def test_a_large_confusion_matrix_has_its_counts_under_the_pointer(tmp_path):
    counts = [[int(i == j) * 7 for j in range(50)] for i in range(50)]
    page = write_page(tmp_path, {"confusion_matrix": confusions(counts, classes=120, rows=900)})
    assert len(page.texts("rect")) == 2500 and page.texts("rect")[51] == "class 1 taken for class 1: 7"
    assert len(page.texts("text")) == 100
    assert page.texts("figcaption")[-1].endswith("Of 120 classes these are the 50 that are most often confused.")


def test_names_of_classes_are_only_ever_text(tmp_path):
    page = write_page(tmp_path, {"confusion_matrix": confusions([[1, 0], [0, 1]], [HOSTILE, "中" * 40])})
    assert page.texts("script") == [] and page.texts("rect")[0] == f"{HOSTILE} taken for {HOSTILE}: 1"
    assert page.texts("text")[2] == "中" * 23 + "…"


def test_hostile_text_is_only_ever_text(tmp_path):
    amount = {"rows": 1, "supervised": 1, "context": 1}
    run = {
        "run_name": HOSTILE, "status": HOSTILE, "started": HOSTILE, "ended": HOSTILE, "error": HOSTILE,
        "python": HOSTILE, "git_commit": HOSTILE, "packages": {HOSTILE: HOSTILE}, HOSTILE: HOSTILE,
        "options": {HOSTILE: HOSTILE, "listed": [HOSTILE]}, "accelerate": {HOSTILE: {HOSTILE: HOSTILE}},
        "samples": [{"prompt": HOSTILE, "expected": HOSTILE, "generated": HOSTILE}],
        "ledger": {"inputs": {HOSTILE: amount}, "bins": {HOSTILE: {f"cut: {HOSTILE}": amount, HOSTILE: amount}},
                   "turns_without_label": {HOSTILE: 1}, "notes": [HOSTILE]},
    }  # fmt: skip
    page = write_page(tmp_path, run, [{"step": 1, f"eval/{HOSTILE}": 1.0}])
    assert page.texts("script") == []
    names = {name for _, attributes, _ in page.elements for name in attributes}
    assert names <= {"lang", "charset", "name", "content", "http-equiv", "class", "scope"}
    (body,) = page.texts("body")
    # Title line and error 5, tile 1, ledger 5, sample 3, settings 2, in force 1, versions 4, also recorded 2.
    assert body.count(HOSTILE) == 23 and body.count(json.dumps(HOSTILE)) == 3


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    page = write_page(tmp_path, {"samples": [{"prompt": "\ud83d!", "generated": "\U0001f600"}]})
    assert page.texts("pre") == ["\n?!", "\n\U0001f600"]


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


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_metrics_still_make_a_page(tmp_path, name):
    page = write_page(tmp_path, {}, DEGENERATE[name])
    assert page.texts("h2") == SECTIONS and len(page.texts("figure", "box")) == 4


def test_single_point_is_a_visible_dot_in_the_middle(tmp_path):
    (dot,) = write_page(tmp_path, {}, [{"step": 7, "loss": 1.5}]).all("circle", "train")
    assert (dot["cx"], dot["r"]) == ("231.0", "3")


def test_without_metrics_or_with_null_facts_the_page_says_so(tmp_path):
    page = write_page(tmp_path, dict.fromkeys(RUN))
    assert page.tiles() == {"Steps": ("0", "")} and page.texts("h1") == [tmp_path.name]
    assert page.texts("figcaption")[0] == "Loss: nothing to draw"
    assert page.texts("p")[1:4] == [
        "The run wrote no ledger.",
        "The run generated no samples.",
        "Nothing was recorded.",
    ]


def test_a_line_cut_short_is_passed_over(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n[1]\n{"step": 2, "lo', encoding="utf-8")
    assert write_page(tmp_path, {}).tiles()["Final loss"] == ("2", "step 1")


def test_an_open_old_page_can_be_read_to_its_end(tmp_path):
    write_page(tmp_path, RUN)
    with (tmp_path / "report.html").open(encoding="utf-8") as old:
        write_page(tmp_path, {"run_name": "second"})
        assert Page(old.read()).texts("h1") == ["first-try"]


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_page(tmp_path, RUN)
    before = (tmp_path / "report.html").read_bytes()
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(json.JSONDecodeError):
        write_report(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_bytes() == before


@pytest.mark.parametrize("html", ["<p><b></p></b>", "<p>", "<p></p></p>"])
def test_the_balance_check_sees_what_is_not_balanced(html):
    with pytest.raises((AssertionError, IndexError)):
        Page(html)


@settings(deadline=None)
@given(st.lists(st.floats(-1e299, 1e299, allow_nan=False), min_size=1, max_size=5), st.booleans())
@example([1.0, 1.0 + 2**-52], False)
@example([5e-324], True)
def test_ticks_enclose_the_values_and_tell_themselves_apart(values, from_zero):
    low, high = page_module._axis_range([*values, *[0.0] * from_zero])
    ticks = page_module._round_ticks((low, high))
    slack = 1e-8 * (high - low)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] <= min(values) + slack and max(values) - slack <= ticks[-1]
    assert len({page_module._format_number(tick, 6) for tick in ticks}) == len(ticks)
