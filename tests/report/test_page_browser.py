"""Pages in a real browser: no error, no network, zoom, hover, log axis, smoothing, dark and light, phone width."""

import json
import math
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from browser import Browser
from pages import DEGENERATE, HOSTILE, RUN, hostile_run, write_page, write_run

from accel_llm.report.compare_runs import name_runs, read_run
from accel_llm.report.page import write_report
from accel_llm.report.page_compare import write_comparison

STEPS = 101
# The loss falls from 100 to 1 as straight as a line on a log axis.
CURVES = [
    {"step": k, "loss": 10 ** (2 - k / 50), "learning_rate": 2e-5 * (1 - k / 100), "grad_norm": 1 + math.sin(k)}
    for k in range(STEPS)
]
CURVES += [{"step": k, "eval/loss": 50.0 - k / 4} for k in (0, 50, 100)]
LENGTHS = {"shortest": 3, "median": 5, "longest": 9, "edges": [3, 6, 9, 12], "counts": [2, 1, 1]}
SHOWN = [{"name": "a, row 1", "texts": {"": [[False, "Hi "], [True, "Ho" * 300]]}}]
LIVE = RUN | {"rows": {"unit": "row", "count": 4, "lengths": LENGTHS, "shown": SHOWN}, "starts": [{"step": 40}]}
SHARES = (0.02, 0.5, 0.98)  # of the width of a chart: steps 2, 50 and 98
PLOT = "[data-chart='0'] .u-over"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    tab = Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_page(folder, LIVE, CURVES)
    return folder / "report.html"


def shown_steps(browser: Browser) -> tuple[int, int]:
    return browser.value("[first, last].map((box) => Number(box.value))")


def picture(browser: Browser, chart: int = 0) -> str:
    """The pixels of a chart."""
    return browser.value(f"document.querySelector('[data-chart=\"{chart}\"] canvas').toDataURL()")


def hover(browser: Browser, share: float, chart: int = 0) -> dict[str, str]:
    """Hold the pointer over a chart, at this share of its width; return what the legend says, by the curves' names."""
    selector = PLOT.replace("'0'", f"'{chart}'")
    browser.value(f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block: 'center'}})")
    left, top, width, height = browser.box(selector)
    browser.mouse("mouseMoved", left + share * width, top + height / 2)
    browser.settle()
    rows = f"[...document.querySelectorAll(\"[data-chart='{chart}'] .u-series\")]"
    pairs = browser.value(f"{rows}.map((row) => [...row.children].map((cell) => cell.textContent))")
    return dict(pairs)


def height_of_point(browser: Browser, share: float) -> float:
    """How high the point of the first curve under the pointer stands, as a share of the chart's height."""
    hover(browser, share)
    _, top, _, height = browser.box(PLOT)
    _, point, _, size = browser.box("[data-chart='0'] .u-cursor-pt")
    return 1 - (point + size / 2 - top) / height


def choose(browser: Browser, smoothing: float) -> None:
    browser.value(f"smoothing.value = '{smoothing}'; smoothing.dispatchEvent(new Event('change'))")
    browser.settle()


@pytest.mark.parametrize("dark", [False, True])
def test_a_page_loads_from_disk_without_an_error_and_without_the_network(browser, page, dark):
    browser.open(page, dark=dark)
    assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
    charts = browser.value("document.querySelectorAll('.plot .u-wrap').length")
    assert charts == 3  # loss, gradient norm, and the histogram of lengths
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    ink = browser.value("getComputedStyle(document.body).color")
    brightness = [sum(map(int, text[4:-1].split(", "))) for text in (paper, ink)]
    assert (brightness[0] < 100 and brightness[1] > 600) if dark else (brightness[0] > 700 and brightness[1] < 200)


def test_a_page_follows_when_the_system_turns_dark(browser, page):
    browser.open(page)
    light = picture(browser)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    browser.settle()
    assert picture(browser) != light


