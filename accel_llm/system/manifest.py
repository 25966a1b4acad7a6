"""Folders that exist whole or not at all: what a manifest lists with size and SHA-256 is what a folder must hold.

A folder is filled under another name; its manifest is written last, and one rename makes it appear. It is removed by the
same rename the other way. So a folder that bears its name is whole, unless its files were spoiled later.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from accel_llm.system.disk import sha256, write_atomically
from accel_llm.system.folders import hidden_beside, rename_into_place

MANIFEST = "manifest.json"
DAMAGES = ("lacks {}", "has a damaged {}")


def write_part(folder: Path, rank: int, files: dict[str, tuple[int, str]]) -> None:
    """One process has written its files, {name: (size, SHA-256)}: they are on the disk when this is there."""
    write_atomically(folder / f"part-{rank:05d}.json", json.dumps(files))


def read_parts(folder: Path, world: int) -> list[Path] | None:
    """What all `world` processes wrote by `part_of`; None as long as one is missing."""
    found = [folder / f"part-{rank:05d}.json" for rank in range(world)]
    return found if all(path.is_file() for path in found) else None


def seal_folder(partial: Path, folder: Path, found: list[Path]) -> None:
    """All files are written: add them up in the manifest, and let the folder appear under its name."""
    files: dict[str, tuple[int, str]] = {}
    for path in found:
        files |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    write_atomically(partial / MANIFEST, json.dumps(files, indent=1))
    rename_into_place(partial, folder)


def remove_folder(folder: Path) -> None:
    """Take a folder's name away first: nobody shall find a part of it."""
    gone = hidden_beside(folder, "partial")
    shutil.rmtree(gone, ignore_errors=True)
    folder.rename(gone)
    shutil.rmtree(gone)


def _alone(values: list[float]) -> list[float]:
    return values


def find_damage(
    folder: Path, rank: int = 0, world: int = 1, add_up: Callable[[list[float]], list[float]] = _alone
) -> str | None:
    """What is wrong with a folder, or None when every file of its manifest is there with its size and hash.

    Each process reads its share of the files; `add_up` gives all of them the sums of what they found.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "does not exist" if not folder.exists() else f"is not a whole checkpoint (no {MANIFEST})"
    except (ValueError, IsADirectoryError):
        return f"has a damaged {MANIFEST}"
    if not _is_manifest(files):
        return f"has a damaged {MANIFEST}"
    found = [0.0] * world
    for k, (name, (size, digest)) in enumerate(files.items()):
        if k % world == rank and not found[rank] and (problem := _problem(folder / name, size, digest)):
            found[rank] = len(DAMAGES) * k + problem
    first = next((int(code) - 1 for code in add_up(found) if code), None)
    return None if first is None else DAMAGES[first % len(DAMAGES)].format(list(files)[first // len(DAMAGES)])


def _is_manifest(files: object) -> bool:
    """Names of files within the folder, with whole numbers and hashes."""
    return (
        isinstance(files, dict)
        and bool(files)
        and all(
            isinstance(entry, list)
            and len(entry) == 2
            and isinstance(entry[0], int)
            and isinstance(entry[1], str)
            and not PurePosixPath(name).is_absolute()
            and ".." not in PurePosixPath(name).parts
            for name, entry in files.items()
        )
    )


def _problem(path: Path, size: int, digest: str) -> int:
    """0, or 1 + the index of what is wrong with a file."""
    if not path.is_file():
        return 1
    return 0 if path.stat().st_size == size and sha256(path) == digest else 2
