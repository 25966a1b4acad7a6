"""SIGKILL at random moments of a run; the same command continues it each time, until it ends."""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import forks
from supervise import (
    INTERVAL,
    POLL_SECONDS,
    RunKind,
    baseline_run,
    find_differences,
    poll_exit_codes,
    read_trace,
    send,
    start_trace,
    supervise,
    wait_until,
)

STEPS = 40
PAUSE = 0.02  # seconds between two files of a checkpoint, so that a kill can hit between them
LIMIT = 60.0  # seconds from a kill to the end of all processes
BEFORE_RENAME, REMOVING = "before the rename", "removing an old one"
PARTS = 60  # a run is started at most so many times


class Kill(NamedTuple):
    """One kill. `place`: the part of a save it interrupted; `reached`: the last step; `resumed`: the step resumed from."""

    kind: str
    moment: str
    ranks: str
    place: str
    reached: int
    resumed: int | None
    seconds: float  # until the last process had ended

    @property
    def lost(self) -> int:
        return self.reached - (self.resumed or 0)


class Chain(NamedTuple):
    """One run, killed and continued until its end."""

    kind: str
    kills: list[Kill]
    problems: list[str]


def run_kinds() -> list[RunKind]:
    """Return a kind for every strategy and method; some save in the background."""
    strategies, methods = ("cpu", "ddp", "zero2", "zero3", "fsdp2"), ("full", "lora")
    plain = [RunKind(strategy, method, STEPS) for method in methods for strategy in strategies]
    background = [RunKind(strategy, methods[k % 2], STEPS, True) for k, strategy in enumerate(strategies)]
    return [kind for k in range(5) for kind in (plain[k], background[k], plain[5 + k])]


def install_pauses() -> None:
    """In a rank: pause around each file of a checkpoint, its manifest and its rename, and during its removal."""
    from accel_llm.checkpoint import files
    from accel_llm.system import manifest

    def slow(module: Any, name: str) -> None:
        original = getattr(module, name)

        def paused(*arguments: Any, **keywords: Any) -> Any:
            time.sleep(PAUSE)
            result = original(*arguments, **keywords)
            time.sleep(PAUSE)
            return result

        setattr(module, name, paused)

    slow(files, "write_tensors")
    slow(files, "_write_json")
    slow(manifest, "write_atomically")  # each process's part, then the manifest; the rename follows
    slow(manifest.shutil, "rmtree")  # a folder is renamed before it is removed


def interrupted_place(output: Path) -> str:
    """Return the part of a save that the end of all processes interrupted, or an empty text."""
    for folder in sorted((output / "checkpoints").glob(".step-*.partial")):
        newer = [path for path in folder.parent.glob("step-*") if path.name > folder.name[1:].removesuffix(".partial")]
        if newer:
            return REMOVING
        if (folder / "manifest.json").exists():
            return BEFORE_RENAME
        return "before the manifest"
    return ""


def strike(kind: RunKind, pids: dict[int, int | None], draw: random.Random) -> tuple[str, float]:
    """Kill all processes at once, or in a third of the cases one; then end the others as a launcher does."""
    since, alone = time.monotonic(), kind.processes > 1 and draw.random() < 1 / 3
    if not alone:
        send(pids, signal.SIGKILL)
        supervise(pids)
        return "all", time.monotonic() - since
    rank = draw.randrange(kind.processes)
    os.kill([*pids][rank], signal.SIGKILL)
    time.sleep(POLL_SECONDS)
    supervise(pids)
    return str(rank), time.monotonic() - since


def moment_comes(
    moment: str, run: forks.Run, pids: dict[int, int | None], trace: Path, span: float, draw: random.Random
) -> bool:
    """Wait until a random moment. Return False if the run ends first."""
    if moment == "start":
        wait = draw.uniform(0, 1)
    else:
        if not wait_until(lambda: read_trace(trace, "from"), pids):
            return False
        wait = draw.uniform(0, span)
    if moment == "save":
        steps, place = draw.randrange(2 * INTERVAL), draw.choice(("", BEFORE_RENAME, REMOVING))
        reached = (lambda: interrupted_place(run.output) == place) if place else (lambda: interrupted_place(run.output))
        if not wait_until(lambda: len(read_trace(trace, "step")) >= steps and reached(), pids):
            return False
        wait = draw.uniform(0, PAUSE if place else 12 * PAUSE)
    since = time.monotonic()
    return wait_until(lambda: time.monotonic() - since > wait, pids) and not poll_exit_codes(pids)


def run_chain(kind: RunKind, work: Path, output: Path, most: int, moments: list[str], draw: random.Random) -> Chain:
    """Kill a run up to `most` times, at `moments` in turn, and compare its end with an undisturbed run."""
    baseline = baseline_run(kind, work)
    span = float(baseline.with_suffix(".seconds").read_text(encoding="utf-8")) / 4
    kills: list[Kill] = []
    for part in range(PARTS):
        moment = moments[len(kills) % len(moments)] if len(kills) < most else ""
        trace, sabotage = start_trace(output, *([install_pauses] if moment == "save" else []))
        run = kind.run(work, output, sabotage, resumed=part > 0)
        pids = forks.start(run, work, launch=False)
        struck = bool(moment) and moment_comes(moment, run, pids, trace, span, draw)
        ranks, seconds = strike(kind, pids, draw) if struck else ("", supervise(pids))
        if origin := read_trace(trace, "from"):
            kills = [kill._replace(resumed=origin[0]) if kill.resumed is None else kill for kill in kills]
        if not struck:
            code = forks.first_cause([code or 0 for code in pids.values()])
            ended = [f"does not go on: exit code {code}: {forks.Ended(run, code, seconds).cause}"] if code else []
            return Chain(
                kind.name, kills, ended or [*find_differences(kind, work, output), *find_excesses(kind, kills)]
            )
        before = kills[-1].reached if kills else 0
        reached = max([*read_trace(trace, "step"), *origin]) if origin else before
        kills.append(Kill(kind.name, moment, ranks, interrupted_place(output), reached, None, seconds))
    return Chain(kind.name, kills, [f"not at its end after {PARTS} parts"])


def find_excesses(kind: RunKind, kills: list[Kill]) -> list[str]:
    """Return the kills that cost more than one interval (two with save_async) or took too long."""
    allowed = INTERVAL * (2 if kind.save_async else 1)
    return [f"{kill} cost {kill.lost} steps" for kill in kills if kill.lost > allowed] + [
        f"{kill} took {kill.seconds:.0f} s" for kill in kills if kill.seconds > LIMIT
    ]


def few_kinds() -> list[RunKind]:
    """Return the short runs of the test suite; one saves in the background."""
    return [RunKind("ddp", "lora", 14, True), RunKind("zero2", "full", 14)]


def all_chains(kills: int, work: Path, draw: random.Random, kinds: list[RunKind]) -> Iterator[Chain]:
    """Go through `kinds` in turn until there were `kills` kills, half of them during a save."""
    kill_count, each = 0, -(-kills // len(kinds))
    for k, kind in enumerate(itertools.cycle(kinds)):
        moments = [moment for _ in range(4) for moment in ("save", draw.choice(("training", "training", "start")))]
        result = run_chain(
            kind, work, work / "kills" / f"{k:03d}-{kind.name}", min(each, kills - kill_count), moments, draw
        )
        yield result
        kill_count += len(result.kills)
        if kill_count >= kills:
            return
