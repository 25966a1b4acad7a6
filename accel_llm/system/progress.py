"""Bars on the terminal for whatever takes long, all in one display. In a log they are a line now and then.

Only the main process shows them. What is printed meanwhile, by whatever way, stands above the bars.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ParamSpec, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from accel_llm.system.launcher import process_rank

LINE_SECONDS = 30  # between two lines of a log

console = Console(highlight=False)
_display: Progress | None = None  # while there is a bar

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
Item = TypeVar("Item")


class Bar:
    """A bar with a name, a count and the time left, until `close`; without a `total` only the time that has passed.

    Where the output is no terminal, a bar with a total prints a line every LINE_SECONDS seconds, unless it is not
    `logged`, and a bar without a total prints nothing.
    """

    def __init__(self, name: str, total: int | None = None, done: int = 0, logged: bool = True):
        self.name, self.total, self.done, self.first = name, total, done, done
        self.logged = logged and total is not None and not process_rank()
        self.start = self.line = time.monotonic()
        self.task = (
            None
            if process_rank() or not console.is_terminal
            else _open_display().add_task(name, total=total, completed=done, status="")
        )

    def update(self, done: int, status: str = "") -> None:
        """Show that `done` of `total` are done, and beside it `status`."""
        self.done = done
        if self.task is not None:
            if _display is not None:
                _display.update(self.task, completed=done, status=status)
        elif self.logged and time.monotonic() - self.line > LINE_SECONDS:
            self.line = time.monotonic()
            print(f"{self.name}: {done:,} of {self.total:,}, {format_seconds(self.seconds_left())} left", flush=True)

    def seconds_left(self) -> float | None:
        """Return how long the rest takes at the speed so far; None before anything is done."""
        done = self.done - self.first
        return (time.monotonic() - self.start) * ((self.total or 0) - self.done) / done if done > 0 else None

    def close(self) -> None:
        """Remove the bar."""
        if self.task is not None and _display is not None:
            _display.remove_task(self.task)
            self.task = None
            if not _display.tasks:
                close_display()

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def tracked(items: Sequence[Item], name: str) -> Iterator[Item]:
    """Yield `items`, and show a bar with how many are done."""
    with Bar(name, len(items)) as bar:
        for number, item in enumerate(items, 1):
            yield item
            bar.update(number)


def shown(name: str) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Show a bar of this name while the decorated function runs."""

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        @functools.wraps(function)
        def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
            with Bar(name):
                return function(*args, **kwargs)

        return run

    return decorate


def close_display() -> None:
    """Remove all bars, so that what is printed next is the last thing on the screen, and the cursor is there again."""
    global _display
    if _display is not None:
        _display.stop()
        _display = None


def _open_display() -> Progress:
    global _display
    if _display is None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            _Count(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            _TimeLeft(compact=True),
        )
        _display = Progress(*columns, console=console, transient=True)
        _display.start()
    return _display


class _Count(ProgressColumn):
    """How many are done; nothing where the total is not known and nothing was counted."""

    def render(self, task: Task) -> Text:
        done = f"{task.completed:,.0f}"
        return Text(
            f"{done}/{task.total:,.0f}" if task.total else done if task.completed else "", style="progress.download"
        )


class _TimeLeft(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " left") if task.total else Text("")


def format_seconds(seconds: float | None) -> str:
    """Return a time as people write it: 3:07, 2:04:11, 3 days 2:04:11, or ?."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days:,} day{'s' * (days > 1)} {clock}" if days else clock
