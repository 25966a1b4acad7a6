"""The page that lays several runs over one another."""

from pathlib import Path

from accel_llm.report.compare_runs import RunFiles, compare_runs, comparison_notes
from accel_llm.report.page import CONTROLS
from accel_llm.report.page_curves import chart_data, chart_figures, charts_of
from accel_llm.report.page_html import cut_text, escape_html, page_document, plain_table, save_page
from accel_llm.system.secrecy import hide_secrets

RUN_COLORS = 8  # as in page.css; more runs have the same colours, with dashed lines


def write_comparison(runs: dict[str, RunFiles], path: Path) -> None:
    """Write a page with the curves of `runs`, by their names, in the same charts, and with what differs between them.

    Raises:
        ConfigError: as `save_page` does.
    """
    names = {hide_secrets(cut_text(name, 100)): run for name, run in runs.items()}
    charts = charts_of({name: run.metrics for name, run in names.items()})
    drawn, thinned = chart_data(charts)
    boxes = "".join(
        f'<label><input type="checkbox" checked data-run="{k}"> <span class="swatch run{k % RUN_COLORS}"></span> '
        f"{escape_html(name)}</label>"
        for k, name in enumerate(names)
    )
    controls = CONTROLS.replace("</form>", f'<div class="runs">{boxes}</div></form>')
    sections = {"Curves": f"{controls}{chart_figures(charts)}<p>Dashed lines with dots are evaluations. {thinned}</p>"}
    for title, lines in compare_runs([*names.values()]).items():
        rows = [[name, *values] for name, values in lines]
        sections[title] = plain_table(["", *names], rows, "differences") if rows else "<p>No difference.</p>"
    notes = "".join(f"<p>{escape_html(cut_text(note, 2_000))}</p>" for note in comparison_notes([*names.values()]))
    body = "".join(f"<section><h2>{title}</h2>{content}</section>\n" for title, content in sections.items())
    page = page_document(
        " beside ".join(names), f"<h1>{len(names)} runs</h1>{notes}{body}", {"charts": drawn, "runs": [*names]}
    )
    save_page(path, page)
