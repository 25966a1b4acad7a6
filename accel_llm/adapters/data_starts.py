"""First values of a LoRA that the first rows of the run decide: EVA, CorDA and LoRA-GA.

All three look at the base without the adapter, once its weights are in their final dtype and on their device. Each
process computes the same, from the rows at the start of the stream, whatever process or step will train on them, and
the result of rank 0 counts. So they are a function of seed and data alone.

EVA chooses A, and a rank for each layer; B is 0. CorDA and LoRA-GA take their first values out of the base, as PiSSA
does, and here also without a change of the base, see `adapters/initial.py`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import accel_llm.system.chatter

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import LoraGAConfig, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.eva import get_eva_state_dict, prepare_layer_inputs_fn_language_modeling
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from accel_llm.adapters.initial import first_factors, linear_lora_layers, lora_layers, subtract_first_factors
from accel_llm.adapters.lora_options import INIT_ROWS, looks_at_rows
from accel_llm.backend.strategy import compute_dtype
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch, collate, to_device
from accel_llm.data.stream import Stream
from accel_llm.errors import ConfigError
from accel_llm.model.loading import short_reason
from accel_llm.model.loss import next_token_loss

# Rows of the stream (packed ones, if rows are packed) to look at, if `init_rows` in method_options gives no number.
# CorDA: as many as Yang et al. 2024 ("CorDA") and PEFT's guide collect. The others need less: EVA (Paischer et al.
# 2024) ends when its directions keep still, and LoRA-GA (Wang et al. 2024) needs the gradient of one large batch.
DEFAULT_ROWS = {"eva": 64, "corda": 256, "lora_ga": 64}
MAX_PASSES = 20  # of EVA through these rows; PEFT 0.21 would go on for ever if its directions kept turning
FirstFactors = dict[str, tuple[torch.Tensor, torch.Tensor]]  # A0 and B0 of each layer, by its name


def start_from_rows(accelerator: Accelerator, model: Any, options: TrainOptions, stream: Stream) -> None:
    """Give the LoRA of `model` first values from the first rows, if `init_lora_weights` asks for it.

    Call it after `place_weights` and before the optimizer is built. A run that goes on from a checkpoint finds its
    factors there, but must know the ranks of EVA before, so the first values are computed again.

    Raises:
        ConfigError: the rows have too few labels, or the method does not fit a layer.
    """
    if not looks_at_rows(options):
        return
    init = str(options.init_lora_weights)
    rows = int(options.method_options.get(INIT_ROWS) or DEFAULT_ROWS[init])
    bins = [documents for k in range(min(rows, stream.plan.bins)) if (documents := stream.documents(k))]
    if init == "eva":
        bins = _groups_with_labels(stream, bins, bool(options.packing), model)
    batches = [collate(stream.rows, documents, bool(options.packing), stream.pad_token_id) for documents in bins]

    compute: Callable[..., Any] = {"eva": _eva_directions, "corda": _corda_factors, "lora_ga": _lora_ga_factors}[init]
    with _bare_base(accelerator, model, options.seed):
        result = compute(model, batches, accelerator)
    [result] = broadcast_object_list([result])
    if init == "eva":
        _set_directions(model, result)
        return
    for name, layer in lora_layers(model).items():
        if name in result:
            a, b = (factor.to(accelerator.device) for factor in result[name])
            subtract_first_factors(layer, a, b, compute_dtype(options))


@contextmanager
def _bare_base(accelerator: Accelerator, model: Any, seed: int) -> Iterator[None]:
    """Let `model` compute as the base without dropout; random numbers depend on `seed`, and none are used up."""
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    training = model.training
    with torch.random.fork_rng(devices), model.disable_adapter():
        torch.manual_seed(seed)
        model.eval()
        yield
    model.train(training)


def _loss(accelerator: Accelerator, model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed loss, in the precision of the run. Only the model is computed so, and no decomposition."""
    with accelerator.autocast():
        return next_token_loss(model, batch)


