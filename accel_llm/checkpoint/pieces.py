"""Ranges of the elements of tensors, in safetensors files: written one after the other, read where they are wanted.

A checkpoint keeps what is trained as flat ranges, named `parameter|field|first element`. Whoever reads takes the ranges that
it needs, from whichever files have them, straight into their place.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from accel_llm.errors import ConfigError
from accel_llm.system.tensors import DTYPES_BY_NAME, MAX_HEADER, tensor_bytes

WEIGHT, WHOLE = "weight", "whole"


class Piece(NamedTuple):
    """`size` elements of the parameter `name` from element `start` on, at `offset` in the tensor of their owner."""

    name: str
    start: int
    offset: int
    size: int


class Share(NamedTuple):
    """What the optimizer steps as one tensor: `key` in its state, `flat` its elements on this process as one dimension."""

    name: str
    key: torch.Tensor
    flat: torch.Tensor
    pieces: list[Piece]


class Entry(NamedTuple):
    """A tensor in a file: where its elements are, which of its parameter they are, and how it was shaped."""

    path: Path
    position: int  # in bytes
    dtype: torch.dtype
    shape: list[int]
    start: int
    size: int


class PieceReader:
    """The pieces in the safetensors files of a checkpoint, read where they are needed and nowhere kept."""

    def __init__(self, folder: Path, paths: list[Path], numbers: dict[str, Any], expected: list[str]):
        self.folder = folder
        self.numbers: dict[str, dict[str, Any]] = {}
        for key, value in numbers.items():
            name, field = key.rsplit("|", 1)
            self.numbers.setdefault(name, {})[field] = value
        self.entries: dict[tuple[str, str], list[Entry]] = {}
        self.whole: dict[str, Entry] = {}
        missing = set(expected)
        for path in paths:
            for key, entry in _entries(path):
                missing.discard(key)
                name, field, start = key.rsplit("|", 2)
                if start == WHOLE:
                    self.whole[f"{name}|{field}"] = entry
                else:
                    self.entries.setdefault((name, field), []).append(entry._replace(start=int(start)))
        if missing:
            raise ConfigError(f"resume_from_checkpoint: {folder} lacks {len(missing)} tensors ({min(missing)}).")

    def names(self) -> dict[str, int]:
        """Every parameter that is saved, with its number of elements."""
        return {name: sum(e.size for e in found) for (name, field), found in self.entries.items() if field == WEIGHT}

    def fields(self, owner: Share) -> list[str]:
        """What the optimizer had for each element of any of the owner's parameters, in the order in which it was saved."""
        names = {piece.name for piece in owner.pieces}
        return list(dict.fromkeys(field for name, field in self.entries if name in names and field != WEIGHT))

    def dtype(self, owner: Share, field: str) -> torch.dtype:
        return next(self.entries[piece.name, field][0].dtype for piece in owner.pieces if self.has(piece.name, field))

    def numbers_of(self, owner: Share) -> dict[str, Any]:
        """The single numbers of an owner, such as its count of steps: all its parameters have the same."""
        return next((self.numbers[piece.name] for piece in owner.pieces if piece.name in self.numbers), {})

    def has(self, name: str, field: str) -> bool:
        return (name, field) in self.entries

    def fill(self, piece: Piece, field: str, flat: torch.Tensor) -> None:
        """Read a piece into its place in the owner's `flat` elements.

        Raises:
            ConfigError: the checkpoint lacks some of it, or holds it in another dtype.
        """
        stop, filled = piece.start + piece.size, 0
        for entry in self.entries.get((piece.name, field), ()):
            first, last = max(piece.start, entry.start), min(stop, entry.start + entry.size)
            if first < last:
                at = piece.offset + first - piece.start
                self._read(entry, first - entry.start, flat[at : at + last - first], f"{piece.name} ({field})")
                filled += last - first
        if filled != piece.size:
            raise ConfigError(
                f"resume_from_checkpoint: {self.folder} holds {filled} of {piece.size} elements of {piece.name} ({field})."
            )

    def _read(self, entry: Entry, first: int, into: torch.Tensor, what: str) -> None:
        if entry.dtype != into.dtype:
            raise ConfigError(f"resume_from_checkpoint: {self.folder} has {what} in {entry.dtype}, not {into.dtype}.")
        buffer = into if into.device.type == "cpu" and into.is_contiguous() else torch.empty_like(into, device="cpu")
        with entry.path.open("rb") as file:
            file.seek(entry.position + first * into.element_size())
            if file.readinto(tensor_bytes(buffer)) != into.numel() * into.element_size():
                raise ConfigError(f"resume_from_checkpoint: {entry.path} ends too soon.")
        if buffer is not into:
            into.copy_(buffer)

    def read_whole(self, owner: Share, field: str, device: torch.device) -> torch.Tensor:
        """State that is no number for each element.

        Raises:
            ConfigError: the processes held other parts of the optimizer's state when it was saved.
        """
        entry = self.whole.get(f"{owner.name}|{field}")
        if entry is None:
            raise ConfigError(
                f"optim: its state in {self.folder} is in blocks of the processes that saved it; resume with the same "
                "number of processes and the same launch YAML."
            )
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._read(entry, 0, tensor.view(-1), f"{owner.name} ({field})")
        return tensor.to(device)


def _entries(path: Path) -> Iterator[tuple[str, Entry]]:
    """The header of a safetensors file.

    Raises:
        ConfigError: it is not one.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, MAX_HEADER)))
            ends = [about["data_offsets"][1] for about in header.values()]
            if 8 + length + max(ends, default=0) != path.stat().st_size:
                raise ValueError
            for name, about in header.items():
                position = 8 + length + about["data_offsets"][0]
                size = math.prod(about["shape"])
                yield name, Entry(path, position, DTYPES_BY_NAME[about["dtype"]], about["shape"], 0, size)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(f"resume_from_checkpoint: {path} is not a safetensors file.") from None
