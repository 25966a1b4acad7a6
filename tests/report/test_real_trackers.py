"""The real trackers, started through Accelerate: they hold the numbers of metrics.jsonl, once each, and nothing private.

sft.py is interrupted two steps after a checkpoint, and continued.
"""

import importlib.util
import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import Stopped

from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.report.trackers import RunTrackers

pytestmark = pytest.mark.long
SECRET = "hunter2-of-a-setting"
STEPS, STOP = 6, 3
NAMES = ("wandb", "tensorboard", "trackio", "swanlab")
CURVES = ("loss", "learning_rate", "grad_norm", "eval/loss")

Curves = dict[str, dict[int, list[float]]]


@pytest.fixture(params=NAMES)
def tracker(request) -> str:
    """The name of a tracker that is installed; in CI each must be."""
    if importlib.util.find_spec(request.param) is None:
        assert not os.environ.get("CI"), f"{request.param} is not installed; CI installs the extra track"
        pytest.skip(f"{request.param} is not installed")
    return request.param


def wandb_records(file: Path) -> Iterator[bytes]:
    """Read a .wandb file: a log of LevelDB (blocks of 32 KiB; checksum, length and kind before each part of a record)."""
    data, place, record = file.read_bytes(), 7, b""
    while place < len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(folder: Path) -> tuple[Curves, dict[str, Any], list[str]]:
    from wandb.proto import wandb_internal_pb2

    curves, config, names = {name: {} for name in CURVES}, {}, []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime):
        for data in wandb_records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                items = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
                }
                for name in curves.keys() & items.keys():
                    curves[name].setdefault(int(items["_step"]), []).append(items[name])
            elif record.WhichOneof("record_type") == "run":
                names.append(f"{record.run.project}/{record.run.display_name}/{record.run.run_id}")
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "config":
                config |= {item.key: json.loads(item.value_json) for item in record.config.update}
    return curves, config, names


