"""report.html: every section, a policy that lets only its own scripts run, and no text of a run that becomes HTML."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from pages import DEGENERATE, HOSTILE, METRICS, RUN, Page, hostile_run, write_page

from accel_llm.report import page_html
from accel_llm.report.page import read_metrics, write_report

SECTIONS = ["Curves", "Answers", "Ledger", "Rows", "Memory", "Settings", "Starts", "In force", "Versions"]
SECTIONS += ["Also recorded"]
# SHA-256 of the files in the npm package uplot 1.6.32 (dist/ and LICENSE).
PUBLISHED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}


def test_the_plotting_library_is_the_published_one(tmp_path):
    folder = Path(page_html.__file__).parent / "uplot"
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == PUBLISHED
    page = write_page(tmp_path, RUN)
    assert page.texts("script")[1] == (folder / "uPlot.iife.min.js").read_text(encoding="utf-8")
    assert f"(v{page_html.UPLOT_VERSION})" in page.texts("script")[1]
    assert page.texts("pre")[-1] == "\n" + (folder / "LICENSE").read_text(encoding="utf-8")


def test_title_and_headline_numbers(tmp_path):
    page = write_page(tmp_path, RUN, METRICS)
    assert page.texts("h1") == ["first-try"] and page.texts("title")[0] == "first-try: done"
    status = "done started 2026-03-01 10:00:00 +0000, ended 2026-03-01 10:12:31 +0000, it took 12 min 31 s"
    assert page.texts("p")[0] == status
    assert page.tiles() == {
        "Final loss": ("1.235", "step 100"),
        "eval/loss": ("4 → 1.5", "at step 0 and 100"),
        "eval/exact_match": ("0.03125 → 0.9688", "at step 0 and 100"),
        "Tokens per second": ("12,346", "median, all processes"),
        "Peak memory": ("1,700 MiB", "main process"),
        "Steps": ("100", "2 epochs, 4,321 supervised tokens"),
    }


def test_a_run_that_goes_on_says_so_and_when_the_page_was_written(tmp_path):
    page = write_page(tmp_path, RUN | {"status": "running", "ended": None}, METRICS)
    (written,) = page.texts("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}", written)
    assert page.texts("p")[0].endswith(f"this page was written {written} at step 100; load it again to see more")
    assert "time" not in {tag for tag, _, _ in write_page(tmp_path, RUN, METRICS).elements}


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


def test_the_page_needs_nothing_from_outside_and_runs_only_its_own_scripts(tmp_path):
    page = write_page(tmp_path, RUN, METRICS)
    assert not {tag for tag, _, _ in page.elements} & {"link", "img", "iframe", "object", "base", "use"}
    assert not {name for _, attributes, _ in page.elements for name in attributes} & {"src", "href", "style", "onload"}
    (style,) = page.texts("style")
    assert "@media (prefers-color-scheme: dark)" in style and "url(" not in style and "@import" not in style
    metas = [attributes for tag, attributes, _ in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas

    # The policy names the hashes of what is in the page, and stands before everything that it is about.
    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    data, *programs = page.texts("script")
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ") == [
        "default-src 'none'",
        f"script-src {' '.join(map(source, programs))}",
        f"style-src {source(style)}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert page.source.index("Content-Security-Policy") < page.source.index("<style") < page.source.index("<script")
    assert "<" not in data and len(programs) == 2


def test_ledger_table_has_every_bin_and_the_lost_share(tmp_path):
    page = write_page(tmp_path, RUN)
    assert page.texts("tr", "read") == ["a.jsonlread1,20010040"]
    assert page.texts("tr", "trained") == ["trained1,1007540"] and page.texts("tr", "held out") == ["held out8800"]
    assert page.texts("tr", "lost") == ["dropped: broken row1200", "cut: truncated0250"]
    remarks = page.texts("p")
    first = remarks.index("1.00% of the rows and 25.00% of the supervised tokens were cut or dropped.")
    assert remarks[first + 1 : first + 3] == ["3 turns without a label: not the last one", "Rows of <b> were mixed."]


def test_samples_of_an_older_run_are_marked_right_wrong_or_not_at_all(tmp_path):
    page = write_page(tmp_path, RUN)
    right, incorrect, open_ended = [text for text in page.texts("div", "box") if text.startswith("prompt")]
    # The newline after <pre> is the browser's to drop; the second one of the last sample is the model's own.
    assert right == "prompt\n2+2=expected\n4<|im_end|>generated\n4<|im_end|>✓ right"
    assert incorrect == "prompt\n3+3=expected\n6generated\n7✗ wrong"
    assert open_ended == "prompt\nOncegenerated\n\nupon a time"


def test_many_samples_are_folded_and_none_is_lost(tmp_path):
    samples = [{"prompt": f"question {k}."} for k in range(25)]
    page = write_page(tmp_path, {"samples": samples})
    folded = page.texts("details")[0]
    assert folded == "5 more" + "".join(f"prompt\nquestion {k}." for k in range(20, 25))
    assert page.texts("pre")[:-1] == [f"\nquestion {k}." for k in range(25)]
    assert "5 more" not in write_page(tmp_path, {"samples": samples[:20]}).source


def answers_at(step: int, *generated: str) -> dict[str, Any]:
    expected = ["4", "6"]
    answers = [{"prompt": f"{k}+{k}=", "expected": expected[k - 2], "generated": generated[k - 2]} for k in (2, 3)]
    return {"step": step, "answers": answers}


def test_answers_of_evaluations_stand_side_by_side(tmp_path):
    evaluations = [answers_at(0, "x", "y"), answers_at(50, "4", "7"), answers_at(100, "4", "6")]
    page = write_page(tmp_path, RUN, METRICS, evaluations)
    (table,) = page.texts("table", "answers")
    head = "promptexpectedstep 0step 50step 100"
    assert table == f"{head}\n2+2=\n4\nx\n4\n4\n3+3=\n6\ny\n7\n6"
    assert page.texts("pre", "right") == ["\n4", "\n4", "\n6"]
    assert "All 3 samples of the last evaluation" in page.texts("details")[0]


def test_of_many_evaluations_some_are_shown_the_first_and_the_last_among_them(tmp_path):
    page = write_page(tmp_path, RUN, METRICS, [answers_at(k, "4", "6") for k in range(0, 1100, 100)])
    (head,) = [text for text in page.texts("tr") if text.startswith("promptexpected")]
    assert head == "promptexpected" + "".join(f"step {k:,}" for k in (0, 200, 400, 600, 800, 1000))
    assert "6 of 11 evaluations are shown." in page.texts("p")


def test_settings_that_differ_from_the_defaults_come_first_and_others_are_folded(tmp_path):
    page = write_page(tmp_path, RUN | {"changed_options": ["learning_rate", "gone"]})
    changed, others = page.texts("table", "pairs")[:2]
    assert changed == "learning_rate2e-05"
    assert others == 'run_namefirst-trytrain_files[\n  "a",\n  "b"\n]bf16trueseednull'
    assert f"4 settings with their defaults{others}" in page.texts("details")
    # An older run does not say which differ.
    assert write_page(tmp_path, RUN).texts("table", "pairs")[0].startswith("run_namefirst-trylearning_rate2e-05")


def test_versions_and_what_is_in_force_are_tables(tmp_path):
    page = write_page(tmp_path, RUN)
    in_force, versions, others = page.texts("table", "pairs")[1:]
    assert in_force.startswith("strategyzero2deepspeed1 values\n{")
    assert versions == "python3.11.7git_commitabc123-dirtytorch2.13.0"
    assert others.startswith("data1 values")


def test_memory_stands_by_term_beside_the_measured_peak(tmp_path):
    memory = {"device_mb": 24000, "estimated_mb": {"weights": 900, "optimizer": 700}, "peak_memory_mb": 1600}
    page = write_page(tmp_path, RUN | {"memory": memory}, METRICS)
    (table,) = page.texts("table", "memory")
    peaks = "estimated peak1,600 MiBmeasured peak1,700 MiBthe device has24,000 MiB"
    assert table == f"weights900 MiBoptimizer700 MiB{peaks}"
    assert "The measured peak is 106% of the estimate." in page.texts("p")
    bars = [attributes for tag, attributes, _ in page.elements if tag == "meter"]
    assert [float(bar["value"]) / float(bar["max"]) for bar in bars] == [900 / 1700, 700 / 1700, 1600 / 1700, 1]
    assert write_page(tmp_path, {"memory": {}}, METRICS).texts("table", "memory") == ["measured peak1,700 MiB"]


def test_starts_are_listed_with_what_changed(tmp_path):
    first = {"started": "A", "step": 0, "processes": 1, "status": "killed"}
    second = {"started": "B", "step": 1500, "processes": 2, "differ": {"torch": ["2.12", "2.13"], "new": [None, "1"]}}
    page = write_page(tmp_path, RUN | {"starts": [first, second]})
    (table,) = page.texts("table", "starts")
    ended = "done 2026-03-01 10:12:31 +0000"
    assert table.endswith(f"start beforeA01killedB1,5002{ended}torch 2.12 → 2.13, new None → 1")
    assert page.charts()["marks"] == [1500]


def test_rows_are_coloured_and_their_lengths_go_into_a_histogram(tmp_path):
    lengths = {"shortest": 3, "median": 5, "longest": 9, "edges": [3, 6, 9, 12], "counts": [2, 1, 1]}
    shown = [{"name": "a, row 1: 3 tokens", "texts": {"chosen": [[False, "Hi <"], [True, "Ho >"]]}}]
    page = write_page(tmp_path, {"rows": {"unit": "pair", "count": 4, "lengths": lengths, "shown": shown}})
    assert "Tokens of a pair: shortest 3, median 5, longest 9; 4 pairs" in page.texts("figcaption")
    assert page.charts()["lengths"] == lengths
    assert page.texts("span", "trained")[-1] == "Ho >" and page.texts("span", "context")[-1] == "Hi <"
    (box,) = [text for text in page.texts("div", "box") if text.startswith("a, row 1")]
    assert box == "a, row 1: 3 tokenschosen\nHi <Ho >"


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
    assert any(text.endswith("Of 120 classes these are the 50 that are most often confused.")
               for text in page.texts("figcaption"))  # fmt: skip


def test_names_of_classes_are_only_ever_text(tmp_path):
    page = write_page(tmp_path, {"confusion_matrix": confusions([[1, 0], [0, 1]], [HOSTILE, "中" * 40])})
    assert len(page.texts("script")) == 3
    assert page.texts("rect")[1].endswith(f"taken for {'中' * 40}: 0") and HOSTILE[:20] in page.texts("rect")[0]
    assert page.texts("text")[2] == "中" * 23 + "…"


def test_hostile_text_is_only_ever_text(tmp_path):
    answers = [{"step": 1, "answers": hostile_run()["samples"]}]
    lines = [{"step": step, f"eval/{HOSTILE}": 1.0, HOSTILE: None} for step in (1, 2)]
    page = write_page(tmp_path, hostile_run(), lines, answers)
    harmless = write_page(tmp_path, json.loads(json.dumps(hostile_run()).replace(json.dumps(HOSTILE)[1:-1], "x")),
                          json.loads(json.dumps(lines).replace(json.dumps(HOSTILE)[1:-1], "x")),
                          json.loads(json.dumps(answers).replace(json.dumps(HOSTILE)[1:-1], "x")))  # fmt: skip

    def shape(page: Page) -> list[tuple[str, list[str]]]:
        return [(tag, list(attributes)) for tag, attributes, _ in page.elements]

    # The same elements and attributes as with harmless texts in its place, and the texts as they are.
    assert shape(page) == shape(harmless) and len(page.texts("script")) == 3
    assert page.charts()["charts"][1]["title"] == HOSTILE
    (body,) = page.texts("body")
    assert body.count(HOSTILE) >= 30


def test_half_a_surrogate_pair_can_be_written(tmp_path):
    page = write_page(tmp_path, {"samples": [{"prompt": "\ud83d!", "generated": "\U0001f600"}]})
    assert page.texts("pre")[:2] == ["\n?!", "\n\U0001f600"]


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_metrics_still_make_a_page(tmp_path, name):
    page = write_page(tmp_path, {}, DEGENERATE[name])
    assert page.texts("h2") == SECTIONS and len(page.charts()["charts"]) == 4


def test_without_metrics_or_with_null_facts_the_page_says_so(tmp_path):
    page = write_page(tmp_path, dict.fromkeys(RUN))
    assert page.tiles() == {"Steps": ("0", "")} and page.texts("h1") == [tmp_path.name]
    assert page.texts("figcaption")[0] == "Loss: nothing to draw"
    said = ["The run generated no samples.", "The run wrote no ledger.", "The run recorded no rows."]
    assert [text for text in page.texts("p") if text.startswith("The run")] == said
    assert page.texts("p").count("Nothing was recorded.") == 4


def test_a_line_cut_short_is_passed_over(tmp_path):
    text = '{"step": 1, "loss": 2.0}\n[1]\n{"step": 3, "loss": null}\n{"step": 2, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first == {"step": 1, "loss": 2.0} and second["step"] == 3 and second["loss"] != second["loss"]


def test_no_run_makes_a_page_of_two_megabytes(tmp_path):
    long, names = "x<" * 3_000, [f"m{k}<" for k in range(300)]
    run = hostile_run() | {
        "error": long, "problems": [long] * 300, "options": {f"o{k}": long for k in range(300)},
        "changed_options": [f"o{k}" for k in range(250)], "samples": [{"prompt": long, "generated": long}] * 300,
        "packages": {f"p{k}{long}": long for k in range(100)}, "more": {f"p{k}": long for k in range(100)},
        "rows": {"unit": "row", "count": 1, "lengths": {"shortest": 1, "median": 1, "longest": 1, "edges": [1, 2],
                 "counts": [1]}, "shown": [{"name": long, "texts": {"": [[True, long]] * 50}}] * 3},
        "ledger": {"inputs": {f"{k}{long}": {"rows": 1} for k in range(300)}, "bins": {}, "turns_without_label": {},
                   "notes": [long] * 300},
        "starts": [{"started": long, "differ": {long: [long, long]}}] * 200,
        "confusion_matrix": confusions([[1] * 50] * 50, [f"{k}{'<' * 200}" for k in range(50)]),
    }  # fmt: skip
    lines = [{"step": k, "loss": 1 / k, "learning_rate": k * 1.23456e-9} for k in range(1, 5000)]
    lines += [{"step": k, **{name: k * 1.2345678 for name in names}} for k in range(1, 300)]
    answers = [
        {"step": k, "answers": [{"prompt": f"{j}{long}", "generated": long} for j in range(8)]} for k in range(60)
    ]
    page = write_page(tmp_path, run, lines, answers)
    assert len(page.source.encode()) < 2_000_000
    assert {text for text in page.texts("p") if "left out here" in text}


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
