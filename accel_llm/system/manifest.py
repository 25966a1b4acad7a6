"""Folders that are complete or do not exist, and the manifest that lists the size and SHA-256 of each of their files.

A folder is filled under a hidden name. Its manifest is written last, then one rename makes the folder appear. Deleting
starts with a rename back to the hidden name. So a folder with its normal name is complete, unless its files were
damaged later; `find_damage` checks that.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from accel_llm.system.disk import sha256, write_atomically
from accel_llm.system.folders import hidden_sibling, rename_into_place
from accel_llm.system.places import missing_reason

MANIFEST = "manifest.json"
DAMAGE_TEXTS = ("lacks {}", "has a damaged {}")


def write_part(folder: Path, rank: int, files: dict[str, tuple[int, str]]) -> None:
    """Record the files that one process has written and synced, as {name: (size in bytes, SHA-256)}."""
    write_atomically(folder / f"part-{rank:05d}.json", json.dumps(files))


def find_parts(folder: Path, world: int) -> list[Path] | None:
    """Return the records (`write_part`) of all `world` processes; None as long as one is missing."""
    paths = [folder / f"part-{rank:05d}.json" for rank in range(world)]
    return paths if all(path.is_file() for path in paths) else None


def seal_folder(partial: Path, folder: Path, parts: list[Path]) -> None:
    """Merge the records of all processes into the manifest, then rename the complete folder `partial` to `folder`."""
    files: dict[str, tuple[int, str]] = {}
    for path in parts:
        files |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    write_atomically(partial / MANIFEST, json.dumps(files, indent=1))
    rename_into_place(partial, folder)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It loses its name first, so that nobody finds a part of it."""
    hidden = hidden_sibling(folder, "partial")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden)


def _keep(values: list[float]) -> list[float]:
    """Return the sums over a single process."""
    return values


def find_damage(
    folder: Path, rank: int = 0, world: int = 1, add_up: Callable[[list[float]], list[float]] = _keep
) -> str | None:
    """Check all files of the manifest; return the first problem as the end of a sentence, or None if all are intact.

    Each process checks every `world`-th file. `add_up` returns the sums of a list over all processes, so that all of
    them get the same answer.
    """
    # The folder, and the manifest itself.
    if reason := missing_reason(folder):
        return reason
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return f"is not a whole checkpoint (no {MANIFEST})"
    except (ValueError, IsADirectoryError):
        return f"has a damaged {MANIFEST}"
    if not _is_manifest(files):
        return f"has a damaged {MANIFEST}"

    # Each process reports its first problem as one number (0: none), in a slot of its own.
    codes = [0.0] * world
    for k, (name, (size, digest)) in enumerate(files.items()):
        if k % world == rank and not codes[rank] and (damage := _damage_number(folder / name, size, digest)):
            codes[rank] = len(DAMAGE_TEXTS) * k + damage

    # The numbers of all processes, and the sentence for the first of them.
    first = next((int(code) - 1 for code in add_up(codes) if code), None)
    if first is None:
        return None
    return DAMAGE_TEXTS[first % len(DAMAGE_TEXTS)].format(list(files)[first // len(DAMAGE_TEXTS)])


def _is_manifest(files: object) -> bool:
    """Return whether `files` has the form {name within the folder: [size, SHA-256]}."""
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


def _damage_number(path: Path, size: int, digest: str) -> int:
    """Return 0 for an intact file, else 1 + the index of its damage in DAMAGE_TEXTS."""
    if not path.is_file():
        return 1
    return 0 if path.stat().st_size == size and sha256(path) == digest else 2
