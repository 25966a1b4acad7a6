"""report.html while a run trains: when it is written, what it says, and that no failure of it stops the run."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from pages import Page

from accel_llm.report import record as record_module
from accel_llm.report.answers_file import read_answers
from accel_llm.report.page import read_metrics, write_report
from accel_llm.report.record import MAX_STARTS, PAGE_PATIENCE, PAGE_SECONDS, Record, recording
from accel_llm.system.signals import Preempted


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_while_a_run_trains_the_page_says_so_and_is_not_written_too_often(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(record_module.time, "monotonic", lambda: now[0])
    with recording(tmp_path, True, {"options": {}}) as run:
        assert not (tmp_path / "report.html").exists()  # before the first logged step
        run.refresh_page()
        assert page_of(tmp_path).texts("span", "status running") == ["running"]
        (tmp_path / "report.html").unlink()
        now[0] += PAGE_SECONDS - 0.01
        run.refresh_page()
        assert not (tmp_path / "report.html").exists()
        now[0] += 0.02
        run.refresh_page()
        assert (tmp_path / "report.html").exists()
        (tmp_path / "report.html").unlink()
        run.refresh_page(now=True)
        assert (tmp_path / "report.html").exists()


def test_a_slow_page_is_written_the_more_seldom(tmp_path, monkeypatch):
    now = [0.0]

    def slow_report(folder: Path) -> None:
        now[0] += 2.0

    monkeypatch.setattr(record_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(record_module, "write_report", slow_report)
    with recording(tmp_path, True, {}) as run:
        run.refresh_page()
        assert run.page_due == 2.0 + 2.0 * PAGE_PATIENCE


@pytest.mark.parametrize("ends", [ValueError("the reason"), KeyboardInterrupt(), Preempted(signal.SIGTERM, 3)])
def test_a_run_that_fails_or_is_stopped_has_a_page_that_says_so(tmp_path, ends):
    with pytest.raises(type(ends)), recording(tmp_path, True, {"options": {}}):
        raise ends
    page = page_of(tmp_path)
    if isinstance(ends, Preempted):
        assert page.texts("span", "status preempted") == ["preempted"]
    else:
        assert page.texts("pre", "failed") == [f"\n{type(ends).__name__}: {ends}"]


def test_only_the_main_process_writes_pages_but_the_process_that_fails_first(tmp_path, monkeypatch):
    Record(tmp_path, True).update(status="running")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError), recording(tmp_path, False, {}) as run:
        run.refresh_page(now=True)
        assert not (tmp_path / "report.html").exists()
        raise ValueError("first")
    assert page_of(tmp_path).texts("pre", "failed") == ["\nValueError: first"]
    (tmp_path / "report.html").unlink()
    with pytest.raises(ValueError), recording(tmp_path, False, {}):
        raise ValueError("second")
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_fails_stops_nothing_and_is_said_once(tmp_path, monkeypatch, capsys):
    def fail(folder: Path) -> None:
        raise OSError("no room\nat all")

    with monkeypatch.context() as patch, recording(tmp_path, True, {}) as run:
        patch.setattr(record_module, "write_report", fail)
        for _ in range(3):
            run.refresh_page(now=True)
    printed = capsys.readouterr().out
    assert printed == "report.html cannot be written now (OSError: no room at all); the run goes on\n"
    assert facts_of(tmp_path)["status"] == "done" and "problems" not in facts_of(tmp_path)
    # Nor does it hide why a run fails.
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="the reason"):
        patch.setattr(record_module, "write_report", fail)
        with recording(tmp_path, True, {}):
            raise ValueError("the reason")


def test_the_history_tells_each_start_and_what_changed(tmp_path, monkeypatch):
    versions = {"python": "3.11", "git_commit": "abc", "packages": {"torch": "2.12", "peft": "0.21"}}
    monkeypatch.setattr(record_module, "environment", lambda: json.loads(json.dumps(versions)))
    with pytest.raises(Preempted), recording(tmp_path, True, {"options": {"seed": 1}}) as run:
        run.begin_after(0)
        raise Preempted(signal.SIGTERM, 5)
    versions["packages"]["torch"] = "2.13"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with recording(tmp_path, True, {}) as run:
        run.begin_after(5)
        # A process that is killed leaves its run.json as it is.
        killed = facts_of(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(killed), encoding="utf-8")
    with recording(tmp_path, True, {}) as run:
        run.begin_after(7)
    first, second, third = facts_of(tmp_path)["starts"]
    assert (first["status"], first["step"], first["processes"]) == ("preempted", 0, 1) and "ended" in first
    assert (second["status"], second["step"], second["processes"]) == ("killed", 5, 2) and "ended" not in second
    assert second["differ"] == {"torch": ["2.12", "2.13"]} and third["differ"] == {} and third["step"] == 7
    assert not any("versions" in start for start in (first, second, third))


def test_a_folder_of_an_older_version_goes_on_and_a_long_history_is_cut(tmp_path):
    Record(tmp_path, True).update(status="failed", started="long ago", ended="soon after")
    with recording(tmp_path, True, {}):
        pass
    assert facts_of(tmp_path)["starts"][0] == {"started": "long ago", "status": "failed", "ended": "soon after"}
    starts = [{"started": str(k)} for k in range(3 * MAX_STARTS)]
    Record(tmp_path, True).update(status="failed", started="x", starts=starts)
    with recording(tmp_path, True, {}):
        pass
    kept = facts_of(tmp_path)["starts"]
    assert len(kept) == MAX_STARTS and kept[0]["started"] == "0" and kept[-2]["started"] == str(3 * MAX_STARTS - 1)


@pytest.mark.parametrize("text", ["", "[1]", '{"status": "preempted", "step": 0}', '{"started": 1, "starts": 3}'])
def test_a_strange_run_json_begins_the_history_anew(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with recording(tmp_path, True, {}):
        pass
    assert len(facts_of(tmp_path)["starts"]) == 1


def test_a_run_writes_its_page_at_its_first_step_at_evaluations_and_saves(script, tiny, chats, tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []

    def watch(place: Path) -> Path:
        since = time.perf_counter()
        path = write_report(place)
        lines = read_metrics(place / "metrics.jsonl")
        saved = sorted(path.name[-1] for path in place.glob("checkpoints/step-*"))
        seen.append((lines[-1]["step"], "eval/loss" in lines[-1], saved, time.perf_counter() - since))
        return path

    monkeypatch.setattr(record_module, "write_report", watch)
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--eval_share", 0.3, "--eval_generate", 2]
    words += ["--max_length", 128, "--max_steps", 6, "--eval_steps", 2, "--save_steps", 3, "--save_total_limit", 9]
    words += ["--logging_steps", 1, "--output_dir", folder]
    script("sft", *words)
    # Step 2 is logged less than PAGE_SECONDS after step 1, so the next page is that of its evaluation.
    events = [(step, evaluated, saved) for step, evaluated, saved, _ in seen]
    assert events == [
        (1, False, []),
        (2, True, []),
        (3, False, ["3"]),
        (4, True, ["3"]),
        (6, False, ["3", "6"]),
        (6, True, ["3", "6"]),
    ]
    assert list(read_answers(folder)) == [2, 4, 6]

    # The facts of the page, after a run that really was.
    facts, page = facts_of(folder), page_of(folder)
    assert {"max_length", "max_steps", "output_dir"} <= set(facts["changed_options"])
    assert "weight_decay" not in facts["changed_options"] and facts["options"]["weight_decay"] is not None
    assert sum(facts["rows"]["lengths"]["counts"]) == facts["rows"]["count"] and len(facts["rows"]["shown"]) == 3
    assert any("<|im_end|>" in text for text in page.texts("span", "trained"))
    assert [start["step"] for start in facts["starts"]] == [0]
    (table,) = page.texts("table", "answers")
    assert table.startswith("promptexpectedstep 2step 4step 6")
    assert page.texts("span", "status done") == ["done"]

    # It goes on from step 3, as after a kill: the page's answers and history continue.
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    (folder / "run.json").write_text(json.dumps(facts | {"status": "running"}), encoding="utf-8")
    script("sft", *words)
    assert list(read_answers(folder)) == [2, 4, 6]
    starts = facts_of(folder)["starts"]
    assert [(start["step"], start.get("status")) for start in starts] == [(0, "killed"), (3, None)]
    assert page_of(folder).charts()["marks"] == [3]
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
