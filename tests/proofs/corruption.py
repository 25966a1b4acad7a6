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
from supervise import Course, compared

STEPS, STOP = 8, 6
DAMAGES = ("missing", "truncated", "flipped", "empty", "a folder")


class Case(NamedTuple):
    """A checkpoint with one damaged file, the message expected for it, and the problems of the run that met it."""

    course: str
    file: str
    damage: str
    told: str
    wrong: list[str]


def courses() -> list[Course]:
    return [Course("cpu", "lora", STEPS), Course("zero2", "full", STEPS)]


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


def interrupted(course: Course, work: Path) -> Path:
    """Return a run that was killed after step 6, with intact checkpoints of steps 4 and 6."""
    output = work / "corruption" / course.name
    if not output.exists():
        run = course.run(work, output, partial(resumes.stop_after, STOP))
        next(iter(forks.execute([run], work)))
    return output


def checkpoint_files(output: Path) -> list[str]:
    return sorted(path.name for path in newest(output).iterdir())


def newest(output: Path) -> Path:
    return max((output / "checkpoints").glob("step-*"))


def expected(file: str, damage: str) -> str:
    if file == "manifest.json" and damage == "missing":
        return "is not a whole checkpoint (no manifest.json)"
    return f"lacks {file}" if damage in ("missing", "a folder") and file != "manifest.json" else f"has a damaged {file}"


def looked_at(course: Course, work: Path, file: str, damage: str) -> Case:
    """Call `resume.newest_checkpoint` on the damaged folder, in this process."""
    from accel_llm.checkpoint import resume
    from accel_llm.system import manifest

    output = shutil.copytree(interrupted(course, work), work / "corruption" / "looked-at", dirs_exist_ok=False)
    spoil(newest(output) / file, damage)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        taken = resume.newest_checkpoint(output / "checkpoints", manifest.find_damage)
    told = f"checkpoint {newest(output)} {expected(file, damage)}; taking an older one"
    wrong = [] if printed.getvalue().strip() == told else [f"told {printed.getvalue()!r}"]
    wrong += [] if taken == min((output / "checkpoints").glob("step-*")) else [f"took {taken}"]
    shutil.rmtree(output)
    return Case(course.name, file, damage, expected(file, damage), wrong)


def gone_on_from(course: Course, work: Path, file: str, damage: str) -> Case:
    """Repeat the command of a run whose newest checkpoint is damaged: it resumes from the older one, bit-equal."""
    output = shutil.copytree(interrupted(course, work), work / "corruption" / "gone-on", dirs_exist_ok=False)
    damaged, older = newest(output), min((output / "checkpoints").glob("step-*"))
    spoil(damaged / file, damage)
    run = course.run(work, output, goes_on=True)
    end = next(iter(forks.execute([run], work)))
    told = f"checkpoint {damaged} {expected(file, damage)}; taking an older one"
    wrong = [] if told in end.log.splitlines() else [f"not told: {told}"]
    wrong += [] if f"resuming from {older}, step 4" in end.log.splitlines() else ["not the older one"]
    wrong += [f"exit code {end.code}: {end.cause}"] if end.code else compared(course, work, output)
    shutil.rmtree(output)
    return Case(course.name, file, damage, expected(file, damage), wrong)


def named(course: Course, work: Path, file: str, damage: str) -> Case:
    """A damaged checkpoint that the user names is refused, and nothing is written."""
    output = shutil.copytree(interrupted(course, work), work / "corruption" / "named", dirs_exist_ok=False)
    spoil(newest(output) / file, damage)
    told = f"error: resume_from_checkpoint: {newest(output)} {expected(file, damage)}."
    wrong = _refused(course, work, output, told, ["--resume_from_checkpoint", str(newest(output))])
    return Case(course.name, file, f"{damage}, named", expected(file, damage), wrong)


def all_damaged(course: Course, work: Path, file: str, damage: str) -> Case:
    """If all checkpoints are damaged, the run does not start again by itself: the user must ask for that."""
    output = shutil.copytree(interrupted(course, work), work / "corruption" / "all", dirs_exist_ok=False)
    for folder in (output / "checkpoints").glob("step-*"):
        spoil(folder / file, damage)
    told = (
        f"error: resume_from_checkpoint: auto: none of the checkpoints in {output / 'checkpoints'} is intact; "
        "repair one, or set resume_from_checkpoint: none to start anew."
    )
    wrong = _refused(course, work, output, told, [])
    return Case(course.name, f"{file} of all", damage, "refused", wrong)


def _refused(course: Course, work: Path, output: Path, told: str, more: list[str]) -> list[str]:
    before = contents(output)
    run = course.run(work, output, goes_on=True)
    end = next(iter(forks.execute([run._replace(words=run.words + more)], work)))
    wrong = [] if end.sentences == [told] else [f"told {end.sentences}"]
    wrong += [] if end.code == 2 else [f"exit code {end.code}: {end.cause}"]
    wrong += [] if contents(output) == before else ["the folder is not what it was"]
    shutil.rmtree(output)
    return wrong


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def cases(work: Path, short: bool) -> Iterator[Case]:
    """Test all damages by whole runs; `short`: by a call in this process, and one whole run of each kind."""
    for course in courses()[: 1 if short else None]:
        files = checkpoint_files(interrupted(course, work))
        look = looked_at if short else gone_on_from
        yield from (look(course, work, file, damage) for file in files for damage in DAMAGES)
        file = "rank-00000.safetensors"
        if short:
            yield gone_on_from(course, work, file, "flipped")
        for damage in DAMAGES[: 1 if short else None]:
            yield named(course, work, file, damage)
            yield all_damaged(course, work, file, damage)
