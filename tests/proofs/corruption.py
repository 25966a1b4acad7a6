"""Damage every file of a checkpoint in every way: it is refused by name, and the newest intact one is used."""

import contextlib
import io
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import forks
import resumes
from supervise import RunKind, find_differences

from accel_llm.system.run_lock import LOCK_NAME

STEPS, STOP = 8, 6
DAMAGES = ("missing", "truncated", "flipped", "empty", "a folder")


class Case(NamedTuple):
    """A checkpoint with one damaged file, the expected message, and the problems of the run that used it."""

    kind: str
    file: str
    damage: str
    message: str
    problems: list[str]


def run_kinds() -> list[RunKind]:
    return [RunKind("cpu", "lora", STEPS), RunKind("zero2", "full", STEPS)]


def spoil(path: Path, damage: str) -> None:
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        # Break the JSON of a manifest: one that is still valid would blame another file.
        middle = 0 if path.name == "manifest.json" else len(data) // 2
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"truncated": data[:-1], "flipped": flipped, "empty": b""}[damage])


def interrupted_run(kind: RunKind, work: Path) -> Path:
    """Return a run that was killed after step 6, with intact checkpoints of steps 4 and 6."""
    output = work / "corruption" / kind.name
    if not output.exists():
        run = kind.run(work, output, partial(resumes.stop_after, STOP))
        next(iter(forks.execute([run], work)))
    return output


def checkpoint_files(output: Path) -> list[str]:
    return sorted(path.name for path in newest(output).iterdir())


def newest(output: Path) -> Path:
    return max((output / "checkpoints").glob("step-*"))


def expected_message(file: str, damage: str) -> str:
    if file == "manifest.json" and damage == "missing":
        return "is not a whole checkpoint (no manifest.json)"
    return f"lacks {file}" if damage in ("missing", "a folder") and file != "manifest.json" else f"has a damaged {file}"


def check_in_process(kind: RunKind, work: Path, file: str, damage: str) -> Case:
    """Call `resume.newest_checkpoint` on the damaged folder, in this process."""
    from accel_llm.checkpoint import resume
    from accel_llm.system import manifest

    output = shutil.copytree(interrupted_run(kind, work), work / "corruption" / "in-process", dirs_exist_ok=False)
    spoil(newest(output) / file, damage)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        taken = resume.newest_checkpoint(output / "checkpoints", manifest.find_damage)
    message = f"checkpoint {newest(output)} {expected_message(file, damage)}; taking an older one"
    problems = [] if printed.getvalue().strip() == message else [f"reported {printed.getvalue()!r}"]
    problems += [] if taken == min((output / "checkpoints").glob("step-*")) else [f"took {taken}"]
    shutil.rmtree(output)
    return Case(kind.name, file, damage, expected_message(file, damage), problems)


def check_resume(kind: RunKind, work: Path, file: str, damage: str) -> Case:
    """Repeat the command of a run whose newest checkpoint is damaged: it resumes from the older one, bit-equal."""
    output = shutil.copytree(interrupted_run(kind, work), work / "corruption" / "resume", dirs_exist_ok=False)
    damaged, older = newest(output), min((output / "checkpoints").glob("step-*"))
    spoil(damaged / file, damage)
    run = kind.run(work, output, resumed=True)
    end = next(iter(forks.execute([run], work)))
    message = f"checkpoint {damaged} {expected_message(file, damage)}; taking an older one"
    problems = [] if message in end.log.splitlines() else [f"not reported: {message}"]
    problems += [] if f"resuming from {older}, step 4" in end.log.splitlines() else ["not the older one"]
    problems += [f"exit code {end.code}: {end.cause}"] if end.code else find_differences(kind, work, output)
    shutil.rmtree(output)
    return Case(kind.name, file, damage, expected_message(file, damage), problems)


def check_named(kind: RunKind, work: Path, file: str, damage: str) -> Case:
    """Name a damaged checkpoint: it is refused, and nothing is written."""
    output = shutil.copytree(interrupted_run(kind, work), work / "corruption" / "named", dirs_exist_ok=False)
    spoil(newest(output) / file, damage)
    message = f"error: resume_from_checkpoint: {newest(output)} {expected_message(file, damage)}."
    problems = _check_refusal(kind, work, output, message, ["--resume_from_checkpoint", str(newest(output))])
    return Case(kind.name, file, f"{damage}, named", expected_message(file, damage), problems)


def check_all_damaged(kind: RunKind, work: Path, file: str, damage: str) -> Case:
    """Damage all checkpoints: the run does not start anew unless the user asks for it."""
    output = shutil.copytree(interrupted_run(kind, work), work / "corruption" / "all", dirs_exist_ok=False)
    for folder in (output / "checkpoints").glob("step-*"):
        spoil(folder / file, damage)
    message = (
        f"error: resume_from_checkpoint: auto: none of the checkpoints in {output / 'checkpoints'} is intact; "
        "repair one, or set resume_from_checkpoint: none to start anew."
    )
    problems = _check_refusal(kind, work, output, message, [])
    return Case(kind.name, f"{file} of all", damage, "refused", problems)


def _check_refusal(kind: RunKind, work: Path, output: Path, message: str, more: list[str]) -> list[str]:
    """Repeat the command with `more` arguments: it must end with `message`, exit code 2 and unchanged files."""
    before = contents(output)
    run = kind.run(work, output, resumed=True)
    end = next(iter(forks.execute([run._replace(words=run.words + more)], work)))
    problems = [] if end.sentences == [message] else [f"reported {end.sentences}"]
    problems += [] if end.code == 2 else [f"exit code {end.code}: {end.cause}"]
    problems += [] if contents(output) == before else ["the folder is not what it was"]
    shutil.rmtree(output)
    return problems


def contents(folder: Path) -> dict[Path, bytes]:
    # A killed run leaves its lock file, and the next one removes it.
    paths = (path for path in folder.rglob("*") if path.name != LOCK_NAME)
    return {path: path.read_bytes() if path.is_file() else b"" for path in paths}


def cases(work: Path, short: bool) -> Iterator[Case]:
    """Test all damages by whole runs; `short`: by a call in this process, and one whole run of each kind."""
    for kind in run_kinds()[: 1 if short else None]:
        files = checkpoint_files(interrupted_run(kind, work))
        check = check_in_process if short else check_resume
        yield from (check(kind, work, file, damage) for file in files for damage in DAMAGES)
        file = "rank-00000.safetensors"
        if short:
            yield check_resume(kind, work, file, "flipped")
        for damage in DAMAGES[: 1 if short else None]:
            yield check_named(kind, work, file, damage)
            yield check_all_damaged(kind, work, file, damage)
