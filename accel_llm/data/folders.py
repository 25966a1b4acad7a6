"""The names below a folder, and links that lead back to a folder above."""

from collections.abc import Iterator
from pathlib import Path


def names_below(folder: Path, base: Path) -> Iterator[str]:
    """Yield the names below `folder`, but for hidden ones; `base` is the folder where the search began."""
    for path in folder.iterdir():
        if not path.name.startswith("."):
            yield str(path)
            if path.is_dir() and not leads_back(path, base):
                yield from names_below(path, base)


def leads_back(folder: Path, base: Path) -> bool:
    """Tell whether a folder is a link to one above it, from `base` on: each file in it would be read again and again."""
    if not folder.is_symlink():
        return False
    place = folder.resolve()
    return any(
        above.resolve().is_relative_to(place) for above in folder.parents if above == base or base in above.parents
    )
