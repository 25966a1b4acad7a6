"""Verification finds damage: a badly merged module, a damaged file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from accel_llm.errors import ConfigError
from accel_llm.merge import verify
from accel_llm.merge.verify import (
    MODULE_BOUNDS,
    merge_module_checked,
    merged_output,
    module_output,
    read_back,
    relative_difference,
)
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightWriter


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 48)
        self.embedding = nn.Embedding(100, 16)
        self.conv = nn.Conv2d(3, 8, 3)
        self.line = nn.Conv1d(4, 6, 5, stride=2, padding=1)

    def forward(self, x: Any) -> Any:
        return x


def adapted_layer(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=[name], init_lora_weights=False, **settings)
    return getattr(get_peft_model(Tiny().to(dtype), config).eval().base_model.model, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", "embedding", "conv", "line"])
def test_a_merged_module_computes_the_same_within_the_bound(name, dtype):
    module = adapted_layer(name, dtype)
    plain, error = merge_module_checked(module, name, unmerge=False)
    assert plain is module.get_base_layer() and error is not None and 0 <= error < MODULE_BOUNDS[dtype] / 3
    assert error > 0 or name == "embedding"


@pytest.mark.parametrize("damage", [1.001, 0.0, float("nan")])
def test_a_badly_merged_module_is_refused(damage, monkeypatch):
    module = adapted_layer("linear")

    def fold(layer: Any, unmerge: bool) -> nn.Module:
        if damage:
            layer.merge()
        base = layer.get_base_layer()
        base.weight.data *= damage or 1.0
        return base

    monkeypatch.setattr(verify, "merge_module", fold)
    with pytest.raises(ConfigError, match=r"^verify: linear merged computes something else than with its adapter, by "):
        merge_module_checked(module, "linear", unmerge=False)


def test_experts_are_compared_by_products_with_random_vectors():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 48, 32))
            self.down = nn.Parameter(torch.randn(4, 32, 48))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

    torch.manual_seed(0)
    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.up", "experts.down"], init_lora_weights=False
    )
    model: Any = get_peft_model(Model(), config)
    module = model.base_model.model.experts
    assert module_output(module, None).keys() == {"up", "down"}
    plain, error = merge_module_checked(module, "experts", unmerge=False)
    assert isinstance(plain, Experts) and error is not None and 0 < error < 1e-6
    again: Any = get_peft_model(Model(), config)
    module = again.base_model.model.experts
    before = module_output(module, None)
    plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    plain.down.data[2] += 0.01
    assert relative_difference(merged_output(plain, module, None), before) > 1e-4


@pytest.fixture
def write_files(tmp_path) -> Callable[[], tuple[Path, dict[str, int]]]:
    def write() -> tuple[Path, dict[str, int]]:
        state = {name: torch.randn(20, 10) for name in "abc"}
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}
        writer = WeightWriter(tmp_path, specs, shard_size=1000, check=True)
        for name, tensor in state.items():
            writer.write(name, tensor)
        writer.finish()
        return tmp_path, writer.checksums

    return write


def test_files_are_read_again_and_hashed(write_files):
    folder, sums = write_files()
    hashes = read_back(folder, sums)
    assert list(hashes) == [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    assert all(len(digest) == 64 for digest in hashes.values())


@pytest.mark.parametrize("how", ["bit", "lost", "other"])
def test_a_damaged_file_is_refused(write_files, how):
    folder, sums = write_files()
    file = folder / "model-00002-of-00003.safetensors"
    if how == "bit":
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        expected = "verify: b in model-00002-of-00003.safetensors is not what was written; nothing was kept."
    elif how == "lost":
        file.unlink()
        expected = "verify: 1 weights are in no file, such as b; nothing was kept."
    else:
        save_file({"z": load_file(file)["b"]}, file)
        expected = "verify: z in model-00002-of-00003.safetensors is not what was written; nothing was kept."
    with pytest.raises(ConfigError) as error:
        read_back(folder, sums)
    assert str(error.value) == expected


def test_a_nan_on_either_side_is_a_difference():
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.full((2,), float("nan"))
    assert relative_difference({"a": one, "b": one}, {"a": one, "b": one}) == 0
    assert relative_difference({"a": one}, {"a": zero}) == pytest.approx(2**0.5)
    for actual in ({"a": nan, "b": one}, {"a": one, "b": nan}):
        assert not relative_difference(actual, {"a": one, "b": one}) <= 1
