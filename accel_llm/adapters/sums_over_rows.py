"""CorDA and LoRA-GA: first values from a matrix for each layer that is summed over rows.

CorDA sums the covariance of a layer's inputs, LoRA-GA the gradient of its weight. In float32 these matrices take 28 GB
for a 7B model. So the model runs through the rows several times, each time for so many layers that their matrices fit
into SUMS_AT_ONCE; the numbers are the same. Layers with the same input share its covariance.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import accel_llm.system.chatter

import torch
from peft import LoraGAConfig
from peft.tuners.lora.config import CordaConfig
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from accel_llm.adapters.initial import first_factors, linear_lora_layers
from accel_llm.data.batches import Batch
from accel_llm.errors import ConfigError
from accel_llm.system.launcher import process_rank

SUMS_AT_ONCE = 2 * 2**30  # bytes of the matrices that are there at the same time
MATRICES_AT_WORK = 5  # of the size of a layer's sum, that are needed besides to compute its first values from it
FirstFactors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # A0 and B0 of each layer, by its name
Loss = Callable[[Any, Batch], torch.Tensor]  # the summed loss of a model on a batch


def corda_factors(model: Any, batches: list[Batch], loss: Loss) -> FirstFactors:
    """Return A0 and B0 of each layer, from the singular values of its weight times the covariance of its inputs."""
    config = model.peft_config["default"].corda_config or CordaConfig()
    layers = linear_lora_layers(model)

    def start(layer: Any, damped: torch.Tensor, inverse: torch.Tensor, adapter: str) -> None:
        copy, rank = layer.get_base_layer(), layer.r[adapter]
        u, s, vh = torch.linalg.svd(copy.weight @ damped, full_matrices=False)
        kept = slice(rank) if config.corda_method == "ipm" else slice(-rank, None)
        # W = U S V' (CorDA, equations 2 to 4).
        copy.eigens = SimpleNamespace(S_WC=s[kept].clone(), U_WC=u[:, kept], V_WC=(vh @ inverse).T[:, kept])
        layer.corda_init(adapter, "corda")

    @torch.no_grad()
    def run(batches: list[Batch]) -> None:
        for batch in batches:
            loss(model, batch)

    factors = {}
    alike = _layers_by_input(layers, lambda: run(batches[:1]))
    sizes = {name: 4 * layers[name].in_features ** 2 for name in alike}
    for names in _passes("corda", len(batches), sizes):
        in_half = config.use_float16_for_covariance
        covariances = _covariances({name: layers[name] for name in names}, in_half, lambda: run(batches))
        # An expert to which no token went has no covariance: it keeps its usual first values.
        for first in list(covariances):
            damped, inverse = _invertible(covariances.pop(first).float())
            for name in alike[first]:
                begin = partial(start, layers[name], damped, inverse)
                factors[name] = _on_cpu(first_factors(layers[name], begin, layers[name].r["default"]))
    return factors


def _layers_by_input(layers: dict[str, Any], run: Callable[[], None]) -> dict[str, list[str]]:
    """Return the layers that get the same tensor, such as q, k and v, by the first of them; `run` runs the model."""
    alike: dict[str, list[str]] = {}
    last: list[Any] = [None, ""]  # the input of the last layer, and the first layer that got it

    def note(name: str, inputs: torch.Tensor) -> None:
        if inputs is not last[0]:
            last[:] = inputs, name
        alike.setdefault(last[1], []).append(name)

    with _watching_inputs(layers, note):
        run()
    named = {name for names in alike.values() for name in names}
    return alike | {name: [name] for name in layers if name not in named}


@contextmanager
def _watching_inputs(layers: dict[str, Any], watch: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Any:
        return lambda module, args: watch(name, args[0])

    handles = [layer.get_base_layer().register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    yield
    for handle in handles:
        handle.remove()


def _covariances(layers: dict[str, Any], in_half: bool, run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the mean of X'X of the inputs X of each layer. As in PEFT, X is divided by its largest value before."""
    sums: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()

    def add(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2)
        rows = rows if in_half else rows.float()
        rows = rows / rows.max().abs()
        with torch.autocast(rows.device.type, enabled=False):  # it would round the products to 16 bits
            product = rows.T @ rows
        sums[name] = sums[name].add_(product) if name in sums else product
        counts[name] += 1

    with _watching_inputs(layers, add):
        run()
    return {name: total.div_(counts[name]) for name, total in sums.items()}


