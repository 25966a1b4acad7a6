"""What the ledger says of sources beside their numbers."""

import itertools
from pathlib import PurePath

from accel_llm.config.fields import Source
from accel_llm.data.readers import is_readable
from accel_llm.data.source_places import choose_split, matching_files, named_folder, place_kind
from accel_llm.data.sources import check_source, source_files
from accel_llm.data.splits import SplitChoice, list_groups, list_splits

_ABOUT_FILES = ("readme", "license", "licence")  # files that nobody takes for rows


def source_notes(source: Source) -> list[str]:
    """Return sentences for the ledger: which files are left out, and that lines were taken for documents, if nobody said so.

    Raises:
        DataError: the source cannot be read.
    """
    notes = [left_out_note(source)]
    if source.sample_by is None and any(file.kind == ".txt" for file in source_files(source)):
        notes.append(
            f"{source.path}: each line of a .txt file is a document; for texts of several lines set sample_by: paragraph (up "
            "to an empty line) or document (the whole file)."
        )
    return [note for note in notes if note]


def left_out_note(source: Source) -> str | None:
    """Return a sentence for the ledger on the files of a folder or glob that are not read; None if all are.

    They are of other splits, or of kinds that cannot be read.

    Raises:
        DataError: the source cannot be read.
    """
    check_source(source)
    choice = choose_split(source) if place_kind(source) in ("folder", "glob") else None
    if not isinstance(choice, SplitChoice):
        return None
    facts, base = [], named_folder(source)
    if choice.left_out:
        left_out = list_splits(choice.left_out, base)
        facts.append(f"only the files of its split {source.split} are read; left out: {left_out}")
    unreadable: dict[str, list[str]] = {}
    for name in itertools.filterfalse(is_readable, matching_files(source)):
        if not PurePath(name).name.lower().startswith(_ABOUT_FILES):
            unreadable.setdefault("".join(PurePath(name).suffixes[-1:]) or "no suffix", []).append(name)
    if unreadable:
        facts.append(f"files of kinds that cannot be read are left out: {list_groups(unreadable, base)}")
    return f"{source.path}: {'; '.join(facts)}." if facts else None
