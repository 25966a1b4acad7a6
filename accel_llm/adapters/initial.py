"""First values of a LoRA that are a part of the base's weights (PiSSA, OLoRA, CorDA, ...), without a change of the base.

PEFT takes s B0 A0, with which such a LoRA begins, out of each weight W of the base and trains s B A on what is left.
Then nothing but that changed base goes with the adapter. Here the base stays as it is, and the layer adds
s (B A - B0 A0), with A0 and B0 kept beside A and B. This is the same function of A and B: so the training is the same,
nothing is rounded away from W, and a plain LoRA of twice the rank, [B, -B0] [A; A0], is the exact export. (With
`lora_dropout` both parts see the same input, so a fresh adapter adds nothing then either; PEFT's begins with noise.)
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import accel_llm.system.chatter

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.pytorch_utils import Conv1D

from accel_llm.adapters.lora_options import DATA_INITS, pattern_name
from accel_llm.backend.strategy import training_device
from accel_llm.errors import ConfigError
from accel_llm.model.quantization import round_to_4_bits
from accel_llm.system.memory import release_pages

# Values of init_lora_weights that are computed from the base's weights alone, so that they can be computed again.
REPEATABLE_INITS = ("pissa", "olora")
LEAST_COSINE = 0.1  # between an adapter and its first values
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]  # A, B and their first values A0, B0


class OffsetFactor(nn.Linear):
    """A factor of a LoRA, A or B, together with the first value of it that is subtracted.

    `weight` is trained: A [r, in] or B [out, r]. `offset`, of the same shape, never changes: A0 or -B0. In its product
    A becomes [A; A0] (`dim` 0) and B becomes [B, -B0] (`dim` 1).
    """

    offset: torch.Tensor

    def __init__(self, weight: torch.Tensor, offset: torch.Tensor, dim: Literal[0, 1]):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight, self.dim = nn.Parameter(weight), dim
        # A buffer, because no backend shards or steps one. It is in no state_dict: the checkpoints ask for it.
        self.register_buffer("offset", offset, persistent=False)

    def joined(self, weight: torch.Tensor) -> torch.Tensor:
        """Return `weight` and the offset as one matrix: [2r, in] for A, [out, 2r] for B."""
        return torch.cat([weight, self.offset.to(weight)], self.dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.joined(self.weight))


def subtracted_init(init: Any) -> str:
    """Return the method if `init`, a value of init_lora_weights, takes first values out of the base; else ""."""
    return init.lower() if str(init).lower() in REPEATABLE_INITS else ""


def init_by_peft(init: bool | str) -> bool | str:
    """Return the first values for PEFT to give, if `init`, a value of init_lora_weights, is asked for.

    It is `init` itself if they are not chosen here, by `give_first_values` or `start_from_rows`.
    """
    own = str(init).lower().startswith(("pissa", "olora", "orthogonal")) or init in DATA_INITS
    return True if own else init


def give_first_values(model: PeftModel, init: bool | str, compute: torch.dtype) -> None:
    """Give the LoRA layers of `model` those first values that PEFT's own code cannot give without harm."""
    if str(init).lower().startswith(("pissa", "olora")):
        start_from_base(model, str(init).lower(), compute)
    elif init == "orthogonal":
        draw_orthogonal(model)


def start_from_base(model: PeftModel, init: str, compute: torch.dtype) -> None:
    """Give the LoRA layers of `model` the first values `init`, "pissa" or "olora"; the base's weights do not change.

    "pissa_niter_4" is PiSSA by a random decomposition in 4 rounds. `compute` is the dtype of the base in training. The
    first values are rounded to it, because the offset is kept in it. Layers for which PEFT has no such values, such as
    embeddings, keep the values that they have.
    """
    for layer in linear_lora_layers(model).values():
        start = partial(layer.pissa_init, init_lora_weights=init) if init.startswith("pissa") else layer.olora_init
        subtract_first_factors(layer, *first_factors(layer, start, layer.r["default"]), compute)


