"""Runs that are interrupted, for the tests of checkpoints and of resuming."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import STEPS, STOP, Stopped

from accel_llm.checkpoint.checkpoints import Checkpoints


@pytest.fixture
def train(script, tiny, chats) -> Callable[..., Path]:
    def run(folder: Path, *more: object) -> Path:
        common = ("--max_steps", STEPS, "--logging_steps", 1, "--save_steps", STOP, "--learning_rate", 1e-2)
        rows = () if "--train_files" in more else ("--train_files", chats)
        files = ("--model_name_or_path", tiny, *rows, "--output_dir", folder)
        script("sft", *files, *common, "--max_length", 128, *more)
        return folder

    return run


@pytest.fixture
def at_step(monkeypatch) -> Callable[..., None]:
    """`at_step(3, what)`: call `what` after step 3 of the next run is saved; with `before=True`, before that."""
    when_due = Checkpoints.when_due

    def register(last: int, what: Callable[[Any], None], before: bool = False) -> None:
        def wrapped(self: Any, meter: Any, evaluation: Any, bad_steps: Any, step: int) -> None:
            if before and step == last:
                what(self)
            when_due(self, meter, evaluation, bad_steps, step)
            if not before and step == last:
                what(self)

        monkeypatch.setattr(Checkpoints, "when_due", wrapped)

    return register


@pytest.fixture
def interrupt(at_step, monkeypatch) -> Callable[[int], None]:
    """`interrupt(3)`: end the next run after its step 3 is saved."""
    when_due = Checkpoints.when_due

    def stop(checkpoints: Any) -> None:
        monkeypatch.setattr(Checkpoints, "when_due", when_due)
        if checkpoints.writer:  # a killed process would not go on writing
            checkpoints.writer.join()
        raise Stopped("the power went")

    return lambda last: at_step(last, stop)
