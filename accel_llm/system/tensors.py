"""Reads and writes single safetensors files: dtypes, header and tensors."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import safe_open

# torch's dtypes by their names in the safetensors format.
DTYPES_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}
MAX_HEADER = 2**27  # bytes of a header that are read at most
COPY_BLOCK_SIZE = 2**23  # bytes


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def build_header(
    specs: dict[str, TensorSpec], metadata: dict[str, str] | None = None, compact: bool = False
) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a safetensors file, up to its first tensor, and the offset of each tensor in the file.

    The tensors are laid out in the order of `specs`. `compact` writes the JSON without blanks, as the safetensors
    library does.
    """
    # Offsets in the header count from its end.
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    starts, end = {}, 0
    for name, spec in specs.items():
        starts[name], end = end, end + spec.size
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries, separators=(",", ":") if compact else None).encode()
    # The length of the JSON comes first, in 8 bytes; blanks after it align the first tensor to 8 bytes.
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def find_nonfinite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors that contain a NaN or an infinity."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()}
    return [name for name, tensor in floats.items() if not torch.stack(torch.aminmax(tensor)).isfinite().all()]


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Write a safetensors file and sync it to the disk; return its size in bytes and its SHA-256.

    The safetensors library is not used for this: it needs all tensors in memory at once, does not return the hash of
    the bytes that were meant to be written, and writes metadata in a random order.
    """
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, _ = build_header(specs, metadata)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in (header, *map(tensor_bytes, tensors.values())):
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a tensor in the order that files have them (C order)."""
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class TensorPlace(NamedTuple):
    """The place of a tensor's bytes: the file, and the offset in bytes from its start."""

    file: Path
    offset: int
    spec: TensorSpec


def read_header(stream: BinaryIO) -> tuple[bytes, int]:
    """Read the header of a safetensors file: return its JSON text and the offset in bytes of the first tensor.

    Of a broken header at most MAX_HEADER bytes are read.
    """
    length = int.from_bytes(stream.read(8), "little")
    return stream.read(min(length, MAX_HEADER)), 8 + length


def tensor_places(file: Path) -> dict[str, TensorPlace]:
    """Return the place of each tensor in a safetensors file.

    Raises:
        SafetensorError: the file is not in the safetensors format, or it is cut short.
        ValueError: a tensor has a dtype that cannot be read.
    """
    # Opening the file checks that the header and the size of the file agree.
    with safe_open(file, framework="pt"):
        pass
    with file.open("rb") as stream:
        text, first = read_header(stream)
    header = json.loads(text)
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES_BY_NAME:
            raise ValueError(f"{file.name}: {name} has dtype {entry['dtype']}, which cannot be read")
        spec = TensorSpec(DTYPES_BY_NAME[entry["dtype"]], tuple(entry["shape"]))
        places[name] = TensorPlace(file, first + entry["data_offsets"][0], spec)
    return places


def read_tensor(place: TensorPlace) -> torch.Tensor:
    """Read a tensor into memory of its own, not into a memory map."""
    # The tensor's memory as bytes, filled by one or more reads.
    memory = torch.empty(place.spec.size, dtype=torch.uint8)
    array: Any = memory.numpy()
    view = memoryview(array)
    with place.file.open("rb", buffering=0) as stream:
        stream.seek(place.offset)
        while len(view):
            count = stream.readinto(view)  # type: ignore[attr-defined] # Linux reads at most 2 GiB at once
            if not count:
                raise OSError(f"{place.file} ends before its last tensor")
            view = view[count:]
    return memory.view(place.spec.dtype).view(place.spec.shape)


def read_chunks(place: TensorPlace) -> Iterator[memoryview]:
    """Yield the bytes at `place` block by block. All blocks share one buffer: use each before asking for the next."""
    buffer, left = memoryview(bytearray(min(COPY_BLOCK_SIZE, place.spec.size))), place.spec.size
    with place.file.open("rb", buffering=0) as stream:
        stream.seek(place.offset)
        while left:
            part = buffer[: min(len(buffer), left)]
            if stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise OSError(f"{place.file} ends before its last tensor")
            yield part
            left -= len(part)
