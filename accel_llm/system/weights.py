"""Safetensors as streams: a tensor is read into memory of its own when it is asked for, and written where its place is.

The files of a model are read and written without ever being in memory: maps of them, which `safetensors` and transformers
work with, stay in memory page by page as they are touched.
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

SYNC_FILE_RANGE_WRITE = 2  # of Linux' sync_file_range(2)


class WeightFiles(NamedTuple):
    """The weights of a model folder. `places` has those that may be copied as they are."""

    specs: dict[str, TensorSpec]
    readers: dict[str, Callable[[], torch.Tensor]]
    places: dict[str, TensorPlace]

    def read(self, name: str) -> torch.Tensor:
        """A tensor of its own, that may be written to."""
        return self.readers[name]()

    def same(self, first: str, second: str) -> bool:
        """Whether two tensors are equal bit by bit."""
        if self.specs[first] != self.specs[second]:
            return False
        if not {first, second} <= self.places.keys():
            return torch.equal(self.read(first), self.read(second))
        pairs = zip(read_chunks(self.places[first]), read_chunks(self.places[second]), strict=True)
        return all(one == other for one, other in pairs)

    def mapped(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as maps of the files where they can be."""
        found: dict[str, torch.Tensor] = {}
        for file in {place.file for place in self.places.values()}:
            found |= load_file(file)
        return {name: found[name] if name in self.places else self.read(name) for name in self.specs}


def open_weights(folder: Path, allow_pickle: bool = False) -> WeightFiles:
    """The weights of a model folder, of safetensors or, with `allow_pickle`, of .bin files.

    Raises:
        FileNotFoundError: there are none that may be read.
        ValueError: of an index that names files that are not there.
        SafetensorError: a file is broken.
    """
    files = _files(folder, "model.safetensors")
    if files:
        found = {name: place for file in files for name, place in tensor_places(file).items()}
        return WeightFiles(
            {name: place.spec for name, place in found.items()},
            {name: partial(read_tensor, place) for name, place in found.items()},
            found,
        )
    files = _files(folder, "pytorch_model.bin")
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


def _files(folder: Path, name: str) -> list[Path]:
    index = folder / f"{name}.index.json"
    if not index.is_file():
        return [folder / name] if (folder / name).is_file() else []
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / Path(part).name for part in sorted(names)]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index.name} names {', '.join(missing[:3])}, which is not there")
    return files


class WeightWriter:
    """The safetensors files of a model folder, whose tensors are written in any order, each once, behind the caller's back.

    One tensor is on its way to the disk while the caller works on the next; an error is raised with the next call.
    Files are split where the next tensor would pass `shard_size` bytes. Their space is taken at once, so a full disk is
    found out before any work is done. With `check`, `sums` has the CRC-32 of each tensor as it should lie in the file.
    `written` are the bytes so far.
    """

    def __init__(self, folder: Path, specs: dict[str, TensorSpec], shard_size: int, check: bool):
        self.sums: dict[str, int] = {}
        self.written = 0
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None
        self._check = check
        self._open: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int, TensorSpec]] = {}
        shards = _split(specs, shard_size)
        files = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
        files = files if len(shards) > 1 else ["model.safetensors"]
        try:
            for file, shard in zip(files, shards, strict=True):
                self._start(folder / file, shard)
        except BaseException:
            self.close()
            raise
        if len(shards) > 1:
            weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": sum(spec.size for spec in specs.values())}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _start(self, path: Path, shard: dict[str, TensorSpec]) -> None:
        # In the order of safetensors' own writer: wide dtypes first, so that every tensor is aligned.
        names = sorted(shard, key=lambda name: (-shard[name].dtype.itemsize, name))
        specs = {name: shard[name] for name in names}
        header, places = build_header(specs, {"format": "pt"}, compact=True)
        stream = path.open("wb", buffering=0)
        self._open.append(stream)  # type: ignore[arg-type]
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(stream.fileno(), 0, len(header) + sum(spec.size for spec in specs.values()))
        stream.write(header)
        for name, spec in specs.items():
            self._places[name] = (stream, places[name], spec)  # type: ignore[assignment]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        spec = self._places[name][2]
        assert (tensor.dtype, tuple(tensor.shape)) == spec, (name, tensor.dtype, tensor.shape, spec)
        array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        self._submit(name, iter([memoryview(array)]))

    def copy(self, name: str, place: TensorPlace) -> None:
        """Write `name` with the bytes that lie at `place`."""
        assert place.spec == self._places[name][2], (name, place, self._places[name])
        self._submit(name, read_chunks(place))

    def _submit(self, name: str, parts: Iterator[memoryview]) -> None:
        self.wait()  # so that no more than one tensor is kept here
        self._last = self._thread.submit(self._write, name, parts, *self._places.pop(name))

    def wait(self) -> None:
        """Until what was given is written, and its memory free."""
        if self._last is not None:
            self._last.result()

    def _write(self, name: str, parts: Iterator[memoryview], stream: BinaryIO, offset: int, spec: TensorSpec) -> None:
        start, total = offset, 0
        for part in parts:
            if self._check:
                total = zlib.crc32(part, total)
            while len(part):
                count = os.pwrite(stream.fileno(), part, offset)
                offset, part = offset + count, part[count:]
        assert offset - start == spec.size
        _write_back(stream, start, spec.size)
        self.sums[name] = total
        self.written += spec.size

    def has(self, names: Iterable[str]) -> bool:
        """Whether all of these are written."""
        return not any(name in self._places for name in names)

    def finish(self) -> None:
        """All is written: bring it to the disk."""
        self.wait()
        assert not self._places, sorted(self._places)[:3]
        for stream in self._open:
            os.fsync(stream.fileno())
        self.close()

    def close(self) -> None:
        self._thread.shutdown()
        for stream in self._open:
            stream.close()
        self._open.clear()


def _split(specs: dict[str, TensorSpec], shard_size: int) -> list[dict[str, TensorSpec]]:
    shards: list[dict[str, TensorSpec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + spec.size > shard_size:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.size
    return shards


def _write_back(stream: BinaryIO, offset: int, size: int) -> None:
    """Have the system begin to write to the disk, so that little is left to wait for at the end."""
    if sys.platform == "linux":
        call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # musl has none in older releases
        if call is not None:
            call(stream.fileno(), ctypes.c_int64(offset), ctypes.c_int64(size), SYNC_FILE_RANGE_WRITE)
