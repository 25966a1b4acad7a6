"""Files and folders that the user names: the home folder in a name, and why there is nothing at a place."""

import difflib
import errno
import itertools
import os
import re
from pathlib import Path

# How close a misspelt name must be, as difflib counts it; short names are much alike, such as `one` and `none`.
CLOSENESS, CLOSENESS_OF_SHORT = 0.75, 0.88
MAX_NAMES = 10_000  # of a folder, among which a misspelt name is looked for


def expand_home(name: str) -> str:
    """Replace a leading `~` or `~user` by the home folder: in a recipe, and after `--name=`, no shell does it."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:  # no user has this name; `missing_reason` will say that nothing is there
        return name


def is_there(name: str | Path) -> bool:
    """Tell whether a file or folder is at `name`; unlike Path.exists it takes any text, and never fails."""
    try:
        Path(name).stat()
    except (OSError, ValueError):  # a name that is too long, a folder that may not be read, a null byte
        return False
    return True


def missing_reason(name: str | Path) -> str:
    """Say why there is no file or folder at `name`, as the end of a sentence; empty if there is one.

    It names the symbolic link that leads nowhere, or the file or folder that was probably meant.
    """
    path = Path(name)
    try:
        path.stat()
        return ""
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            return f"cannot be read ({error.strerror})"
    except ValueError:  # a null byte
        return "cannot be the name of a file"
    for part in (path, *path.parents):
        if part.is_symlink() and not is_there(part):
            through = "is" if part == path else f"does not exist, because {part} is"
            return f"{through} a symbolic link to {part.readlink()}, which does not exist"
    meant = close_path(path)
    return f"does not exist, but {meant} does" if meant else "does not exist"


def close_path(path: Path) -> Path | None:
    """Return the path of a file or folder that is `path` but for the spelling of some parts; None if there is none."""
    place = Path(path.anchor)
    for part in path.parts[1 if path.anchor else 0 :]:
        if not is_there(place / part):
            try:
                names = [entry.name for entry in itertools.islice(os.scandir(place), MAX_NAMES)]
            except OSError:  # a file, or a folder that may not be read
                return None
            meant = _close_name(part, names)
            if meant is None:
                return None
            part = meant
        place /= part
    return place if is_there(place) else None


def _close_name(name: str, names: list[str]) -> str | None:
    """Return the one of `names` that `name` misspells. Other numbers are no misspelling: they name another thing."""
    same_numbers = {
        other.lower(): other
        for other in names
        if _numbers(other) == _numbers(name) and other.startswith(".") == name.startswith(".")
    }
    cutoff = CLOSENESS if len(name) > 4 else CLOSENESS_OF_SHORT
    matches = difflib.get_close_matches(name.lower(), same_numbers, n=1, cutoff=cutoff)
    return same_numbers[matches[0]] if matches else None


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"[0-9]+", name)]
