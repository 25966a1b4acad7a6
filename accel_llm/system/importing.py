"""A bar on the terminal while the libraries are imported."""

import atexit
import sys
import threading

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from accel_llm.system.launcher import process_rank

MODULES = 5_000  # about as many as a training script imports (torch 2.13, transformers 5.24, peft 0.21)
_done = threading.Event()
_threads: list[threading.Thread] = []  # the one that shows the bar


def show_imports() -> None:
    """Show on standard error how many modules are imported, until `hide_imports` is called. Main process only."""
    console = Console(stderr=True)
    if console.is_terminal and not process_rank():
        _threads.append(threading.Thread(target=_show, args=(console,), daemon=True))
        _threads[0].start()
        atexit.register(hide_imports)  # Ctrl-C during an import must not leave the terminal without a cursor


def hide_imports() -> None:
    """Remove the bar."""
    _done.set()
    for thread in _threads:
        thread.join()


def _show(console: Console) -> None:
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(elapsed_when_finished=True)
    # Libraries may keep the standard streams that they find now.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as bar:
        task = bar.add_task("import libraries", total=MODULES)
        while not _done.wait(0.1):
            bar.update(task, completed=min(len(sys.modules), MODULES - 1))