def _invertible(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix with a larger and larger diagonal, until its inverse is exact enough, and this inverse.

    PEFT 0.21 has the same in a module that needs the package attrs, which it does not install.

    Raises:
        ConfigError: the matrix is not finite.
    """
    if not covariance.isfinite().all():
        raise ConfigError("init_lora_weights: for corda the inputs of all layers must be finite, but some are not.")
    identity, share = torch.eye(len(covariance), device=covariance.device), 0.01
    while True:
        damped = covariance.clone()
        damped.diagonal().add_(covariance.diagonal().mean() * share)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
        share *= 2


def lora_ga_factors(model: Any, batches: list[Batch], loss: Loss) -> FirstFactors:
    """Return A0 and B0 of each layer, from the gradient of its weight: that of the mean loss over all labels."""
    config = model.peft_config["default"].lora_ga_config or LoraGAConfig()
    layers = linear_lora_layers(model)
    labels = sum(batch["total_weight"] for batch in batches)

    def start(layer: Any, gradient: torch.Tensor, adapter: str) -> None:
        layer.get_base_layer()._peft_loraga_grad = gradient
        layer.lora_ga_init(adapter, config)

    def run() -> None:
        for batch in batches:
            (loss(model, batch) / labels).backward()

    factors = {}
    sizes = {name: 4 * layer.in_features * layer.out_features for name, layer in layers.items()}
    for names in _passes("lora_ga", len(batches), sizes):
        with _recomputing(model):
            gradients = _gradients({name: layers[name].get_base_layer().weight for name in names}, run)
        model.zero_grad()
        for name in names:
            if name not in gradients:
                continue  # no token went to this expert
            layer, gradient = layers[name], gradients.pop(name)
            gradient = gradient.T if layer.fan_in_fan_out else gradient
            # The method takes twice as many directions of the gradient as the rank is.
            rank = max(1, min(layer.r["default"], min(gradient.shape) // 2))
            factors[name] = _on_cpu(first_factors(layer, partial(start, layer, gradient), rank))
    return factors


def _gradients(weights: dict[str, nn.Parameter], run: Callable[[], None]) -> dict[str, torch.Tensor]:
    """Return the float32 sums of the gradients that `run` computes, by the names of the weights that get one."""
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, weight: Any) -> None:
        sums[name] = sums[name].add_(weight.grad) if name in sums else weight.grad.float()
        weight.grad = None

    handles = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        handles.append(weight.register_post_accumulate_grad_hook(partial(add, name)))
    run()
    for weight, handle in zip(weights.values(), handles, strict=True):
        weight.requires_grad_(False)
        handle.remove()
    return sums


@contextmanager
def _recomputing(model: Any) -> Iterator[None]:
    """With `gradient_checkpointing` recompute activations in eval mode too, in which transformers would keep them."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    layers = [layer for layer in layers if layer.gradient_checkpointing]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    yield
    for layer in layers:
        del layer.forward


def _on_cpu(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors
    return a.cpu(), b.cpu()


def _passes(init: str, rows: int, sizes: dict[str, int]) -> list[list[str]]:
    """Split layers, by name with the bytes of their matrix, by the pass through the rows in which these are summed."""
    passes, left = [], 0
    for name, size in sizes.items():
        if size > left:
            passes.append([])
            left = SUMS_AT_ONCE
        passes[-1].append(name)
        left -= size
    if len(passes) > 1 and process_rank() == 0:
        print(
            f"init_lora_weights: {init} runs the base {len(passes)} times through {rows} rows, each time for some of its "
            "layers",
            flush=True,
        )
    return passes