def read_tensorboard(folder: Path) -> tuple[Curves, dict[str, Any], list[str]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (logs,) = (path for path in (folder / "run" / "logs").iterdir() if path.is_dir())
    events = EventAccumulator(str(logs), size_guidance={"scalars": 0}).Reload()
    curves: Curves = {}
    for name in CURVES:
        for event in events.Scalars(name):
            curves.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    (hparams,) = logs.glob("*/hparams.yml")
    return curves, yaml.safe_load(hparams.read_text(encoding="utf-8")), [logs.name]


def read_trackio(folder: Path) -> tuple[Curves, dict[str, Any], list[str]]:
    from trackio.sqlite_storage import SQLiteStorage

    runs = SQLiteStorage.get_runs("proof")
    curves: Curves = {}
    for line in SQLiteStorage.get_logs("proof", "mine"):
        for name in CURVES:
            if name in line:
                curves.setdefault(name, {}).setdefault(line["step"], []).append(line[name])
    return curves, SQLiteStorage.get_run_config("proof", "mine"), [f"proof/{run}" for run in runs]


def read_swanlab(folder: Path) -> tuple[Curves, dict[str, Any], list[str]]:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    curves, config, names = {name: {} for name in CURVES}, {}, []
    for file in sorted(folder.glob("swanlog/run-*/*.swanlab"), key=lambda path: path.stat().st_mtime):
        reader = DataStoreReader()
        reader.open(file)
        while (data := reader.scan()) is not None:
            record = Record()
            record.ParseFromString(data)
            if record.HasField("start"):
                names.append(f"{record.start.project}/{record.start.name}/{record.start.id}")
            elif record.HasField("scalar") and record.scalar.key in curves:
                curves[record.scalar.key].setdefault(record.scalar.step, []).append(record.scalar.value.number)
        reader.close()
        saved = yaml.safe_load((file.parent / "files" / "config.yaml").read_text(encoding="utf-8"))
        config |= {name: entry["value"] for name, entry in saved.items()}
    return curves, config, names


READERS: dict[str, Callable[[Path], tuple[Curves, dict[str, Any], list[str]]]] = {
    "wandb": read_wandb,
    "tensorboard": read_tensorboard,
    "trackio": read_trackio,
    "swanlab": read_swanlab,
}
# Files that leave the machine, or would with a login: wandb's own log files and trackio's locks do not.
SENT = {
    "wandb": ["wandb/*/*.wandb", "wandb/*/files/**/*"],
    "tensorboard": ["run/logs/**/*"],
    "trackio": ["trackio/**/*"],
    "swanlab": ["swanlog/*/*.swanlab", "swanlog/*/files/**/*"],
}


@pytest.fixture
def train(script, tiny, chats, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Run sft.py with a tracker in an empty folder without a network; a secret is in settings, in paths and in prompts."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "SWANLAB_MODE": "offline",
        "SWANLAB_SAVE_DIR": str(tmp_path / "swanlab-home"),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MY_API_KEY": f"key-{SECRET}",
    }.items():
        monkeypatch.setenv(name, value)
    files = tmp_path / f"{SECRET}.jsonl"
    files.write_bytes(chats.read_bytes())

    def run(tracker: str, *more: object) -> Path:
        words = ("--model_name_or_path", tiny, "--train_files", files, "--eval_share", 0.2, "--max_length", 128)
        words += ("--max_steps", STEPS, "--logging_steps", 1, "--save_steps", STOP, "--eval_steps", 2)
        words += ("--chat_template_kwargs", f"key={SECRET}", "--output_dir", "run", "--report_to", tracker)
        script("sft", *words, "--project", "proof", "--run_name", "mine", *more)
        return tmp_path / "run"

    return run


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """`interrupt(5)`: end the next run after its step 5, as a killed process ends."""
    when_due = Checkpoints.when_due

    def stop_after(last: int) -> None:
        def wrapped(self: Any, meter: Any, evaluation: Any, bad_steps: Any, step: int) -> None:
            when_due(self, meter, evaluation, bad_steps, step)
            if step == last:
                monkeypatch.setattr(Checkpoints, "when_due", when_due)
                raise Stopped("the power went")

        monkeypatch.setattr(Checkpoints, "when_due", wrapped)

    return stop_after


def expected(run: Path) -> Curves:
    """The curves of metrics.jsonl: of each name the value at each step, once."""
    curves: Curves = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        for name in CURVES:
            if name in line:
                curves.setdefault(name, {}).setdefault(line["step"], []).append(line[name])
    return curves


def test_a_tracker_has_the_numbers_of_the_run_once_though_it_was_interrupted(
    tracker, train, interrupt, tmp_path, monkeypatch
):
    started: list[RunTrackers] = []
    start = RunTrackers.__init__

    def remember(self: RunTrackers, *arguments: Any) -> None:
        start(self, *arguments)
        started.append(self)

    monkeypatch.setattr(RunTrackers, "__init__", remember)
    interrupt(STOP + 2)  # two steps and an evaluation were sent that are done again
    with pytest.raises(Stopped):
        train(tracker)
    for active in started[0].active:  # what the library does when the process ends
        active.tracker.close() if tracker == "tensorboard" else active.tracker.finish()
    run = train(tracker)

    curves, config, names = READERS[tracker](tmp_path)
    wanted = expected(run)
    assert set(wanted["loss"]) == set(range(1, STEPS + 1)) and set(wanted["eval/loss"]) == {2, 4, 6}
    assert {name: set(steps) for name, steps in curves.items()} == {name: set(steps) for name, steps in wanted.items()}
    for name, steps in wanted.items():
        for step, values in steps.items():
            assert len(curves[name][step]) == len(values) == 1
            assert curves[name][step] == pytest.approx(values, rel=1e-6)

    # One run under the name that was asked for, and what is shared of its settings.
    identity = json.loads((run / "run.json").read_text(encoding="utf-8"))["trackers"][tracker]
    said = {"tensorboard": "mine", "trackio": "proof/mine"}.get(tracker, f"proof/mine/{identity['id']}")
    assert set(names) == {said} and identity["project"] == "proof"
    assert config["learning_rate"] == 2e-4 and config["max_steps"] == STEPS and config["num_processes"] == 1

    # Nothing else: no path, no secret, no command line.
    files = [path for pattern in SENT[tracker] for path in tmp_path.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        # swanlab notes where its own files are, and sends only name, size, checksum and content of each.
        content = path.read_bytes().replace(str(tmp_path / "swanlog").encode(), b"")
        for private in (SECRET, str(tmp_path), "chat_template_kwargs", "sft.py"):
            assert private.encode() not in content, f"{private} in {path.relative_to(tmp_path)}"
