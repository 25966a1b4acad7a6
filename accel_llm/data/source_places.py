"""What the path of a source names, and which files a folder or glob has."""

import glob
import re
from pathlib import Path
from typing import Literal

from accel_llm.config.fields import Source
from accel_llm.data.corpus_shards import is_prepared_corpus
from accel_llm.data.file_lines import file_kind
from accel_llm.data.folders import leads_back, names_below
from accel_llm.data.readers import READERS, is_readable
from accel_llm.data.saved_datasets import is_saved_dataset
from accel_llm.data.splits import SplitChoice, choose_files
from accel_llm.system.hub import is_hub_id, misspelt_path
from accel_llm.system.places import is_there

PlaceKind = Literal[
    "standard input", "address", "prepared corpus", "saved dataset", "file", "folder", "glob", "hub dataset", "nothing"
]


def place_kind(source: Source) -> PlaceKind:
    """Tell what the path of a source names.

    A path that looks like a file is never looked up on the hub, even if the file does not exist.
    """
    path = Path(source.path)
    if source.path == "-":
        return "standard input"
    if re.match(r"[A-Za-z][\w+.-]+://", source.path):
        return "address"
    if is_there(path):
        if is_prepared_corpus(path):
            return "prepared corpus"
        if (path / "dataset_dict.json").is_file() or is_saved_dataset(path):
            return "saved dataset"
        return "folder" if path.is_dir() else "file"
    if glob.has_magic(source.path):
        return "glob"
    looks_local = source.path.startswith((".", "/", "~")) or file_kind(source.path)[0] in READERS
    return "nothing" if looks_local or not is_hub_id(source.path) or misspelt_path(source.path) else "hub dataset"


def matching_files(source: Source) -> list[str]:
    """Return all files below a folder or of a glob, of any kind, sorted by name; hidden files are left out."""
    return [name for name in matching_names(source) if Path(name).is_file()]


def matching_names(source: Source) -> list[str]:
    """Return the names below a folder or of a glob, sorted: of files, of folders, and of links that lead nowhere."""
    base = named_folder(source)
    if place_kind(source) == "folder":
        return sorted(names_below(base, base))
    rest = Path(source.path).parts[len(base.parts) :]
    # Not Path.glob: it also returns hidden files, and before Python 3.13 no files for a `**` at the end.
    names = sorted(set(glob.glob(str(Path(glob.escape(str(base)), *rest)), recursive=True)))  # noqa: PTH207
    folders = {folder for name in names for folder in Path(name).parents if base in folder.parents}
    circles = {folder for folder in folders if leads_back(folder, base)}
    return [name for name in names if circles.isdisjoint(Path(name).parents)]


def named_folder(source: Source) -> Path:
    """Return the folder of a folder or glob below which names say splits: for a glob, the part that exists as it is."""
    path = Path(source.path)
    return path if is_there(path) else next(filter(is_there, path.parents))


def choose_split(source: Source) -> SplitChoice | str:
    """Choose the files that are read of a folder or glob, or return the end of a sentence on why none fits."""
    files = list(filter(is_readable, matching_files(source)))
    return choose_files(files, named_folder(source), source.split, place_kind(source) == "glob")
