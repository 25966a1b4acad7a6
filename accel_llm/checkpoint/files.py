"""The files of one checkpoint: each process writes its own, and any process reads all of them."""

import json
from pathlib import Path
from typing import Any

import torch

from accel_llm.checkpoint.pieces import PieceReader, Share
from accel_llm.errors import ConfigError
from accel_llm.system.disk import sha256, sync_to_disk
from accel_llm.system.manifest import write_part
from accel_llm.system.tensors import write_tensors


def write_rank_files(
    partial: Path, rank: int, tensors: dict[str, torch.Tensor], values: dict[str, Any], shared: dict[str, Any] | None
) -> None:
    """Write one process's files, then the list of them for the manifest."""
    files = {}
    for name, content in {f"rank-{rank:05d}.json": values, "state.json": shared}.items():
        if content is not None:
            files[name] = _write_json(partial / name, content)
    if tensors:
        name = f"rank-{rank:05d}.safetensors"
        files[name] = write_tensors(partial / name, tensors)
    write_part(partial, rank, files)


def copy_tensors(tensors: dict[str, torch.Tensor], buffers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies that training cannot change. Their memory stays in `buffers`, and the next checkpoint reuses it."""
    for name, tensor in tensors.items():
        if name not in buffers:
            # Pinned memory lets a GPU copy without waiting for the CPU.
            buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
        buffers[name].copy_(tensor, non_blocking=True)
    # The copies above may still be running.
    if any(tensor.device.type == "cuda" for tensor in tensors.values()):
        torch.cuda.synchronize()
    return {name: buffers[name] for name in tensors}


def _write_json(path: Path, content: dict[str, Any]) -> tuple[int, str]:
    """Write a file and force it to the disk. Returns its size in bytes and its SHA-256."""
    path.write_text(json.dumps(content), encoding="utf-8")
    sync_to_disk(path)
    return path.stat().st_size, sha256(path)


def open_checkpoint(folder: Path) -> PieceReader:
    """Open the tensors and numbers that all processes wrote, for any process to read what it needs.

    Raises:
        ConfigError: a file is not a safetensors file, or tensors are missing.
    """
    numbers: dict[str, Any] = {}
    expected: list[str] = []
    # Each process has listed the tensors that it wrote, so that a missing one is noticed.
    for path in sorted(folder.glob("rank-*.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        numbers |= values["numbers"]
        expected += values["tensors"]
    return PieceReader(folder, sorted(folder.glob("rank-*.safetensors")), numbers, expected)


def check_parameter_names(folder: Path, shares: list[Share], reader: PieceReader) -> None:
    """Refuse a checkpoint that lacks a parameter that is trained here.

    Raises:
        ConfigError: it does.
    """
    unknown = {piece.name for share in shares for piece in share.pieces} - reader.parameter_sizes().keys()
    if unknown:
        raise ConfigError(
            f"resume_from_checkpoint: {folder} holds other weights than this run trains ({min(unknown)} is not there); "
            "the method or model differs."
        )
