"""Reads ranges of saved tensors from safetensors files, straight into the tensors that need them.

A checkpoint stores each trained tensor as flat ranges of its elements, named `parameter|field|first element`. A process
that loads reads only the ranges that it needs, from whichever files hold them.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from accel_llm.errors import ConfigError
from accel_llm.system.tensors import tensor_bytes, tensor_places

# Field of the weights themselves, and the mark of tensors that are saved as they are, not by elements.
WEIGHT, WHOLE = "weight", "whole"


class Piece(NamedTuple):
    """`size` elements of the parameter `name`, beginning at its element `start`. They lie at `offset` in a share."""

    name: str
    start: int
    offset: int
    size: int


class Share(NamedTuple):
    """One tensor that the optimizer steps: `key` in its state, and `flat`, this process's elements in one dimension."""

    name: str
    key: torch.Tensor
    flat: torch.Tensor
    pieces: list[Piece]


class StoredTensor(NamedTuple):
    """A tensor in a file: where its bytes begin, its shape, and which elements of its parameter it holds."""

    path: Path
    position: int  # in bytes
    dtype: torch.dtype
    shape: list[int]
    start: int
    size: int


class PieceReader:
    """Reads pieces out of the safetensors files of a checkpoint. It keeps the headers in memory, never the tensors.

    Args:
        folder: the checkpoint, for error messages.
        paths: its safetensors files.
        numbers: single values of the optimizer by `parameter|field`, such as a count of steps.
        expected: names of all tensors that the files must hold.

    Raises:
        ConfigError: a file is not a safetensors file, or tensors are missing.
    """

    def __init__(self, folder: Path, paths: list[Path], numbers: dict[str, Any], expected: list[str]):
        self.folder = folder
        # The optimizer's single values by parameter, then by field.
        self.numbers: dict[str, dict[str, Any]] = {}
        for key, value in numbers.items():
            name, field = key.rsplit("|", 1)
            self.numbers.setdefault(name, {})[field] = value
        # Headers only: which file holds which elements.
        self.ranges: dict[tuple[str, str], list[StoredTensor]] = {}
        self.whole: dict[str, StoredTensor] = {}
        # Sort the tensors of all files by parameter and field.
        missing = set(expected)
        for path in paths:
            for key, stored in _read_header(path):
                missing.discard(key)
                name, field, start = key.rsplit("|", 2)
                if start == WHOLE:
                    self.whole[f"{name}|{field}"] = stored
                else:
                    self.ranges.setdefault((name, field), []).append(stored._replace(start=int(start)))
        if missing:
            raise ConfigError(f"resume_from_checkpoint: {folder} lacks {len(missing)} tensors ({min(missing)}).")

    def parameter_sizes(self) -> dict[str, int]:
        """Return the number of saved elements of each parameter by name."""
        return {
            name: sum(stored.size for stored in ranges)
            for (name, field), ranges in self.ranges.items()
            if field == WEIGHT
        }

    def fields(self, share: Share) -> list[str]:
        """Return the names of the optimizer's per-element state of a share, in the order in which they were saved."""
        names = {piece.name for piece in share.pieces}
        return list(dict.fromkeys(field for name, field in self.ranges if name in names and field != WEIGHT))

    def dtype(self, share: Share, field: str) -> torch.dtype:
        return next(self.ranges[piece.name, field][0].dtype for piece in share.pieces if self.has(piece.name, field))

    def share_numbers(self, share: Share) -> dict[str, Any]:
        """Return the single values of a share, such as its count of steps. They are equal for all its parameters."""
        return next((self.numbers[piece.name] for piece in share.pieces if piece.name in self.numbers), {})

    def has(self, name: str, field: str) -> bool:
        return (name, field) in self.ranges

    def fill(self, piece: Piece, field: str, flat: torch.Tensor) -> None:
        """Read a piece into its place in `flat`, the elements of its share.

        Raises:
            ConfigError: the checkpoint lacks some of its elements, or has them in another dtype.
        """
        stop, filled = piece.start + piece.size, 0
        # Each stored range gives the elements that it has in common with the piece.
        for stored in self.ranges.get((piece.name, field), ()):
            first, last = max(piece.start, stored.start), min(stop, stored.start + stored.size)
            if first < last:
                at = piece.offset + first - piece.start  # where these elements lie in `flat`
                self._read(stored, first - stored.start, flat[at : at + last - first], f"{piece.name} ({field})")
                filled += last - first
        if filled != piece.size:
            raise ConfigError(
                f"resume_from_checkpoint: {self.folder} holds {filled} of {piece.size} elements of {piece.name} "
                f"({field})."
            )

    def read_all(self, name: str, field: str, shape: Iterable[int]) -> torch.Tensor:
        """Return all elements of a tensor in the dtype in which it was saved.

        Raises:
            ConfigError: the checkpoint lacks some of its elements.
        """
        ranges = self.ranges.get((name, field), ())
        tensor = torch.empty(tuple(shape), dtype=ranges[0].dtype if ranges else None)
        self.fill(Piece(name, 0, 0, tensor.numel()), field, tensor.view(-1))
        return tensor

    def _read(self, stored: StoredTensor, first: int, target: torch.Tensor, label: str) -> None:
        """Fill `target` with the elements of a stored tensor from element `first` on."""
        if stored.dtype != target.dtype:
            raise ConfigError(
                f"resume_from_checkpoint: {self.folder} has {label} in {stored.dtype}, not {target.dtype}."
            )
        # A file is read straight into CPU memory; other tensors need a copy in between.
        direct = target.device.type == "cpu" and target.is_contiguous()
        buffer = target if direct else torch.empty_like(target, device="cpu")
        with stored.path.open("rb") as file:
            file.seek(stored.position + first * target.element_size())
            if file.readinto(tensor_bytes(buffer)) != target.numel() * target.element_size():
                raise ConfigError(f"resume_from_checkpoint: {stored.path} is cut short.")
        if buffer is not target:
            target.copy_(buffer)

    def read_whole(self, share: Share, field: str, device: torch.device) -> torch.Tensor:
        """Read state that has no value per element, such as the scales of 8-bit blocks.

        Raises:
            ConfigError: the state was saved by another number of processes, which held other parts of it.
        """
        stored = self.whole.get(f"{share.name}|{field}")
        if stored is None:
            raise ConfigError(
                f"optim: {self.folder} holds its state in blocks of the processes that saved it; resume with the same "
                "number of processes and the same launch YAML."
            )
        tensor = torch.empty(stored.shape, dtype=stored.dtype)
        self._read(stored, 0, tensor.view(-1), f"{share.name} ({field})")
        return tensor.to(device)


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """Read the header of a safetensors file: yield the name and place of each tensor.

    Raises:
        ConfigError: the file is not a safetensors file.
    """
    try:
        places = tensor_places(path)
    except (SafetensorError, ValueError):
        raise ConfigError(f"resume_from_checkpoint: {path} is not a safetensors file.") from None
    for name, (_, position, spec) in places.items():
        yield name, StoredTensor(path, position, spec.dtype, list(spec.shape), 0, math.prod(spec.shape))
