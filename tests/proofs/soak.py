"""Disturb long runs: no work may be lost, and the result must equal that of an undisturbed run to the last bit.

    python tests/proofs/soak.py --write               everything, into golden/soak.md: some hours on two cores
    python tests/proofs/soak.py --kills 200           SIGKILLs at random moments, half of them during a save
    python tests/proofs/soak.py --corruption          every file of a checkpoint damaged in every way
    python tests/proofs/soak.py --enospc              a disk that is full at any call that writes (needs a C compiler)
    python tests/proofs/soak.py --enospc --thin       of equal calls in a row the first, the middle one and the last
    python tests/proofs/soak.py --signals             SIGTERM, SIGINT and SIGUSR1 in every phase
    python tests/proofs/soak.py --short               a bit of each: tests/launch/test_soak.py

Everything is imported once and each rank is a fork (`forks`), except for a few real launches.
"""

import argparse
import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import corruption
import fulldisk
import kills
import matrix
import preemption
import resumes
from forks import ROOT, compute, warm

GOLDEN = ROOT / "tests" / "proofs" / "golden" / "soak.md"


class Part(NamedTuple):
    """The results of one kind of disturbance: the rows of a table, a summary, and the problems."""

    title: str
    head: list[str]
    rows: list[list[str]]
    summary: str
    problems: list[str]

    def markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return f"## {self.title}\n\n{self.summary}\n\n{table}"


def verdict(problems: list[str]) -> str:
    return "; ".join(problems).replace("\n", " ").replace("|", "/")[:300] or "as promised"


def print_rows(
    title: str, entries: Iterable[Any], make_row: Callable[[Any], list[str]]
) -> tuple[list[Any], list[list[str]]]:
    """Return all entries and their rows. Print each row as soon as it is ready."""
    seen, rows = [], []
    for entry in entries:
        seen.append(entry)
        rows.append([*make_row(entry), verdict(entry.problems)])
        print(f"{title}: {'  '.join(rows[-1])}", flush=True)
    return seen, rows


def problem_rows(rows: list[list[str]]) -> list[str]:
    return ["  ".join(row) for row in rows if row[-1] != "as promised"]


def run_kills(count: int, work: Path, seed: int, kinds: list[kills.RunKind]) -> Part:
    chains, rows = [], []
    for chain in kills.all_chains(count, work, random.Random(seed), kinds):
        chains.append(chain)
        for kill in chain.kills:
            place = kill.place or "between saves"
            rows.append(
                [chain.kind, kill.moment, kill.ranks, place, str(kill.reached), str(kill.resumed), str(kill.lost)]
            )
            rows[-1].append(f"{kill.seconds:.1f}")
        rows.append([chain.kind, "end", "", "", "", "", "", "", verdict(chain.problems)])
        print(f"kills: {chain.kind}: {len(chain.kills)} kills, {rows[-1][-1]}", flush=True)
    every = [kill for chain in chains for kill in chain.kills]
    lost = {
        when: max([kill.lost for kill in every if kill.kind.endswith("async") == when], default=0)
        for when in (False, True)
    }
    places = Counter(kill.place for kill in every if kill.place)
    summary = (
        f"{len(every)} SIGKILLs in {len(chains)} runs, {places.total()} inside a save "
        f"({', '.join(f'{number} {place}' for place, number in sorted(places.items()))}), "
        f"{sum(kill.reached > 0 for kill in every)} after at least one step; "
        f"{sum(bool(c.problems) for c in chains)} runs that could not resume, "
        "lost more than they may or ended differently. Steps lost at most: "
        f"{lost[False]} (save_async: {lost[True]}) with save_steps {kills.INTERVAL}; the last process ended "
        f"{max((kill.seconds for kill in every), default=0):.1f} s after the kill."
    )
    head = [
        "run",
        "moment",
        "ranks",
        "interrupted",
        "steps done",
        "resumed from",
        "steps lost",
        "seconds",
        "verdict",
    ]
    rows = [row if len(row) == len(head) else [*row, ""] for row in rows]
    return Part("SIGKILL", head, rows, summary, [f"{c.kind}: {verdict(c.problems)}" for c in chains if c.problems])


def run_corruption(work: Path, short: bool) -> Part:
    def make_row(case: corruption.Case) -> list[str]:
        return [case.kind, case.file, case.damage, case.message]

    tested, rows = print_rows("corruption", corruption.cases(work, short), make_row)
    bad = problem_rows(rows)
    summary = f"{len(tested)} damaged checkpoints, {len(bad)} not refused by name or not gone on without as promised."
    return Part("Damaged checkpoints", ["run", "file", "damage", "message", "verdict"], rows, summary, bad)


