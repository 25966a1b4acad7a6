"""Press Ctrl-C in a terminal, in every phase of a run with steps of 10 s: it saves, ends, and continues.

    python tests/proofs/terminal.py                          every phase under every launch YAML: about an hour on two cores
    python tests/proofs/terminal.py --write                  the same, kept in tests/proofs/golden/terminal.md
    python tests/proofs/terminal.py cpu:later ddp:evaluation chosen cells: launch YAML and phase

Each cell is `accelerate launch` in an interactive bash that has a terminal of its own, so Ctrl-C reaches exactly the
processes that it reaches for a person: with one process the launcher too, which then ends before the run does.
"""

import importlib
import itertools
import json
import os
import pty
import select
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from failures import ROOT, alive, find_incomplete, table_of

GOLDEN = ROOT / "tests" / "proofs" / "golden" / "terminal.md"
YAMLS = {"cpu": 1, "single_gpu": 1, "ddp": 2, "zero2": 2, "zero3": 2, "fsdp2": 2}  # processes
STEPS, EVALUATED = 4, 3  # the run, and the step after which it evaluates
SLOW = 10.0  # seconds that each call of the function of a phase takes
LIMIT = 30.0  # seconds from Ctrl-C to the end of all processes: torchrun kills them then
PROMPT = b"ready> "
# Where Ctrl-C comes: the module that uses the function, the function, and its first slow call. A step has one
# micro-batch on each rank.
PHASES = {
    "data": ("accel_llm.data.encoders", "encode_chunk", 1),
    "loading": ("accel_llm.training.setup", "load_model", 1),
    "first": ("accelerate", "Accelerator.backward", 1),
    "later": ("accelerate", "Accelerator.backward", 3),
    "evaluation": ("accel_llm.training.evaluation", "next_token_loss", 2),
    "export": ("accel_llm.training.export", "gather_weights", 1),
}
# The step after which the run must have been saved; None: nothing is saved before training begins.
SAVED = {"data": None, "loading": None, "first": 1, "later": 3, "evaluation": EVALUATED, "export": STEPS}


class Cell(NamedTuple):
    """One run: its launch YAML and the phase in which Ctrl-C is pressed."""

    yaml: str
    phase: str


TABLE = [Cell(yaml, phase) for yaml in YAMLS for phase in PHASES]


class Outcome(NamedTuple):
    """What was left when the last process had ended, and then the end of the same command."""

    seconds: float | None  # from Ctrl-C to the end of the last process; None if the phase was never reached
    code: int  # of the launcher, as the shell shows it
    screen: str
    run: dict[str, Any]  # run.json
    incomplete: list[str]
    alive: list[int]
    continued: tuple[int, str]  # exit code of the same command again, and the status in run.json
    different: list[int]  # steps whose metrics differ from the undisturbed run's


def install() -> None:
    """In each process of a launch: make the function of the phase slow. sitecustomize calls this."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # the launcher itself
        return
    sys.path.append(str(ROOT))
    module, name, call = PHASES[os.environ["PHASE"]]
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), itertools.count(1)

    def slow(*arguments: Any, **keywords: Any) -> Any:
        if next(calls) >= call:
            Path(os.environ["REACHED"]).touch()
            time.sleep(SLOW)
        return original(*arguments, **keywords)

    setattr(owner, last, slow)


class Terminal:
    """An interactive bash on a terminal of its own."""

    def __init__(self, environment: dict[str, str]):
        self.screen = b""
        pid, self.terminal = pty.fork()
        if not pid:
            os.chdir(ROOT)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts what is in its background without Ctrl-C
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "-i"], environment)
        self.pid = pid
        self.read_until(lambda: PROMPT in self.screen, 10)

    def read_until(self, condition: Callable[[], Any], seconds: float) -> bool:
        """Collect what is shown until `condition()` is true. Return False if that takes longer than `seconds`."""
        limit = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > limit:
                return False
            if select.select([self.terminal], [], [], 0.05)[0]:
                self.screen += os.read(self.terminal, 1 << 16)
        return True

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def wait_for_prompt(self, seconds: float) -> bool:
        prompts = self.screen.count(PROMPT)
        return self.read_until(lambda: self.screen.count(PROMPT) > prompts, seconds)

    def exit_code(self) -> int:
        """Return the code of the last command; the prompt is there."""
        self.type("echo code=$?.\n")
        self.read_until(lambda: b"code=" in self.screen.rpartition(b"echo")[2].partition(b"\n")[2], 10)
        self.wait_for_prompt(1)
        return int(self.screen.rpartition(b"code=")[2].partition(b".")[0])

    def close(self) -> None:
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


def words(cell: Cell, cache: Path, output: Path) -> list[str]:
    processes = YAMLS[cell.yaml]
    return [
        *("accelerate", "launch", "--config_file", f"accelerate_configs/{cell.yaml}.yaml"),
        *("--num_processes", str(processes), "launch/sft.py", "--limit_rows", "400", "--max_length", "128"),
        *("--max_steps", str(STEPS), "--total_batch_size", "8", "--logging_steps", "1", "--eval_generate", "0"),
        *("--per_device_train_batch_size", str(8 // processes), "--per_device_eval_batch_size", "64"),
        *("--eval_on_start", "false", "--eval_steps", str(EVALUATED), "--packing", "false"),
        *("--cache_dir", str(cache), "--output_dir", str(output)),
    ]


def environment(folder: Path, **variables: str) -> dict[str, str]:
    paths = [str(folder), str(ROOT), str(ROOT / "tests" / "proofs"), os.environ.get("PYTHONPATH", "")]
    here = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PS1": PROMPT.decode(),
        "PROMPT_COMMAND": "",
        "PRESSED": str(folder),  # a mark to find processes of the launch
    }
    return os.environ | here | variables


def losses(output: Path) -> dict[int, float]:
    """Return the loss of each step in metrics.jsonl."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def undisturbed(cell: Cell, work: Path) -> dict[int, float]:
    """Return the losses of the run that nobody disturbs; the first call for a YAML does the run."""
    output = work / f"{cell.yaml}-whole"
    if not output.exists():
        terminal = Terminal(environment(work))
        terminal.type(f"{shlex.join(words(cell, work / 'cache', output))}\n")
        terminal.wait_for_prompt(300)
        terminal.close()
    return losses(output)


