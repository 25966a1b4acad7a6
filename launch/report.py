"""Write the page of a run anew, or lay several runs over one another and list what differs between them.

    python launch/report.py output
    python launch/report.py output/first output/second --output_file compare.html

The words before the first option are output folders, of runs that have ended or not. With one folder its report.html is
written; with several, compare.html here, and the differences are printed too. Nothing leaves this machine.
"""

from pathlib import Path

import accel_llm.config.early

from rich.console import Console
from rich.table import Table
from rich.text import Text

from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ReportOptions as Options
from accel_llm.report.compare_runs import compare_runs, comparison_notes, name_runs, read_run
from accel_llm.report.ledger_text import one_line
from accel_llm.report.page import report_page
from accel_llm.report.page_compare import write_comparison
from accel_llm.report.page_html import save_page
from accel_llm.system.exit import run_script


def main() -> None:
    options = parse_options(Options)
    runs = name_runs([read_run(folder) for folder in options.runs])
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if len(runs) == 1:
        (run,) = runs.values()
        path = Path(options.output_file or run.folder / "report.html")
        save_page(path, report_page(run.folder))
        console.print(f"wrote {path.absolute()}")
        return
    path = Path(options.output_file or "compare.html")
    write_comparison(runs, path)
    for title, lines in compare_runs([*runs.values()]).items():
        if lines:
            console.print(difference_table(title, [*runs], lines), soft_wrap=False)
        else:
            console.print(f"{title}: no difference")
    for note in comparison_notes([*runs.values()]):
        console.print(note)
    console.print(f"wrote {path.absolute()}")


def difference_table(title: str, names: list[str], lines: list[tuple[str, list[str]]]) -> Table:
    """Return a table with a column for each run; texts that are too long go on in the next line."""
    table = Table(title=title, title_justify="left")
    for name in ("", *names):
        table.add_column(Text(one_line(name)), overflow="fold")
    for name, values in lines:
        table.add_row(*(Text(one_line(value)) for value in (name, *values)))
    return table


if __name__ == "__main__":
    run_script(main)
