"""One safetensors file: its dtypes and header, and tensors written to it and read from it."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

# The names that the safetensors format gives to torch's dtypes.
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
MAX_HEADER = 2**27  # bytes
COPIED_AT_ONCE = 2**23  # bytes that are copied at a time


class TensorSpec(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def build_header(
    specs: dict[str, TensorSpec], metadata: dict[str, str] | None = None, compact: bool = False
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a safetensors file, up to its first tensor, and the position of each tensor in the file.

    The tensors follow one another in the order of `specs`. `compact` leaves out blanks, as safetensors' own writer does.
    """
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
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def names_not_finite(kept: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that hold a NaN or an infinity."""
    floats = {name: tensor for name, tensor in kept.items() if tensor.is_floating_point() and tensor.numel()}
    return [name for name, tensor in floats.items() if not torch.stack(torch.aminmax(tensor)).isfinite().all()]


def write_tensors(path: Path, kept: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> tuple[int, str]:
    """Write a safetensors file, one tensor after the other; its size and SHA-256, and it is on the disk.

    safetensors' own writer wants all tensors in memory at once, nobody would know the hash of what was meant, and it writes
    metadata in another order each time.
    """
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in kept.items()}
    header, _ = build_header(specs, metadata)
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in (header, *map(tensor_bytes, kept.values())):
            digest.update(block)
            size += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)


class TensorPlace(NamedTuple):
    """Where the bytes of a tensor lie."""

    file: Path
    offset: int
    spec: TensorSpec


def tensor_places(file: Path) -> dict[str, TensorPlace]:
    """The tensors of a safetensors file by name.

    Raises:
        SafetensorError: it is none, or it is cut short.
        ValueError: it holds tensors of a dtype that torch does not have.
    """
    with safe_open(file, framework="pt"):  # which checks that the header and the file's size agree
        pass
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES_BY_NAME:
            raise ValueError(f"{file.name}: {name} is of dtype {entry['dtype']}, which cannot be read")
        spec = TensorSpec(DTYPES_BY_NAME[entry["dtype"]], tuple(entry["shape"]))
        found[name] = TensorPlace(file, 8 + length + entry["data_offsets"][0], spec)
    return found


def read_tensor(place: TensorPlace) -> torch.Tensor:
    memory = torch.empty(place.spec.size, dtype=torch.uint8)
    array: Any = memory.numpy()
    view = memoryview(array)
    with place.file.open("rb", buffering=0) as stream:
        stream.seek(place.offset)
        while len(view):
            count = stream.readinto(view)  # type: ignore[attr-defined] # 2 GiB at most
            if not count:
                raise OSError(f"{place.file} ends before its last tensor")
            view = view[count:]
    return memory.view(place.spec.dtype).view(place.spec.shape)


def read_chunks(place: TensorPlace) -> Iterator[memoryview]:
    """The bytes at `place`, in one buffer after the other; each is gone when the next is asked for."""
    buffer, left = memoryview(bytearray(min(COPIED_AT_ONCE, place.spec.size))), place.spec.size
    with place.file.open("rb", buffering=0) as stream:
        stream.seek(place.offset)
        while left:
            part = buffer[: min(len(buffer), left)]
            if stream.readinto(part) != len(part):  # type: ignore[attr-defined]
                raise OSError(f"{place.file} ends before its last tensor")
            yield part
            left -= len(part)