def press(cell: Cell, work: Path) -> Outcome:
    """Start the run of a cell, press Ctrl-C in its phase, wait for the end of all, and give the command again."""
    expected = undisturbed(cell, work)
    folder = Path(tempfile.mkdtemp(prefix=f"{cell.yaml}-{cell.phase}-", dir=work))
    (folder / "sitecustomize.py").write_text("import terminal\n\nterminal.install()\n", encoding="utf-8")
    output, reached = folder / "output", folder / "reached"
    command = shlex.join(words(cell, (folder if cell.phase == "data" else work) / "cache", output))

    terminal = Terminal(environment(folder, PHASE=cell.phase, REACHED=str(reached)))
    terminal.type(f"{command}\n")
    in_time = terminal.read_until(reached.exists, 300)
    terminal.read_until(lambda: False, 1)  # a person is not that fast
    since = time.monotonic()
    terminal.type("\x03")
    terminal.wait_for_prompt(2 * LIMIT)
    code = terminal.exit_code()
    shell = {terminal.pid}
    terminal.read_until(lambda: not {*alive(str(folder))} - shell, 2 * LIMIT)
    seconds = time.monotonic() - since
    survivors = sorted({*alive(str(folder))} - shell)
    run_file = output / "run.json"
    run = json.loads(run_file.read_text(encoding="utf-8")) if run_file.exists() else {}
    incomplete = find_incomplete(output)

    terminal.type(f"export PYTHONPATH={shlex.quote(environment(work)['PYTHONPATH'])}\n{command}\n")
    terminal.wait_for_prompt(10)
    terminal.wait_for_prompt(300)
    continued = terminal.exit_code(), json.loads(run_file.read_text(encoding="utf-8"))["status"]
    terminal.close()
    now = losses(output)
    different = [step for step in expected | now if expected.get(step) != now.get(step)]
    screen = terminal.screen.decode(errors="replace")
    return Outcome(seconds if in_time else None, code, screen, run, incomplete, survivors, continued, different)


def find_problems(cell: Cell, outcome: Outcome) -> list[str]:
    """Return the differences between the outcome of a cell and the expected one."""
    if outcome.seconds is None:
        return ["the phase was never reached"]
    problems = [f"took {outcome.seconds:.0f} s"] if outcome.seconds > LIMIT else []
    # Of the launcher: 130 if it ends by the signal itself, as it does with one process, unless the run has ended before.
    problems += [] if outcome.code in ((1, 130) if YAMLS[cell.yaml] == 1 else (1,)) else [f"exit code {outcome.code}"]
    problems += [] if outcome.run.get("status") == "preempted" else [f"status {outcome.run.get('status')}"]
    problems += [f"{name} is not whole" for name in outcome.incomplete]
    problems += [f"process {process} lives on" for process in outcome.alive]
    problems += [] if "preempted by SIGINT" in outcome.screen else ["the end was not reported"]
    saved = SAVED[cell.phase]
    if saved and f"step-{saved:08d}, step {saved}" not in outcome.screen.replace("\r\n", ""):
        problems.append(f"not continued after step {saved}")
    if not saved and "resuming from" in outcome.screen:
        problems.append("continued, although nothing had been trained")
    problems += [] if outcome.continued == (0, "done") else [f"continued to {outcome.continued}"]
    return problems + ([f"other losses in steps {outcome.different}"] if outcome.different else [])


def row(cell: Cell, outcome: Outcome) -> list[str]:
    seconds = "-" if outcome.seconds is None else f"{outcome.seconds:.1f}"
    facts = [str(outcome.code), str(outcome.run.get("status")), str(outcome.run.get("step"))]
    return [*cell, seconds, *facts, "; ".join(find_problems(cell, outcome)) or "as it should"]


def main() -> None:
    chosen = [word for word in sys.argv[1:] if word != "--write"]
    cells = [Cell(*word.split(":")) for word in chosen] or TABLE
    work = Path(tempfile.mkdtemp(prefix="terminal-"))
    rows = []
    for cell in cells:
        outcome = press(cell, work)
        rows.append(row(cell, outcome))
        print("  ".join(rows[-1]), flush=True)
        if len(cells) == 1:
            print(outcome.screen)
    failed = [line for line in rows if line[-1] != "as it should"]
    summary = f"{len(rows)} runs in which Ctrl-C was pressed, {len(failed)} not as they should."
    print(summary)
    if "--write" in sys.argv:
        head = ["launch YAML", "phase", "seconds to the end", "exit code", "status", "step", "verdict"]
        GOLDEN.write_text(f"# Ctrl-C in a terminal\n\n{summary}\n\n{table_of(head, rows)}", encoding="utf-8")
    shutil.rmtree(work)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