def subtract_first_factors(layer: Any, a: torch.Tensor, b: torch.Tensor, compute: torch.dtype) -> None:
    """Let a LoRA layer begin with A0 [k, in] and B0 [out, k] and subtract them; k is at most its rank.

    A matrix whose shorter side is less than the rank has fewer directions; the others stay zero.
    """
    missing = layer.r["default"] - len(a)
    first_a, first_b = F.pad(a, (0, 0, 0, missing)).to(compute), F.pad(b, (0, missing)).to(compute)
    for factors, weight, offset in ((layer.lora_A, first_a, first_a.clone()), (layer.lora_B, first_b, -first_b)):
        dtype, dim = factors["default"].weight.dtype, 0 if factors is layer.lora_A else 1
        factors["default"] = OffsetFactor(weight.to(dtype), offset, dim)


def start_from_rounding(model: PeftModel, compute: torch.dtype) -> None:
    """Let the LoRA layers of `model` begin with the best approximation of what 4 bits lose of the base (LoftQ).

    s B A is the part of rank r of W - NF4(W) (Li et al. 2023, "LoftQ", with one iteration, so that the base is still
    NF4(W), as everybody can load it). PEFT 0.21 leaves out the factor s. Call it before the weights are quantized.
    """
    for layer in linear_lora_layers(model).values():
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        if getattr(weight, "bnb_quantized", None) is not False:
            continue  # a layer that is not held in 4 bits loses nothing
        plain = weight.data.to(training_device(), compute)
        left, values, right = torch.linalg.svd((plain.float() - round_to_4_bits(plain, False).float()), False)
        rank, roots = layer.r["default"], (values / layer.scaling["default"]).sqrt()
        a, b = (roots[:, None] * right)[:rank], (left * roots)[:, :rank]
        missing = rank - len(a)
        for factor, first in ((layer.lora_A, F.pad(a, (0, 0, 0, missing))), (layer.lora_B, F.pad(b, (0, missing)))):
            factor["default"].weight.data = first.contiguous().to(factor["default"].weight)
        release_pages(weight.data)


def draw_orthogonal(model: PeftModel) -> None:
    """Draw first values of A and B whose product is 0, although neither of them is 0 (PEFT's `orthogonal_init`).

    PEFT 0.21 rounds them to the dtype of the base's weights: in 16 bits the product is not 0 any more, and quantized
    weights have no such dtype. Layers for which PEFT has no such values keep the values that they have.
    """
    for layer in linear_lora_layers(model).values():
        base = layer.get_base_layer()
        weight, base.weight = base.weight, nn.Parameter(torch.empty(0), requires_grad=False)
        layer.orthogonal_init("default")
        base.weight = weight


def linear_lora_layers(model: PeftModel) -> dict[str, Any]:
    """Return PEFT's LoRA layers of linear layers, of any number of bits, by their names in the base model."""
    return {
        name: layer
        for name, layer in lora_layers(model).items()
        if not isinstance(layer, ParamWrapper) and isinstance(layer.get_base_layer(), nn.Linear | Conv1D)
    }


def lora_layers(model: Any) -> dict[str, Any]:
    """Return PEFT's LoRA layers of an adapted model, by their names in the base model."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if isinstance(module, LoraLayer)}


def first_factors(layer: Any, start: Callable[[str], Any], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A0 and B0 as `start("default")`, a function of PEFT's layer, computes them for rank `rank` at most.

    PEFT's functions change the weight that they find in the layer, so they get a copy in float32, on the device, in
    seconds. PEFT 0.21's OLoRA and LoRA-GA take the weight of GPT-2's Conv1D as it is stored, transposed, so that the
    shapes are wrong or, for a square matrix, another thing is computed; and quantized weights are refused. The copy is
    a plain linear layer.
    """
    base, full_rank, transposed = layer.base_layer, layer.r["default"], layer.fan_in_fan_out
    weight = base.weight
    # 4-bit weights that are not quantized yet hold the plain values.
    plain = weight.data if getattr(weight, "bnb_quantized", None) is False else dequantize_module_weight(base).data
    copy: Any = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    matrix = (plain.T if transposed else plain).to(training_device(), torch.float32, copy=True).contiguous()
    copy.weight = nn.Parameter(matrix, requires_grad=False)
    layer.base_layer, layer.fan_in_fan_out, layer.r["default"] = copy, False, min(rank, *matrix.shape)
    with torch.no_grad():
        start("default")
    layer.base_layer, layer.fan_in_fan_out, layer.r["default"] = base, transposed, full_rank
    release_pages(plain)
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data


