"""The short forward of LoRA layers against PEFT's own and against float64."""

import copy
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import nn as bnb_nn
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from peft.tuners.lora.layer import Linear
from support import materialize, relative_distance, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.initial import OffsetFactor
from accel_llm.adapters.lora_forward import AdaptedProduct, shorten_lora_forward
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, to_device
from accel_llm.model.loading import load_model
from accel_llm.model.loss import next_token_loss
from accel_llm.model.quantization import keep_gradients

WIDTH, OUT, RANK = 64, 96, 8
KINDS = ["linear", "bias", "conv1d", "4bit", "8bit"]
# Operators that only look at memory in another way, or reserve it: a device computes nothing for them.
NO_LAUNCH = {
    "view", "_unsafe_view", "_reshape_alias", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "as_strided",
    "select", "slice", "split", "split_with_sizes", "detach", "alias", "new_empty", "new_empty_strided", "empty",
    "empty_like", "empty_strided",
}  # fmt: skip


def lora_layer(kind: str, base_dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Any:
    """Return a layer of PEFT on a frozen base, with a float32 LoRA whose B is not zero."""
    torch.manual_seed(0)
    settings = {"r": RANK, "lora_alpha": 12, "fan_in_fan_out": kind == "conv1d"} | options
    config = LoraConfig(**settings)
    arguments: dict[str, Any] = {"config": config, "r": config.r, "lora_alpha": config.lora_alpha}
    if kind == "4bit":
        base: Any = bnb_nn.Linear4bit(WIDTH, OUT, bias=False, compute_dtype=base_dtype, quant_type="nf4")
        base.weight.data = base.weight.data.to(base_dtype)
    elif kind == "8bit":
        base = bnb_nn.Linear8bitLt(WIDTH, OUT, bias=False, has_fp16_weights=False)
    else:
        base = Conv1D(OUT, WIDTH) if kind == "conv1d" else nn.Linear(WIDTH, OUT, bias=kind == "bias")
        base = base.to(base_dtype)
    base.requires_grad_(False).to(device)
    keep_gradients(base)
    layer = {"4bit": Linear4bit, "8bit": Linear8bitLt}.get(kind, Linear)(base, "default", **arguments)
    for factors in (layer.lora_A, layer.lora_B):
        factors.float().to(device)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return layer.train()


def computed(
    layer: Any, ours: bool, dtype: torch.dtype = torch.float32, autocast: bool = False, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return the output of a layer for a fixed input, and the gradients of a fixed function of it."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, WIDTH, generator=generator).to(device, dtype).requires_grad_()
    upstream = torch.randn(2, 24, OUT, generator=generator).to(device, dtype)
    layer.__dict__.pop("forward", None)
    if ours:
        shorten_lora_forward(layer)
    layer.zero_grad()
    torch.manual_seed(2)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        output = layer(x)
    output.backward(upstream)
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


def exact(layer: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return what `computed` should return, in float64."""
    double = copy.deepcopy(layer)
    base = layer.base_layer
    if isinstance(base, bnb_nn.Linear4bit):
        double.base_layer = nn.Linear(WIDTH, OUT, bias=False).requires_grad_(False)
        double.base_layer.weight.data = dequantize_4bit(base.weight.data, base.weight.quant_state)
        double.__class__ = Linear
        double.is_target_conv_1d_layer = False
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, WIDTH, generator=generator).to(dtype).double().requires_grad_()
    upstream = torch.randn(2, 24, OUT, generator=generator).to(dtype).double()
    double.double().zero_grad()
    output = type(double).forward(double, x)
    output.backward(upstream)
    gradients = {name: p.grad for name, p in double.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **gradients}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and actual[name].shape == tensor.shape, name
        assert relative_distance(actual[name], tensor) <= bound, name


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_it_is_what_peft_computes(kind, options):
    layer = lora_layer(kind, **options)
    assert_close(computed(layer, ours=True), computed(layer, ours=False), 1e-6)


def test_a_wrong_scaling_would_be_seen():
    layer = lora_layer("linear")
    expected = computed(layer, ours=False)
    layer.scaling["default"] *= 1.001
    with pytest.raises(AssertionError):
        assert_close(computed(layer, ours=True), expected, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d", "4bit"])
def test_in_bfloat16_it_is_as_close_to_float64_as_peft(kind):
    layer = lora_layer(kind, torch.bfloat16)
    expected = exact(layer, torch.bfloat16)
    ours, peft = (computed(layer, mine, torch.bfloat16, autocast=True) for mine in (True, False))
    assert {name: tensor.dtype for name, tensor in ours.items()} == {name: t.dtype for name, t in peft.items()}
    for name, tensor in expected.items():
        assert relative_distance(ours[name], tensor) <= 1.02 * relative_distance(peft[name], tensor), name


@pytest.mark.parametrize("kind", ["linear", "conv1d", "4bit", "8bit"])
def test_dropout_under_autocast_keeps_its_mean(kind):
    """PEFT drops in float32. torch's own dropout would round 1 / (1 - p) to bfloat16 on a CPU."""
    layer = lora_layer(kind, torch.bfloat16, lora_dropout=0.3)
    ours, peft = (computed(layer, mine, torch.bfloat16, autocast=True) for mine in (True, False))
    assert_close(ours, peft, 8e-3)
    scale = ours["lora_A.default.weight"].double().flatten() @ peft["lora_A.default.weight"].double().flatten()
    assert abs(float(scale / peft["lora_A.default.weight"].double().square().sum()) - 1) < 1e-3


def test_offsets_of_pissa_are_added_in():
    for autocast, dtype, bound in ((False, torch.float32, 1e-6), (True, torch.bfloat16, 8e-3)):
        layer = lora_layer("linear", dtype)
        a, b = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
        layer.lora_A["default"] = OffsetFactor(a + 0.1 * torch.randn_like(a), a.to(dtype), 0)
        layer.lora_B["default"] = OffsetFactor(b + 0.1 * torch.randn_like(b), -b.to(dtype), 1)
        ours, peft = (computed(layer, mine, dtype, autocast) for mine in (True, False))
        assert_close(ours, peft, bound)


def test_a_trained_bias_of_the_base_has_its_gradient():
    layer = lora_layer("bias")
    layer.base_layer.bias.requires_grad_()
    ours, peft = (computed(layer, mine) for mine in (True, False))
    assert "base_layer.bias" in ours
    assert_close(ours, peft, 1e-6)


def second_adapter(layer: Any) -> None:
    layer.update_layer("second", RANK, lora_alpha=4, config=LoraConfig(r=RANK, init_lora_weights=False))
    layer.set_adapter(["default", "second"])


NOT_PLAIN = {
    "disabled": (lambda layer: layer.enable_adapters(False), {}),
    "merged": (lambda layer: layer.merge(), {}),
    "two adapters": (second_adapter, {}),
    "dora": (lambda layer: None, {"use_dora": True}),
    "bias in B": (lambda layer: layer.lora_B["default"].bias.data.normal_(), {"lora_bias": True}),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_what_is_not_plain_is_left_to_peft(case, monkeypatch):
    change, options = NOT_PLAIN[case]
    layer = lora_layer("bias", **options)
    plain = computed(layer, ours=True)["output"]
    change(layer)
    monkeypatch.setattr(AdaptedProduct, "apply", None)
    ours, peft = (computed(layer, mine) for mine in (True, False))
    assert ours.keys() == peft.keys() and all(torch.equal(ours[name], peft[name]) for name in peft)
    assert case in ("merged", "dora", "bias in B") or not torch.equal(plain, ours["output"])


def test_a_merge_is_undone_and_training_goes_on():
    layer = lora_layer("linear")
    before = computed(layer, ours=True)
    layer.merge()
    layer.unmerge()
    assert_close(computed(layer, ours=True), before, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_it_is_the_same_to_the_last_bit(kind):
    """Otherwise a policy would differ from itself as its reference: PEFT's own forward rounds once more in 16 bits."""
    layer = lora_layer(kind, torch.bfloat16).eval()
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            peft = layer(x)
        shorten_lora_forward(layer)
        trained = layer(x.clone().requires_grad_()).detach()
        with torch.no_grad():
            assert torch.equal(layer(x), trained)
    assert relative_distance(trained, peft) < 8e-3
    if kind in ("linear", "bias", "4bit"):
        assert not torch.equal(trained, peft)


def test_a_float32_lora_on_a_16_bit_base_computes_in_float32_without_autocast():
    layer = lora_layer("linear", torch.bfloat16)
    ours, peft = (computed(layer, mine, torch.bfloat16) for mine in (True, False))
    assert all(torch.equal(ours[name], peft[name]) for name in peft)


def test_a_float32_input_is_cast_once_under_autocast():
    layer = lora_layer("linear", torch.bfloat16)
    ours, peft = (computed(layer, mine, torch.float32, autocast=True) for mine in (True, False))
    assert_close(ours, peft, 8e-3)


@pytest.mark.parametrize("kind", ["linear", "bias", "4bit"])
def test_a_recomputed_layer_has_the_same_gradient(kind):
    layer = lora_layer(kind, torch.bfloat16)
    direct = computed(layer, True, torch.bfloat16, autocast=True)
    layer.__dict__.pop("forward")
    shorten_lora_forward(layer)
    layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 24, WIDTH, generator=generator).bfloat16().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    output.backward(torch.randn(2, 24, OUT, generator=generator).bfloat16())
    assert torch.equal(output, direct["output"]) and torch.equal(x.grad, direct["x"])
    assert torch.equal(layer.lora_A["default"].weight.grad, direct["lora_A.default.weight"])


@pytest.mark.parametrize("kind", ["linear", "bias", "4bit"])
def test_the_result_may_be_changed_in_place(kind):
    layer = lora_layer(kind)
    shorten_lora_forward(layer)
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    layer(x).mul_(2).sum().backward()
    doubled = x.grad
    x.grad = None
    layer(x).sum().backward()
    assert relative_distance(doubled, 2 * x.grad) < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_a_compiled_layer_computes_the_same(kind):
    layer = lora_layer(kind)
    expected = computed(layer, ours=True)
    layer.forward = torch.compile(layer.forward, backend="eager")
    x = torch.randn(2, 24, WIDTH, generator=torch.Generator().manual_seed(1))
    assert relative_distance(layer(x).detach(), expected["output"]) < 1e-6


class Launches(TorchDispatchMode):
    """Counts the operators for which a device computes something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in NO_LAUNCH:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def launches(layer: Any, ours: bool) -> tuple[int, int]:
    """Return how many operators a layer's forward and its backward launch under autocast."""
    layer.__dict__.pop("forward", None)
    if ours:
        shorten_lora_forward(layer)
    layer.zero_grad()
    x = torch.randn(1, 24, WIDTH).bfloat16().requires_grad_()
    upstream = torch.ones(1, 24, OUT).bfloat16()
    with Launches() as forward, torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    with Launches() as backward:
        output.backward(upstream)
    return forward.names.total(), backward.names.total()


# Forward: the base, the casts of A and B, two products. Backward: the base's product, four of A and B, two casts of
# their gradients; in 4 bits also what unpacks the weight.
OPERATORS = {"linear": ((5, 7), (9, 11)), "4bit": ((5, 10), (10, 14))}


@pytest.mark.parametrize("kind", OPERATORS)
def test_few_operators_are_launched(kind):
    ours, peft = OPERATORS[kind]
    layer = lora_layer(kind, torch.bfloat16)
    assert launches(layer, ours=True) == ours
    assert launches(layer, ours=False) == peft


def decoder_launches(folder: Path, layers: int, method: str, recomputed: bool) -> int:
    """Return how many operators a forward and a backward of a Llama launch in bf16, for one packed document."""
    tiny_model("llama", num_hidden_layers=layers).bfloat16().save_pretrained(folder)
    options = TrainOptions(
        model_name_or_path=str(folder), method=method, precision="bf16", gradient_checkpointing=recomputed
    )
    model = materialize(attach_adapter(load_model(options), options), options).train()
    ids = np.arange(5, 37)
    batch = to_device(collate_packed([(ids, ids)]), torch.device("cpu"))
    with Launches() as counted:
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(model, batch)
        loss.backward()
    return counted.names.total()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
@pytest.mark.parametrize(
    ("method", "recomputed", "most"), [("lora", False, 174), ("lora", True, 241), ("qlora", True, 262)]
)
def test_a_decoder_layer_launches_no_more_than_the_readme_says(method, recomputed, most, tmp_path):
    two, three = (decoder_launches(tmp_path / str(n), n, method, recomputed) for n in (2, 3))
    assert three - two <= most


@pytest.mark.parametrize("kind", ["linear", "4bit"])
def test_the_input_is_kept_once_for_all_layers_that_share_it(kind):
    layers = [lora_layer(kind, torch.bfloat16) for _ in range(3)]
    x = torch.randn(1, 24, WIDTH).bfloat16().requires_grad_()

    def kept(ours: bool) -> int:
        memory: dict[int, torch.Tensor] = {}
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: (memory.setdefault(tensor.untyped_storage().data_ptr(), tensor), tensor)[1], lambda t: t
            ),
            torch.autocast("cpu", torch.bfloat16),
        ):
            outputs = []
            for layer in layers:
                layer.__dict__.pop("forward", None)
                if ours:
                    shorten_lora_forward(layer)
                outputs.append(layer(x))
        ids = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
        return sum(t.untyped_storage().nbytes() for pointer, t in memory.items() if pointer not in ids)

    factors = 3 * 2 * (24 * RANK + RANK * WIDTH + OUT * RANK)  # x A', A and B of each layer, 2 bytes a number
    assert kept(ours=True) == factors + x.nbytes
    assert kept(ours=False) >= factors + 3 * x.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu_it_is_what_peft_computes(kind):
    layer = lora_layer(kind, torch.bfloat16, "cuda")
    ours, peft = (computed(layer, mine, torch.bfloat16, True, "cuda") for mine in (True, False))
    assert_close(ours, peft, 1e-2)