def _groups_with_labels(stream: Stream, bins: list[list[int]], packed: bool, model: Any) -> list[list[int]]:
    """Join neighbouring rows until each group has as many labels as EVA computes directions.

    Raises:
        ConfigError: all rows together have fewer.
    """
    config = model.peft_config["default"]
    least = max(round(layer.r["default"] * config.eva_config.rho) for layer in linear_lora_layers(model))
    groups: list[list[int]] = [[]]
    missing, total = least, 0
    for documents in bins:
        if missing <= 0:
            groups.append([])
            missing = least
        labels = collate(stream.rows, documents, packed, stream.pad_token_id)["num_targets"]
        groups[-1] += documents
        missing, total = missing - labels, total + labels
    if missing > 0 and len(groups) > 1:
        last = groups.pop()
        groups[-1] += last
    elif missing > 0:
        raise ConfigError(
            f"init_lora_weights: eva computes {least} directions (rank x rho), but the first {len(bins)} rows have "
            f"only {total} labels; raise {INIT_ROWS} in method_options, or lower lora_r."
        )
    return groups


class _Placed(dict):
    """A batch that is on its device already. PEFT 0.21 would try to move its numbers and warn that it cannot."""

    def to(self, device: Any) -> "_Placed":
        return self


def _eva_directions(model: Any, batches: list[Batch], accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """Return A of each layer by its name in `model`, computed by PEFT; its length is the rank of the layer."""
    passes = iter(range(MAX_PASSES * len(batches) + 2))

    def forward(model: Any, batch: Batch) -> None:
        if next(passes, None) is None:
            raise ConfigError(
                f"init_lora_weights: the directions of eva still turn after {MAX_PASSES} passes through the first "
                f"rows; raise {INIT_ROWS}, or lower tau in eva_config."
            )
        _loss(accelerator, model, batch)

    def layer_inputs(inputs: Any, positions: torch.Tensor, name: str) -> torch.Tensor:
        if inputs[0].ndim != 3:
            raise ConfigError(
                f"init_lora_weights: {name} is a part of an expert, which sees some tokens only, and eva needs all of "
                "them; name other lora_target_modules, or take other first values."
            )
        return prepare_layer_inputs_fn_language_modeling(inputs, positions, name)

    on_device = [_Placed(to_device(batch, accelerator.device)) for batch in batches]
    try:
        with _pca_without_autocast(accelerator.device.type):
            directions = get_eva_state_dict(
                model,
                on_device,
                forward_fn=forward,
                prepare_layer_inputs_fn=layer_inputs,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"init_lora_weights: eva does not fit the model ({short_reason(error)}).") from None
    return {name: direction.cpu() for name, direction in directions.items()}


@contextmanager
def _pca_without_autocast(device_type: str) -> Iterator[None]:
    """Let PEFT's EVA, which computes in hooks of the forward, use float32: CUDA decomposes no 16-bit matrices."""
    plain = IncrementalPCA.partial_fit
    IncrementalPCA.partial_fit = torch.autocast(device_type, enabled=False)(plain)  # type: ignore[method-assign]
    try:
        yield
    finally:
        IncrementalPCA.partial_fit = plain  # type: ignore[method-assign]


def _set_directions(model: Any, directions: dict[str, torch.Tensor]) -> None:
    """Put A into each layer, with its rank; PEFT takes the adapter from a layer of rank 0."""
    dtype = linear_lora_layers(model)[0].lora_A["default"].weight.dtype
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    for layer in linear_lora_layers(model):
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer"):
                parameter.data = parameter.data.to(dtype)  # PEFT makes new ones, in the dtype of the base


def _corda_factors(model: Any, batches: list[Batch], accelerator: Accelerator) -> FirstFactors:
    """Return A0 and B0 of each layer, from the singular values of its weight times the covariance of its inputs.

    As in PEFT, each batch is divided by its largest value before.
    """
    config = model.peft_config["default"].corda_config or CordaConfig()
    layers = {name: layer for name, layer in lora_layers(model).items() if layer in set(linear_lora_layers(model))}
    sums: dict[str, Any] = dict.fromkeys(layers, 0)
    counts = dict.fromkeys(layers, 0)

    def add_covariance(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.detach().flatten(0, -2)
        if not config.use_float16_for_covariance:
            rows = rows.float()
        rows = rows / rows.max().abs()
        with torch.autocast(rows.device.type, enabled=False):  # it would round the products to 16 bits
            sums[name], counts[name] = sums[name] + rows.T @ rows, counts[name] + 1

    def hook(name: str) -> Any:
        return lambda module, args: add_covariance(name, args[0])

    handles = [layer.get_base_layer().register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for batch in batches:
            _loss(accelerator, model, to_device(batch, accelerator.device))
    for handle in handles:
        handle.remove()

    def start(layer: Any, covariance: torch.Tensor, adapter: str) -> None:
        copy, rank = layer.get_base_layer(), layer.r[adapter]
        u, s, v = _decompose_with_inputs(copy.weight, covariance.float())
        kept = slice(rank) if config.corda_method == "ipm" else slice(-rank, None)
        copy.eigens = SimpleNamespace(S_WC=s[kept].clone(), U_WC=u[:, kept], V_WC=v[:, kept])
        layer.corda_init(adapter, "corda")

    # An expert to which no token went has no covariance: it keeps its usual first values.
    return {
        name: _on_cpu(first_factors(layer, partial(start, layer, sums[name] / counts[name]), layer.r["default"]))
        for name, layer in layers.items()
        if counts[name]
    }


def _decompose_with_inputs(weight: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return U, S and V [in, k] with W = U S V', from the singular values of W C (CorDA, equations 2 to 4).

    C gets a larger and larger diagonal until its inverse is exact enough. PEFT 0.21 has the same in a module that needs
    the package attrs, which it does not install.

    Raises:
        ConfigError: C is not finite.
    """
    if not covariance.isfinite().all():
        raise ConfigError("init_lora_weights: for corda the inputs of all layers must be finite, but some are not.")
    identity, share = torch.eye(len(covariance), device=covariance.device), 0.01
    while True:
        damped = covariance + identity * covariance.diagonal().mean() * share
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, identity) < 0.05:
            break
        share *= 2
    u, s, vh = torch.linalg.svd(weight @ damped, full_matrices=False)
    return u, s, (vh @ inverse).T


def _lora_ga_factors(model: Any, batches: list[Batch], accelerator: Accelerator) -> FirstFactors:
    """Return A0 and B0 of each layer, from the gradient of its weight: that of the mean loss over all labels."""
    config = model.peft_config["default"].lora_ga_config or LoraGAConfig()
    layers = {name: layer for name, layer in lora_layers(model).items() if layer in set(linear_lora_layers(model))}
    weights: dict[str, nn.Parameter] = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    labels = sum(batch["total_weight"] for batch in batches)
    gradients: dict[str, torch.Tensor] = {}
    for weight in weights.values():
        weight.requires_grad_(True)
    for batch in batches:
        (_loss(accelerator, model, to_device(batch, accelerator.device)) / labels).backward()
        for name, weight in weights.items():
            if weight.grad is not None:  # else no token went to this expert
                gradients[name] = gradients.get(name, 0) + weight.grad.float()
                weight.grad = None
    for weight in weights.values():
        weight.requires_grad_(False)
    model.zero_grad()

    def start(layer: Any, gradient: torch.Tensor, adapter: str) -> None:
        layer.get_base_layer()._peft_loraga_grad = gradient
        layer.lora_ga_init(adapter, config)

    factors = {}
    for name, gradient in gradients.items():
        layer = layers[name]
        gradient = gradient.T if layer.fan_in_fan_out else gradient
        # The method takes twice as many directions of the gradient as the rank is.
        rank = max(1, min(layer.r["default"], min(gradient.shape) // 2))
        factors[name] = _on_cpu(first_factors(layer, partial(start, layer, gradient), rank))
    return factors


def _on_cpu(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = factors
    return a.cpu(), b.cpu()
