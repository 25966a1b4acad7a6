"""The parts of a corpus on the disk: pieces, each a file named by its content, and a list of them for each part."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from accel_llm.data.corpus_encode import EncodedPiece
from accel_llm.data.corpus_shards import PART_LISTS, PIECE_FILES
from accel_llm.data.ledger import Ledger
from accel_llm.data.near_duplicates import hash_bands
from accel_llm.system.disk import atomic_file, sync_to_disk

ARRAYS_OF_A_PIECE = tuple(
    field.name for field in fields(EncodedPiece) if field.name not in ("rows_read", "rearranged", "ledger")
)
_HEADER_SIZE = 8  # bytes that hold the length of a safetensors header


class PieceEntry(NamedTuple):
    """One piece in the list of a part; entries sort in the order of the rows."""

    source: int
    file: int  # index of the file in the source
    start: int  # byte of the file where its stretch begins; 0 if it is read as a whole
    index: int  # place in the stretch
    address: str
    name: str  # of the file or dataset, for messages


class PieceFile:
    """A piece on the disk; its arrays are read without mapping the file, so that they do not stay in memory."""

    def __init__(self, folder: Path, address: str):
        self.path = piece_path(folder, address)
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(_HEADER_SIZE), "little")
            self._header = json.loads(file.read(size))
        self._first = _HEADER_SIZE + size
        facts = json.loads(self._header["__metadata__"]["facts"])
        self.rows_read: int = facts["rows_read"]
        self.rearranged: int = facts["rearranged"]
        self.ledger = Ledger.from_dict(facts["ledger"])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return an array, or its elements (of the first axis) from `start` to `stop`."""
        entry = self._header[name]
        kind = np.dtype({"I32": "int32", "I64": "int64", "U32": "uint32", "U64": "uint64"}[entry["dtype"]])
        length, *rest = entry["shape"]
        stop = length if stop is None else stop
        assert stop is not None
        width = int(np.prod(rest, dtype=np.int64))
        offset = self._first + entry["data_offsets"][0] + start * width * kind.itemsize
        with self.path.open("rb") as file:
            file.seek(offset)
            return np.fromfile(file, kind, (stop - start) * width).reshape(stop - start, *rest)


def piece_path(folder: Path, address: str) -> Path:
    """Return the file of the piece; a folder holds a 256th of all pieces at most, as file systems like it."""
    return folder / PIECE_FILES / address[:2] / f"{address}.safetensors"


def write_piece(folder: Path, address: str, piece: EncodedPiece) -> None:
    """Write a piece, whole or not at all."""
    facts = {"rows_read": piece.rows_read, "rearranged": piece.rearranged, "ledger": piece.ledger.to_dict()}
    found = {name: getattr(piece, name) for name in ARRAYS_OF_A_PIECE}
    arrays = {name: np.ascontiguousarray(values) for name, values in found.items() if values is not None}
    if piece.signatures is not None:
        arrays["bands"] = hash_bands(piece.signatures)
    content = save(arrays, {"facts": json.dumps(facts)})
    write_whole(piece_path(folder, address), content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all, in a folder that need not be there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)
    sync_to_disk(path.parent)


def write_part_list(folder: Path, part: str, plan: dict[str, Any], pieces: list[PieceEntry]) -> None:
    """Write which pieces a part has; from then on the part is complete. `plan` is the same for all parts of a corpus."""
    name = f"{part.replace('/', '-of-')}.json"
    text = json.dumps({"part": part, "plan": plan, "pieces": sorted(pieces)}, indent=0, ensure_ascii=True)
    write_whole(folder / PART_LISTS / plan["key"] / name, text.encode())


def read_part_lists(folder: Path) -> list[dict[str, Any]]:
    """Return the lists of all complete parts in a folder."""
    paths = sorted(folder.glob(f"{PART_LISTS}/*/*-of-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
