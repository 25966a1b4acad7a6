"""Reads and writes the weights of a model folder tensor by tensor, so that the model never has to fit in memory.

The safetensors library and transformers work with memory maps of the files instead. Each page of a map stays in memory
once it has been touched.
"""

import ctypes
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file

from accel_llm.system.tensors import TensorPlace, TensorSpec, build_header, read_chunks, read_tensor, tensor_places

SYNC_FILE_RANGE_WRITE = 2  # flag of Linux' sync_file_range(2)


class WeightFiles(NamedTuple):
    """The weights of a model folder. `places` lists the tensors whose bytes may be copied from file to file."""

    specs: dict[str, TensorSpec]
    readers: dict[str, Callable[[], torch.Tensor]]
    places: dict[str, TensorPlace]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor into memory of its own, so that the caller may change it."""
        return self.readers[name]()

    def same(self, first: str, second: str) -> bool:
        """Return whether two tensors have the same dtype, shape and bits."""
        if self.specs[first] != self.specs[second]:
            return False
        # Block by block from the files if possible, so that neither tensor has to fit in memory.
        if not {first, second} <= self.places.keys():
            return torch.equal(self.read(first), self.read(second))
        pairs = zip(read_chunks(self.places[first]), read_chunks(self.places[second]), strict=True)
        return all(one == other for one, other in pairs)

    def mapped(self) -> dict[str, torch.Tensor]:
        """Return all tensors by name, memory-mapped where the files allow it."""
        tensors: dict[str, torch.Tensor] = {}
        for file in {place.file for place in self.places.values()}:
            tensors |= load_file(file)
        return {name: tensors[name] if name in self.places else self.read(name) for name in self.specs}


def open_weights(folder: Path, allow_pickle: bool = False) -> WeightFiles:
    """Open the safetensors files of a model folder, or with `allow_pickle` its .bin files if it has no safetensors.

    Raises:
        FileNotFoundError: the folder has no weights that may be read.
        ValueError: the index names files that do not exist.
        SafetensorError: a file is broken.
    """
    files = _weight_files(folder, "model.safetensors")
    if files:
        places = {name: place for file in files for name, place in tensor_places(file).items()}
        return WeightFiles(
            {name: place.spec for name, place in places.items()},
            {name: partial(read_tensor, place) for name, place in places.items()},
            places,
        )

    # Pickles: only tensors are taken from them (weights_only).
    files = _weight_files(folder, "pytorch_model.bin")
    if files and not allow_pickle:
        raise FileNotFoundError(f"{files[0].name} is a pickle; set allow_pickle to read it, or save it as safetensors")
    if not files:
        raise FileNotFoundError("it has no model.safetensors")
    loaded: dict[str, torch.Tensor] = {}
    for file in files:
        loaded |= torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    return WeightFiles(
        {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in loaded.items()},
        {name: tensor.clone for name, tensor in loaded.items()},
        {},
    )


def _weight_files(folder: Path, name: str) -> list[Path]:
    """Return the one file of this name, or all files that its index lists; the list is empty if there is neither."""
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    # Only the last part of each name counts: an untrusted index must not lead out of the folder.
    files = [folder / Path(part).name for part in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.name} names {', '.join(missing[:3])}, which does not exist")
    return files


class WeightWriter:
    """Writes the safetensors files of a model folder. Tensors may come in any order, each once.

    A thread writes one tensor while the caller works on the next; its error is raised by the next call. A new file
    starts when the next tensor would pass `shard_size` bytes. The space of all files is reserved at the start, so that
    a full disk shows before any work is done. `bytes_written` counts the bytes so far. With `check`, `checksums` has
    the CRC-32 of each tensor as the file should contain it.
    """

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], shard_size: int, check: bool):
        self.checksums: dict[str, int] = {}
        self.bytes_written = 0
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._check = check
        self._open: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int, TensorSpec]] = {}

        # Create all files.
        shards = _split_into_shards(specs, shard_size)
        files = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        files = files if len(shards) > 1 else ["model.safetensors"]
        try:
            for file, shard in zip(files, shards, strict=True):
                self._create_file(folder / file, shard)
        except BaseException:
            self.close()
            raise

        # The index says which file has which tensor.
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(spec.size for spec in specs.values())}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _create_file(self, path: Path, shard: dict[str, TensorSpec]) -> None:
        """Write the header of a file and reserve the space of its tensors."""
        # The order of the safetensors library: wide dtypes first, so that every tensor is aligned.
        names = sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name))
        specs = {name: shard[name] for name in names}
        header, places = build_header(specs, {"format": "pt"}, compact=True)
        stream = path.open("wb", buffering=0)
        self._open.append(stream)  # type: ignore[arg-type]
        # Reserve the space (macOS does not have this call).
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, len(header) + sum(spec.size for spec in specs.values()))
        stream.write(header)
        for name, spec in specs.items():
            self._places[name] = (stream, places[name], spec)  # type: ignore[assignment]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Start to write a tensor on the CPU, as `name`."""
        spec = self._places[name][2]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, (name, tensor.dtype, tensor.shape, spec)
        array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._submit(name, iter([memoryview(array)]))

    def copy(self, name: str, place: TensorPlace) -> None:
        """Start to copy the bytes at `place` to the tensor `name`."""
        assert place.spec == self._places[name][2], (name, place, self._places[name])
        self._submit(name, read_chunks(place))

    def _submit(self, name: str, parts: Iterator[memoryview]) -> None:
        self.wait()  # so that at most one tensor is held here
        self._last = self._thread.submit(self._write_blocks, name, parts, *self._places.pop(name))

    def wait(self) -> None:
        """Wait until the last tensor is written and its memory is free."""
        if self._last is not None:
            self._last.result()

    def _write_blocks(
        self, name: str, parts: Iterator[memoryview], stream: BinaryIO, offset: int, spec: TensorSpec
    ) -> None:
        """Write `parts` at `offset`; runs in the thread."""
        checksum = 0
        stream.seek(offset)
        for part in parts:
            if self._check:
                checksum = zlib.crc32(part, checksum)
            while len(part):
                part = part[stream.write(part) :]
        assert stream.tell() - offset == spec.size
        _start_writeback(stream, offset, spec.size)
        self.checksums[name] = checksum
        self.bytes_written += spec.size

    def has(self, names: Iterable[str]) -> bool:
        """Return whether all tensors `names` are written or on their way."""
        return not any(name in self._places for name in names)

    def finish(self) -> None:
        """Sync all files to the disk, once every tensor has been given."""
        self.wait()
        assert not self._places, sorted(self._places)[:3]
        for stream in self._open:
            os.fsync(stream.fileno())
        self.close()

    def close(self) -> None:
        """Stop the thread and close the files, complete or not."""
        self._thread.shutdown()
        for stream in self._open:
            stream.close()
        self._open.clear()


def _split_into_shards(specs: dict[str, TensorSpec], shard_size: int) -> list[dict[str, TensorSpec]]:
    """Fill files with tensors in order; a new file starts when the next tensor would pass `shard_size` bytes."""
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.size > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.size
    return shards


def _start_writeback(stream: BinaryIO, offset: int, size: int) -> None:
    """Let the system start writing to the disk now, so that the final sync is short."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # older releases of musl do not have it
        if call is not None:
            call(stream.fileno(), ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)
