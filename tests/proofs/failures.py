"""Let one process of a run fail, at every stage, strategy and rank, and check the output and the time to the end.

    python tests/proofs/failures.py                          the whole table: about half an hour on two cores
    python tests/proofs/failures.py --write                  the same, kept in tests/proofs/golden/failures.md
    python tests/proofs/failures.py ddp:1:save:raise         chosen cells: strategy, rank, stage and kind of the fault

Each cell is a real launch of launch/sft.py with two processes. Python imports a module named sitecustomize when it
starts. Ours replaces one function, only in the process of the rank that must fail.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "proofs" / "golden" / "failures.md"
STRATEGIES = ["ddp", "zero2", "zero3", "fsdp2"]
LIMIT = 60  # seconds from the fault to the end of the launcher
PATIENCE = 6  # seconds that a collective may take where the fault is `slow`
# Where the fault happens: the module that uses the function, the function, and which call of it fails. A step has two
# micro-batches on each rank.
PLACES = {
    "start": ("accel_llm.training.setup", "model_problems", 1),
    "map": ("accel_llm.data.encoders", "encode_chunk", 2),
    "load": ("accel_llm.training.setup", "load_model", 1),
    "prepare": ("accelerate", "Accelerator.prepare", 1),
    "forward": ("accel_llm.model.loss", "next_token_loss", 1),
    "backward": ("accelerate", "Accelerator.backward", 3),
    "evaluate": ("accel_llm.training.evaluation", "next_token_loss", 2),
    "save": ("accel_llm.checkpoint.checkpoints", "generator_states", 2),
    "export": ("accel_llm.training.export", "gather_weights", 1),
}
STAGES = list(PLACES)
# run.json is written before the first step; a run that fails earlier leaves no folder.
BEFORE_THE_RUN = STAGES[: STAGES.index("forward")]


class Cell(NamedTuple):
    """One launch: `kind` is raise (RuntimeError), mistake (ConfigError), exit (os._exit(9)), kill (SIGKILL), slow, memory.

    `slow` must not fail where ranks wait outside of collectives: the stage takes twice as long as a collective may.
    """

    strategy: str
    rank: int
    stage: str
    kind: str = "raise"


TABLE = [Cell(strategy, rank, stage) for strategy in STRATEGIES for stage in STAGES for rank in (0, 1)]
TABLE += [Cell(strategy, rank, "backward", "kill") for strategy in STRATEGIES for rank in (0, 1)]
MORE = (("start", "mistake"), ("map", "exit"), ("map", "slow"))
TABLE += [Cell("ddp", rank, stage, kind) for stage, kind in MORE for rank in (0, 1)]


@dataclass(frozen=True)
class Outcome:
    """The result of one launch: the screen, the output folder and the processes that still run."""

    seconds: float | None  # from the fault to the end of the launcher; None if the fault was never reached
    code: int
    screen: str
    run: dict[str, Any] | None  # run.json
    incomplete: list[str]  # files and folders in the output folder that are not complete
    alive: list[int]  # processes of the launch that outlived the launcher


def inject() -> None:
    """Replace the function that must fail; sitecustomize calls this in every process of a launch."""
    if "RANK" not in os.environ:  # the launcher itself
        return
    strategy, rank, stage, kind = os.environ["FAULT"].split(":")
    cell = Cell(strategy, int(rank), stage, kind)
    if kind == "slow":
        _patch("torch.distributed", "init_process_group", partial(_with, timeout=timedelta(seconds=PATIENCE)))
    if os.environ["RANK"] != rank:
        if stage == "map":
            # The first process to arrive encodes the rows, and that must be the one that fails.
            _patch("accel_llm.training.setup", "encode_conversations", _delayed)
        return
    module, name, call = PLACES[stage]
    calls = iter(range(1, sys.maxsize))

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **keywords: Any) -> Any:
            # The check before training computes losses as well.
            if (stage != "forward" or sys._getframe(1).f_globals["__name__"] == "__main__") and next(calls) == call:
                strike(cell)
            return original(*arguments, **keywords)

        return wrapper

    _patch(module, name, failing)


def strike(cell: Cell) -> None:
    Path(os.environ["FAULT_AT"]).write_text(str(time.time()), encoding="utf-8")
    if cell.kind == "slow":
        time.sleep(2 * PATIENCE)
        return
    if cell.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.kind == "exit":
        os._exit(9)
    if cell.kind == "mistake":
        from accel_llm.errors import ConfigError

        raise ConfigError(cause(cell))
    if cell.kind == "memory":
        import torch

        raise torch.OutOfMemoryError(cause(cell))
    raise RuntimeError(cause(cell))


def cause(cell: Cell) -> str:
    return f"injected at {cell.stage}"


def _delayed(original: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        time.sleep(3)
        return original(*arguments, **keywords)

    return wrapper


def _with(original: Callable[..., Any], **forced: Any) -> Callable[..., Any]:
    return lambda *arguments, **keywords: original(*arguments, **keywords | forced)


def _patch(module: str, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, last, wrap(getattr(owner, last)))


def launch(cell: Cell, work: Path) -> Outcome:
    """Start the run of one cell and wait for its end; cells share the cache and configs in `work`."""
    folder = Path(tempfile.mkdtemp(prefix=f"{cell.strategy}-{cell.stage}-", dir=work))
    (folder / "sitecustomize.py").write_text("import failures\n\nfailures.inject()\n", encoding="utf-8")
    cache = folder if cell.stage == "map" else work
    words = [
        *("accelerate", "launch", "--config_file", str(_config(cell.strategy, work)), "--num_processes", "2"),
        *("launch/sft.py", "--limit_rows", "400", "--max_length", "128", "--max_steps", "3", "--total_batch_size", "8"),
        *("--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "4", "--eval_generate", "0"),
        *("--eval_on_start", "false", "--eval_steps", "2", "--save_steps", "1", "--logging_steps", "1"),
        *("--cache_dir", str(cache / "cache"), "--output_dir", str(folder / "output")),
    ]
    paths = [str(folder), str(ROOT), str(ROOT / "tests" / "proofs"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "FAULT": ":".join(map(str, cell)),
        "FAULT_AT": str(folder / "fault"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    to_one_screen = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.run(words, cwd=ROOT, env=environment, timeout=300, check=False, **to_one_screen)
    ended = time.time()
    struck = folder / "fault"
    run = folder / "output" / "run.json"
    return Outcome(
        ended - float(struck.read_text(encoding="utf-8")) if struck.is_file() else None,
        process.returncode,
        process.stdout,
        json.loads(run.read_text(encoding="utf-8")) if run.is_file() else None,
        find_incomplete(folder / "output"),
        alive(str(struck)),
    )


def _config(strategy: str, work: Path) -> Path:
    """Return the strategy's YAML; ZeRO-3 gets one that shards small tensors too, so that the demo's are gathered."""
    config = ROOT / "accelerate_configs" / f"{strategy}.yaml"
    if strategy != "zero3":
        return config
    settings = json.loads(config.with_suffix(".json").read_text(encoding="utf-8"))
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (work / "zero3.json").write_text(json.dumps(settings), encoding="utf-8")
    text = config.read_text(encoding="utf-8").replace("accelerate_configs/zero3.json", str(work / "zero3.json"))
    (work / "zero3.yaml").write_text(text, encoding="utf-8")
    return work / "zero3.yaml"


def find_incomplete(output: Path) -> list[str]:
    """Return incomplete checkpoints and exports that look complete in an output folder; hidden names do not count."""
    from accel_llm.system.manifest import find_damage

    incomplete = [str(path) for path in output.glob("checkpoints/[!.]*") if find_damage(path)]
    for export, weights in (("adapter", "adapter_model.safetensors"), ("model", "model.safetensors")):
        files = (weights, "tokenizer.json", "generation_config.json")
        if (output / export).exists() and not all((output / export / name).is_file() for name in files):
            incomplete.append(export)
    return incomplete


def alive(mark: str) -> list[int]:
    """Return the ids of processes that were started with `mark` in their environment."""
    process_ids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (path / "environ").read_bytes():
                process_ids.append(int(path.name))
        except OSError:  # it has ended, or belongs to another user
            continue
    return process_ids


def error_lines(screen: str) -> list[str]:
    """Return the lines in which a rank reports an error."""
    return [line for line in screen.splitlines() if line.startswith("error")]


def find_problems(cell: Cell, outcome: Outcome) -> list[str]:
    """Return the differences between the outcome of `cell` and the expected one."""
    if outcome.seconds is None:
        return ["the fault was never reached"]
    if cell.kind == "slow":
        ended = outcome.code, error_lines(outcome.screen), outcome.run and outcome.run["status"]
        return [] if ended == (0, [], "done") else [f"ended with {ended}"]
    problems = [f"ended {outcome.seconds:.0f} s after the fault"] if outcome.seconds >= LIMIT else []
    problems += ["exit code 0"] if outcome.code == 0 else []
    problems += [f"{name} is not whole" for name in outcome.incomplete]
    problems += [f"process {process} lives on" for process in outcome.alive]
    rank_suffix = f" (rank {cell.rank})" if cell.rank or cell.kind != "mistake" else ""
    lines = {
        "raise": [f"error{rank_suffix}: RuntimeError: {cause(cell)}"],
        "mistake": [f"error{rank_suffix}: {cause(cell)}"],
    }
    # The process says it at once; below the launcher's lines it is the last thing on the screen.
    expected = lines.get(cell.kind, [])
    if error_lines(outcome.screen) != expected * 2:
        problems.append(f"reported {error_lines(outcome.screen)}")
    if expected and outcome.screen.rstrip("\n").rpartition("\n\n")[2].splitlines() != expected:
        problems.append("the error is not the last thing on the screen")
    # The launcher prints the rest: its own traceback, and the rank that failed first.
    if cell.kind == "raise" and outcome.screen.count("Traceback (most recent call last)") != 2:
        problems.append("not one traceback of the run and one of the launcher")
    if f"rank      : {cell.rank} " not in outcome.screen.rpartition("Root Cause")[2]:
        problems.append("the launcher names another rank")
    return problems + _record_problems(cell, outcome.run)


def _record_problems(cell: Cell, run: dict[str, Any] | None) -> list[str]:
    if cell.stage in BEFORE_THE_RUN:
        return ["run.json before the run began"] if run else []
    if run is None or run["status"] != "failed":
        return [f"status {run and run['status']}"]
    if cell.kind in ("exit", "kill"):
        return [] if run["error"].startswith("SIGTERM: ") else [f"run.json has {run['error']!r}"]
    expected = (f"RuntimeError: {cause(cell)}", cell.rank)
    return [] if (run["error"], run.get("failed_rank")) == expected else [f"run.json has {run['error']!r}"]


def row(cell: Cell, outcome: Outcome) -> list[str]:
    return [
        *(cell.strategy, str(cell.rank), cell.stage, cell.kind),
        "-" if outcome.seconds is None else f"{outcome.seconds:.1f}",
        str(len(error_lines(outcome.screen))),
        str(outcome.code),
        "no folder" if outcome.run is None else f"{outcome.run['status']}: {outcome.run.get('error', '')[:40]}",
        "; ".join(find_problems(cell, outcome)) or "as it should",
    ]


def table(rows: list[list[str]]) -> str:
    head = ["strategy", "rank", "stage", "fault", "seconds to the end", "errors", "exit code", "run.json", "verdict"]
    return table_of(head, rows)


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--write"]
    cells = [Cell(a, int(b), c, d) for a, b, c, d in (word.split(":") for word in words)] or TABLE
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for cell in cells:
            outcome = launch(cell, Path(work))
            rows.append(row(cell, outcome))
            print("  ".join(rows[-1]), flush=True)
            if len(cells) == 1:
                print(outcome.screen)
    failed = [line for line in rows if line[-1] != "as it should"]
    slowest = max((float(line[4]) for line in rows if line[4] != "-"), default=0.0)
    summary = (
        f"{len(rows)} launches, {len(failed)} not as they should; the slowest ended {slowest:.1f} s after its fault."
    )
    print(summary)
    if "--write" in sys.argv:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(f"# Failures of one process\n\n{summary}\n\n{table(rows)}", encoding="utf-8")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