def joined_factors(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the trained weights `state` by name with the offsets in them: the factors of a plain LoRA on the base."""
    joined = {
        f"{name}.weight": module.joined(state[f"{name}.weight"])
        for name, module in model.named_modules()
        if isinstance(module, OffsetFactor)
    }
    return state | joined


def plain_config(model: PeftModel) -> LoraConfig:
    """Return the config of the plain LoRA that `joined_factors` belong to: twice the rank, and the same scaling s."""
    config: Any = model.peft_config["default"]
    layers = lora_layers(model)
    doubled = {name for name, layer in layers.items() if _has_offset(layer)}
    if not doubled:
        return config
    # Layers without an offset keep rank and alpha. PEFT takes the first pattern that fits, so they come first.
    kept = {pattern_name(name, layer): layer for name, layer in layers.items() if name not in doubled}
    ranks, alphas = ({name: getattr(layer, k)["default"] for name, layer in kept.items()} for k in ("r", "lora_alpha"))
    growth = 2**0.5 if config.use_rslora else 2  # s is alpha / r, or alpha / sqrt(r) with rslora
    return replace(
        config,
        init_lora_weights=True,
        corda_config=None,
        lora_ga_config=None,
        r=2 * config.r,
        lora_alpha=config.lora_alpha * growth,
        rank_pattern=ranks | {name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern=alphas | {name: alpha * growth for name, alpha in config.alpha_pattern.items()},
    )


def _has_offset(layer: Any) -> bool:
    return "default" in layer.lora_A and isinstance(layer.lora_A["default"], OffsetFactor)


def check_own_start(factors: Iterable[Factors], name: str, field: str = "adapter") -> None:
    """Refuse an adapter whose first values, computed again from the base, are not those that it began with.

    The measure is the cosine between all B A and all B0 A0, seen as one vector each. Training moves such an adapter a
    part of the way; of another base, or of what PEFT had left of this one, the cosine is near 0.

    Raises:
        ConfigError: the cosine is below 0.1.
    """
    products, squares, first_squares = 0.0, 0.0, 0.0
    for layer in factors:
        a, b, first_a, first_b = (tensor.detach().double() for tensor in layer)
        # <B A, C D> is the sum of all elements of (B' C) * (A D'), without the large products.
        products += float(((b.T @ first_b) * (a @ first_a.T)).sum())
        squares += float(((b.T @ b) * (a @ a.T)).sum())
        first_squares += float(((first_b.T @ first_b) * (first_a @ first_a.T)).sum())
    if products < LEAST_COSINE * math.sqrt(squares * first_squares):
        raise ConfigError(
            f"{field}: {name} did not begin with a part of this base, as its init_lora_weights says: either its base is "
            "another model, or it is what PEFT had left of one; then set init_lora_weights to true in its "
            "adapter_config.json."
        )


def first_and_trained_factors(model: PeftModel) -> Iterator[Factors]:
    """Yield A, B, A0 and B0 of each layer that subtracts its first values."""
    for layer in lora_layers(model).values():
        if _has_offset(layer):
            a, b = layer.lora_A["default"], layer.lora_B["default"]
            yield a.weight, b.weight, a.offset, -b.offset


def offsets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the offsets of all factors by name: state of a run that is not trained."""
    return {
        f"{name}.offset": module.offset for name, module in model.named_modules() if isinstance(module, OffsetFactor)
    }