def run_full_disks(work: Path, points: Iterator[fulldisk.Point]) -> Part:
    """Run all points. Group the results by kind of run, ranks and the file whose call failed first: a row for each."""
    groups: dict[tuple[str, ...], list[fulldisk.Refused]] = defaultdict(list)
    problems = []
    for point in points:
        result, _ = fulldisk.run_point(point, work)
        file = re.sub(r"\.\d+\.partial", ".partial", result.what.partition(" ")[2])
        key = (point.kind.name, "+".join(map(str, point.ranks)), file or "/")
        if key not in groups:
            print(f"enospc: {'  '.join(key)}", flush=True)
        groups[key].append(result)
        if result.problems:
            problems.append(f"{point.name} {result.what}: {verdict(result.problems)}")
            print(f"enospc: {problems[-1]}", flush=True)
    rows = []
    for key, results in groups.items():
        calls = ", ".join(dict.fromkeys(result.what.partition(" ")[0] for result in results))
        error_count = sum(any(result.codes) for result in results)
        longest = f"{max(result.seconds for result in results):.1f}"
        bad = [verdict(result.problems) for result in results if result.problems]
        rows.append([*key, calls, str(len(results)), str(error_count), longest, verdict(bad)])
    every = [result for results in groups.values() for result in results]
    error_count = sum(any(result.codes) for result in every)
    summary = (
        f"{len(every)} runs on a disk that is full at one call or from it on, {len(problems)} not as promised; "
        f"{error_count} ended by a sentence and {len(every) - error_count} lost nothing by it, the slowest after "
        f"{max((result.seconds for result in every), default=0):.1f} s, its start included."
    )
    head = ["run", "ranks", "first refused", "calls", "runs", "ended by a sentence", "seconds at most", "verdict"]
    return Part("Full disks", head, rows, summary, problems)


def run_signals(results: Iterator[preemption.SignalledRun]) -> Part:
    def make_row(one: preemption.SignalledRun) -> list[str]:
        codes = " ".join(map(str, one.codes))
        return [one.kind, one.phase, one.what, one.ranks, codes, f"{one.seconds:.1f}", str(one.step)]

    every, rows = print_rows("signals", results, make_row)
    bad = problem_rows(rows)
    slowest = max((one.seconds for one in every if one.what != "SIGUSR1"), default=0.0)
    summary = f"{len(every)} runs, {len(bad)} not as promised; the slowest ended {slowest:.1f} s after its signal."
    head = ["run", "phase", "signal", "to", "exit codes", "seconds", "step", "verdict"]
    return Part("Signals", head, rows, summary, bad)


def prepare(work: Path) -> None:
    matrix.prepare(work)
    resumes.prepare(work)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, metavar="N", help="SIGKILL runs N times")
    parser.add_argument("--corruption", action="store_true", help="damage every file of a checkpoint")
    parser.add_argument("--enospc", action="store_true", help="fill the disk at every call that writes")
    parser.add_argument("--thin", action="store_true", help="with --enospc: at few of equal calls in a row")
    parser.add_argument("--signals", action="store_true", help="send signals in every phase")
    parser.add_argument("--short", action="store_true", help="a bit of everything, in a minute")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choices")
    parser.add_argument(
        "--write", action="store_true", help="write the tables of what was run into tests/proofs/golden/soak.md"
    )
    parser.add_argument("--work", type=Path, help="folder to work in and to keep everything in")
    return parser.parse_args()


def run_parts(args: argparse.Namespace, work: Path) -> Iterator[Part]:
    if args.short:
        yield run_kills(8, work, args.seed, kills.few_kinds())
        yield run_corruption(work, short=True)
        if fulldisk.is_preloaded():
            yield run_full_disks(work, fulldisk.some(work, random.Random(args.seed), 6))
        yield run_signals(preemption.some(work))
        return
    everything = not (args.kills or args.corruption or args.enospc or args.signals)
    if args.kills or everything:
        yield run_kills(args.kills or 200, work, args.seed, kills.run_kinds())
    if args.corruption or everything:
        yield run_corruption(work, short=False)
    if args.signals or everything:
        yield run_signals(preemption.every(work))
    if args.enospc or everything:
        yield run_full_disks(work, fulldisk.every(work, args.thin))


def write(parts: list[Part]) -> None:
    """Write the parts into the golden file; parts that did not run this time stay as they are."""
    old = GOLDEN.read_text(encoding="utf-8").split("\n## ")[1:] if GOLDEN.exists() else []
    sections = {text.split("\n")[0]: f"## {text.rstrip()}\n" for text in old}
    sections |= {part.title: part.markdown() for part in parts}
    GOLDEN.write_text("# Runs that were disturbed\n\n" + "\n".join(sections.values()), encoding="utf-8")


def main() -> None:
    args, since = arguments(), time.monotonic()
    work = args.work or Path(tempfile.mkdtemp(prefix="soak-"))
    work.mkdir(parents=True, exist_ok=True)
    # Launched processes must import this package, not an installed one.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    fills = args.short or args.enospc or not (args.kills or args.corruption or args.signals)
    if fills and not fulldisk.is_preloaded():
        if library := fulldisk.compile_library(work):
            fulldisk.restart_with_library(library, ["--work", str(work)])
        if not args.short:
            raise SystemExit("enospc: there is no C compiler (cc), so no disk can be filled.")
        print("enospc: skipped, there is no C compiler (cc)", flush=True)
    warm()
    compute(partial(prepare, work), work / "prepare.log")
    parts = []
    for part in run_parts(args, work):
        parts.append(part)
        print(f"{part.title}: {part.summary} ({time.monotonic() - since:.0f} s)", flush=True)
    if args.write:
        write(parts)
    if problems := [line for part in parts for line in part.problems]:
        raise SystemExit("\n".join(["not as promised:", *problems]))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
