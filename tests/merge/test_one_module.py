"""Merging a layer a few rows at a time gives the same bits as merging it at once, for any shape and rank."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Embedding, Linear
from torch import nn
from transformers.pytorch_utils import Conv1D

from accel_llm.merge import one_module
from accel_llm.merge.one_module import merge_module


def layer(kind: str, rows: int, columns: int, rank: int, dtype: torch.dtype, **settings):
    torch.manual_seed(rank)
    config = LoraConfig(r=rank, lora_alpha=3, init_lora_weights=False, fan_in_fan_out=kind == "conv1d", **settings)
    arguments = {"r": rank, "lora_alpha": 3, "config": config}
    if kind == "embedding":
        return Embedding(nn.Embedding(rows, columns, dtype=dtype), "default", **arguments)
    base = Conv1D(rows, columns).to(dtype) if kind == "conv1d" else nn.Linear(columns, rows, dtype=dtype)
    adapted = Linear(base, "default", is_target_conv_1d_layer=kind == "conv1d", **arguments)
    for parameter in (adapted.lora_A, adapted.lora_B):
        parameter.float()
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("rows, columns, rank", [(301, 64, 4), (1000, 768, 16), (96, 3000, 64), (50, 40, 1)])
def test_merging_by_rows_gives_the_same_bits(kind, dtype, rows, columns, rank, monkeypatch):
    monkeypatch.setattr(one_module, "ELEMENTS_PER_PART", 2**14)
    adapted = layer(kind, rows, columns, rank, dtype)
    base = adapted.get_base_layer().weight.data.clone()
    adapted.merge()
    expected = adapted.get_base_layer().weight.data.clone()
    adapted.get_base_layer().weight.data.copy_(base)
    adapted.merged_adapters.clear()
    assert one_module._rows_are_independent(adapted)
    plain = merge_module(adapted, unmerge=False)
    assert plain is adapted.get_base_layer() and torch.equal(plain.weight, expected)
    assert not torch.equal(expected, base)

    adapted.merged_adapters = ["default"]
    adapted.unmerge()
    unmerged = adapted.get_base_layer().weight.data.clone()
    adapted.get_base_layer().weight.data.copy_(expected)
    assert torch.equal(merge_module(adapted, unmerge=True).weight, unmerged)


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge_module(layer("linear", 64, 32, 4, torch.float32), unmerge=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_layers_whose_rows_depend_on_each_other_are_merged_at_once(settings):
    assert not one_module._rows_are_independent(layer("linear", 64, 32, 4, torch.float32, **settings))