@pytest.mark.parametrize("width", [360, 800, 1400])
def test_nothing_scrolls_sideways_at_any_width(browser, page, width):
    browser.open(page, width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    # Each chart is as wide as its box.
    measured = "[box.clientWidth, box.querySelector('canvas').clientWidth]"
    widths = browser.value(f"[...document.querySelectorAll('.plot')].map((box) => {measured})")
    assert widths and all(0 <= box - canvas <= 1 for box, canvas in widths)


def test_dragging_zooms_all_charts_and_a_double_click_shows_all_again(browser, page):
    browser.open(page)
    before, other = picture(browser), picture(browser, 1)
    assert shown_steps(browser) == [0, 100]
    browser.value(f'document.querySelector("{PLOT}").scrollIntoView({{block: "center"}})')
    left, top, width, height = browser.box(PLOT)
    browser.drag((left + 0.2 * width, top + height / 2), (left + 0.6 * width, top + height / 2))
    assert shown_steps(browser) == [20, 60]
    assert picture(browser) != before and picture(browser, 1) != other
    assert hover(browser, 0.01)["step"] == "20" and hover(browser, 0.99, 1)["step"] == "60"
    hover(browser, 0.5)
    left, top, width, height = browser.box(PLOT)
    for clicks in (1, 2):
        for kind in ("mousePressed", "mouseReleased"):
            browser.mouse(kind, left + width / 2, top + height / 2, button="left", clickCount=clicks)
    browser.settle()
    assert shown_steps(browser) == [0, 100]
    # Fingers and keyboards have two fields.
    browser.value("first.value = 30; first.dispatchEvent(new Event('change'))")
    browser.settle()
    assert hover(browser, 0.001)["step"] == "30"
    assert browser.complaints() == []


def test_the_legend_tells_the_values_under_the_pointer(browser, page):
    browser.open(page)
    choose(browser, 0)
    values = hover(browser, 0.5)
    assert values == {"step": "50", "train": "10", "eval": "37.5", "learning rate": "1e-5"}
    # An evaluation is told from the nearest step that has one.
    assert hover(browser, 0.6)["eval"] == "37.5 (at 50)" and hover(browser, 0.6)["train"] == "6.3096"


def test_on_a_log_axis_equal_factors_have_equal_distances(browser, page):
    browser.open(page)
    choose(browser, 0)
    linear = [height_of_point(browser, share) for share in SHARES]
    browser.click("#log")
    logarithmic = [height_of_point(browser, share) for share in SHARES]
    assert linear[0] - linear[1] > 5 * (linear[1] - linear[2]) > 0
    assert logarithmic[0] - logarithmic[1] == pytest.approx(logarithmic[1] - logarithmic[2], abs=0.02)
    assert logarithmic[0] - logarithmic[2] > 0.5
    browser.click("#log")
    assert [height_of_point(browser, share) for share in SHARES] == pytest.approx(linear, abs=0.01)


def test_smoothing_is_the_moving_average_of_its_formula(browser, page):
    browser.open(page)
    choose(browser, 0.9)
    weights = [0.9 ** (50 - k) for k in range(51)]
    expected = sum(w * line["loss"] for w, line in zip(weights, CURVES, strict=False)) / sum(weights)
    values = hover(browser, 0.5)
    assert float(values["train, smoothed"]) == pytest.approx(expected, rel=1e-4) and values["train"] == "10"


def test_a_click_on_a_name_hides_its_curve_and_it_stays_hidden(browser, page):
    browser.open(page)
    whole = picture(browser)
    browser.click("[data-chart='0'] .u-series:last-child th")
    assert picture(browser) != whole
    browser.click("#log")
    assert browser.value("document.querySelector(\"[data-chart='0'] .u-series:last-child\").className").endswith(
        "u-off"
    )


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_metrics_are_drawn_without_an_error(browser, tmp_path, name):
    write_page(tmp_path, {}, DEGENERATE[name])
    browser.open(tmp_path / "report.html")
    browser.click("#log")
    assert browser.complaints() == []


def test_a_long_run_is_drawn(browser, tmp_path):
    lines = [{"step": k, "loss": 1000.0 / k if k % 100 else None, "grad_norm": 1.0} for k in range(1, 30_001)]
    write_page(tmp_path, RUN, lines)
    browser.open(tmp_path / "report.html")
    assert hover(browser, 0.5)["step"].replace(",", "").isdigit() and browser.complaints() == []


def test_hostile_text_runs_no_script_and_loads_nothing(browser, tmp_path):
    hostile = [
        HOSTILE,
        "<img src=x onerror=alert(1)>",
        "</script><script>document.title='taken'</script>",
        "javascript:alert(1)",
        "]]><svg onload=alert(1)>",
    ]
    for text in hostile:
        run = json.loads(json.dumps(hostile_run()).replace(json.dumps(HOSTILE)[1:-1], json.dumps(text)[1:-1]))
        lines = [{"step": step, f"eval/{text}": 1.0, "loss": 1.0} for step in (1, 2)]
        write_run(tmp_path, run, lines, [{"step": 1, "answers": run["samples"]}])
        browser.open(write_report(tmp_path))
        assert browser.value("document.title") == f"{text}: {text[:100]}"
        assert browser.value("document.querySelectorAll('img, svg, script').length") == 3
        assert browser.complaints() == [] and len(browser.requests()) == 1


def test_the_policy_stops_what_would_get_into_a_page(browser, page, tmp_path):
    """A negative control: with markup in the page no script of it runs and nothing is loaded, and the log says so."""
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    evil = f'<script>document.title="taken"</script><img src="http://127.0.0.1:{server.server_port}/x">'
    file = tmp_path / "page.html"
    file.write_text(page.read_text(encoding="utf-8").replace("<footer>", f"{evil}<footer>"), encoding="utf-8")
    browser.open(file)
    server.shutdown()
    server.server_close()
    assert browser.value("document.title") == "first-try: done" and asked == []
    assert len(browser.complaints()) == 2 and all("Content Security Policy" in text for text in browser.complaints())


def test_runs_over_one_another_are_switched_off_one_by_one(browser, tmp_path):
    for name, factor in (("first", 1), ("second", 2)):
        write_run(
            tmp_path / name,
            RUN | {"run_name": name},
            [{name: factor * line[name] if name == "loss" else line[name] for name in line} for line in CURVES],
        )
    runs = name_runs([read_run(str(tmp_path / name)) for name in ("first", "second")])
    write_comparison(runs, tmp_path / "compare.html")
    browser.open(tmp_path / "compare.html", 1000)
    choose(browser, 0)
    values = hover(browser, 0.5)
    assert (values["first: train"], values["second: train"]) == ("10", "20")
    assert browser.value("[...document.querySelectorAll('.runs label')].map((label) => label.textContent.trim())") == [
        "first", "second"
    ]  # fmt: skip
    both = picture(browser)
    browser.click("[data-run='1']")
    one = picture(browser)
    browser.click("[data-run='0']")
    assert len({both, one, picture(browser)}) == 3
    hidden = browser.value("document.querySelectorAll(\"[data-chart='0'] .u-legend .u-off\").length")
    assert hidden == 4  # train and eval of both
    browser.click("[data-run='0']")
    browser.click("[data-run='1']")
    assert picture(browser) == both and browser.complaints() == []


@pytest.mark.parametrize("in_ci", [True, False])
def test_without_a_browser_ci_fails_and_people_see_a_skip(tmp_path, monkeypatch, in_ci):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("CI", "true" if in_ci else "")
    with pytest.raises(pytest.fail.Exception if in_ci else pytest.skip.Exception, match="no Chromium"):
        Browser(tmp_path)
