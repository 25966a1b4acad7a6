"""Weights that are read and written tensor by tensor equal those of the safetensors library."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from accel_llm.system import tensors
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightWriter, open_weights

STATE = {
    "whole": torch.arange(12, dtype=torch.float32).view(3, 4),
    "half": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "counts": torch.tensor([1, 2, 3], dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "one": torch.tensor(2.5),
    "none": torch.zeros(0, 4, dtype=torch.float16),
}
SPECS = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in STATE.items()}


def test_files_of_the_safetensors_library_are_read(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors")
    weights = open_weights(tmp_path)
    assert weights.specs == SPECS
    for name, tensor in STATE.items():
        copy = weights.read(name)
        assert torch.equal(copy, tensor) and copy.dtype == tensor.dtype
        copy.fill_(1)  # memory of its own
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in STATE.items())
    assert weights.mapped().keys() == STATE.keys()


def test_tensors_written_in_any_order_give_the_file_of_the_safetensors_library(tmp_path):
    writer = WeightWriter(tmp_path, SPECS, shard_size=10**9, check=True)
    for name in sorted(STATE, reverse=True):
        writer.write(name, STATE[name])
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == STATE.keys() and all(torch.equal(loaded[name], STATE[name]) for name in STATE)
    save_file(STATE, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert writer.bytes_written == sum(spec.size for spec in SPECS.values())


def test_files_are_split_where_the_next_tensor_would_not_fit(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    save_file(STATE, source / "model.safetensors")
    target = tmp_path / "target"
    target.mkdir()
    writer, weights = WeightWriter(target, SPECS, shard_size=60, check=False), open_weights(source)
    for name in STATE:
        writer.copy(name, weights.places[name])
    writer.finish()
    index = json.loads((target / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["weight_map"]["whole"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["half"] == index["weight_map"]["counts"] == "model-00002-of-00003.safetensors"
    assert index["metadata"]["total_size"] == writer.bytes_written
    again = open_weights(target)
    assert all(torch.equal(again.read(name), tensor) for name, tensor in STATE.items())


def test_tensors_are_compared_bit_by_bit(tmp_path):
    save_file(
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0]), "c": torch.tensor([-0.0])}, tmp_path / "model.safetensors"
    )
    weights = open_weights(tmp_path)
    assert weights.same("a", "b") and not weights.same("a", "c")


@pytest.mark.parametrize("how", ["empty", "short", "index", "pickle", "nothing"])
def test_broken_folders_are_refused(tmp_path, how):
    file = tmp_path / "model.safetensors"
    save_file(STATE, file)
    if how == "empty":
        file.write_bytes(b"")
    elif how == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif how == "index":
        text = json.dumps({"weight_map": {"whole": "../../elsewhere.safetensors"}})
        (tmp_path / "model.safetensors.index.json").write_text(text)
    else:
        file.unlink()
        if how == "pickle":
            torch.save(STATE, tmp_path / "pytorch_model.bin")
    with pytest.raises((SafetensorError, ValueError, FileNotFoundError)) as error:
        open_weights(tmp_path)
    expected = {
        "index": "elsewhere.safetensors, which does not exist",
        "pickle": "set allow_pickle",
        "nothing": "it has no",
    }
    assert expected.get(how, "") in str(error.value)


def test_pickled_weights_are_read_if_allowed(tmp_path):
    torch.save(STATE, tmp_path / "pytorch_model.bin")
    weights = open_weights(tmp_path, allow_pickle=True)
    assert weights.specs == SPECS and not weights.places
    assert all(torch.equal(weights.read(name), tensor) for name, tensor in STATE.items())


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        WeightWriter(tmp_path, SPECS, 10**9, check=False)


def test_an_error_while_writing_is_raised(tmp_path):
    writer = WeightWriter(tmp_path, SPECS, 10**9, check=False)
    with Path("/dev/full").open("wb", buffering=0) as full:
        writer._places = {name: (full, offset, spec) for name, (_, offset, spec) in writer._places.items()}
        writer.write("whole", STATE["whole"])
        with pytest.raises(OSError, match="No space left"):
            writer.write("half", STATE["half"])
        writer.close()


def test_large_tensors_are_copied_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "COPY_BLOCK_SIZE", 7)
    save_file(STATE, tmp_path / "model.safetensors")
    target = tmp_path / "target"
    target.mkdir()
    writer, weights = WeightWriter(target, SPECS, 10**9, check=True), open_weights(tmp_path)
    for name in STATE:
        writer.copy(name, weights.places[name])
    writer.finish()
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in load_file(target / "model.safetensors").items())
    assert weights.same("whole", "whole")
