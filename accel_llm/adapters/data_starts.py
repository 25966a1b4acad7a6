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
from typing import Any

import accel_llm.system.chatter

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import initialize_lora_eva_weights
from peft.tuners.lora.eva import HashHook, get_eva_state_dict, prepare_layer_inputs_fn_language_modeling
from peft.utils.incremental_pca import IncrementalPCA

from accel_llm.adapters.initial import linear_lora_layers, lora_layers, subtract_first_factors
from accel_llm.adapters.lora_options import INIT_ROWS, looks_at_rows
from accel_llm.adapters.sums_over_rows import corda_factors, lora_ga_factors
from accel_llm.backend.strategy import compute_dtype
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch, to_device
from accel_llm.data.stream import Stream
from accel_llm.errors import ConfigError
from accel_llm.model.loading import short_reason
from accel_llm.model.loss import next_token_loss

# Rows of the stream (packed ones, if rows are packed) to look at, if `init_rows` in method_options gives no number.
# CorDA: as many as Yang et al. 2024 ("CorDA") and PEFT's guide collect. The others need less: EVA (Paischer et al.
# 2024) ends when its directions keep still, and LoRA-GA (Wang et al. 2024) needs the gradient of one large batch.
DEFAULT_ROWS = {"eva": 64, "corda": 256, "lora_ga": 64}
MAX_PASSES = 20  # of EVA through these rows; PEFT 0.21 would go on for ever if its directions kept turning


def start_from_rows(accelerator: Accelerator, model: Any, options: TrainOptions, stream: Stream) -> None:
    """Give the LoRA of `model` first values from the first rows, if `init_lora_weights` asks for it.

    Call it after `place_weights` and before the optimizer is built. In a run that goes on from a checkpoint the layers
    only get the ranks that they have there: their values are loaded later.

    Raises:
        ConfigError: the rows have too few labels, or the method does not fit a layer.
    """
    if not looks_at_rows(options):
        return
    if stream.saved:
        start = _places(model, options, stream.saved)
    else:
        [start] = broadcast_object_list([_compute(accelerator, model, options, stream)])
    if options.init_lora_weights == "eva":
        _set_directions(model, start)
        return
    for name, layer in lora_layers(model).items():
        if name in start:
            a, b = (factor.to(accelerator.device) for factor in start[name])
            subtract_first_factors(layer, a, b, compute_dtype(options))


def _compute(accelerator: Accelerator, model: Any, options: TrainOptions, stream: Stream) -> Any:
    """Return A of each layer for EVA, else A0 and B0 of each layer, by name."""
    init = str(options.init_lora_weights)
    rows = int(options.method_options.get(INIT_ROWS) or DEFAULT_ROWS[init])
    bins = [documents for k in range(min(rows, stream.plan.bins or rows)) if (documents := stream.documents(k))]
    if init == "eva":
        bins = _groups_with_labels(stream, bins, model)
    batches = [to_device(stream.batch(documents), accelerator.device) for documents in bins]
    compute: Callable[..., Any] = {"eva": _eva_directions, "corda": corda_factors, "lora_ga": lora_ga_factors}[init]
    with _bare_base(accelerator, model, options.seed):
        return compute(model, batches, partial(_loss, accelerator))


def _places(model: Any, options: TrainOptions, saved: dict[str, int]) -> dict[str, Any]:
    """Return what `_compute` does, with zeros as values. `saved`: the elements of each tensor of a checkpoint."""
    places: dict[str, Any] = {}
    for name, layer in linear_lora_layers(model).items():
        path, rank = f"base_model.model.{name}", layer.r["default"]
        if options.init_lora_weights == "eva":
            places[path] = torch.zeros(
                saved.get(f"{path}.lora_A.default.weight", 0) // layer.in_features, layer.in_features
            )
        elif f"{path}.lora_A.default.offset" in saved:
            places[name] = torch.zeros(rank, layer.in_features), torch.zeros(layer.out_features, rank)
    return places


def start_figures(model: Any, options: TrainOptions) -> dict[str, int]:
    """Return the bytes of the matrices that first values from rows need: of all layers together, and the largest one.

    EVA keeps no such matrix, but works on the inputs of a layer.
    """
    if not looks_at_rows(options):
        return {}
    layers = linear_lora_layers(model).values()
    if options.init_lora_weights == "eva":
        return {"start sums": 0, "start largest": max(4 * options.max_length * layer.in_features for layer in layers)}
    is_corda = options.init_lora_weights == "corda"
    sizes = [4 * layer.in_features * (layer.in_features if is_corda else layer.out_features) for layer in layers]
    return {"start sums": sum(sizes), "start largest": max(sizes)}


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


def _groups_with_labels(stream: Stream, bins: list[list[int]], model: Any) -> list[list[int]]:
    """Join neighbouring rows until each group has as many labels as EVA computes directions.

    Raises:
        ConfigError: all rows together have fewer.
    """
    config = model.peft_config["default"]
    least = max(round(layer.r["default"] * config.eva_config.rho) for layer in linear_lora_layers(model).values())
    groups: list[list[int]] = [[]]
    missing, total = least, 0
    for documents in bins:
        if missing <= 0:
            groups.append([])
            missing = least
        labels = stream.batch(documents)["num_targets"]
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


def _eva_directions(model: Any, batches: list[Batch], loss: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """Return A of each layer by its name in `model`, computed by PEFT; its length is the rank of the layer."""
    passes = iter(range(MAX_PASSES * len(batches) + 2))

    def forward(model: Any, batch: Batch) -> None:
        if next(passes, None) is None:
            raise ConfigError(
                f"init_lora_weights: the directions of eva still turn after {MAX_PASSES} passes through the first "
                f"rows; raise {INIT_ROWS}, or lower tau in eva_config."
            )
        loss(model, batch)

    def layer_inputs(inputs: Any, positions: torch.Tensor, name: str) -> torch.Tensor:
        if inputs[0].ndim != 3:
            raise ConfigError(
                f"init_lora_weights: {name} is a part of an expert, which sees some tokens only, and eva needs all of "
                "them; name other lora_target_modules, or take other first values."
            )
        return prepare_layer_inputs_fn_language_modeling(inputs, positions, name)

    device_type = batches[0]["input_ids"].device.type
    try:
        with _mended_eva(device_type):
            directions = get_eva_state_dict(
                model,
                [_Placed(batch) for batch in batches],
                forward_fn=forward,
                prepare_layer_inputs_fn=layer_inputs,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"init_lora_weights: eva does not fit the model ({short_reason(error)}).") from None
    return {name: direction.cpu() for name, direction in directions.items()}


@contextmanager
def _mended_eva(device_type: str) -> Iterator[None]:
    """Mend two things of PEFT 0.21's EVA, which computes in hooks of the forward.

    CUDA decomposes no 16-bit matrices, so autocast is off there. And to find layers with the same input it makes a
    Python number of every element of it: seconds for each layer of a 7B model.
    """
    plain, slow = IncrementalPCA.partial_fit, HashHook.hash_fn
    IncrementalPCA.partial_fit = torch.autocast(device_type, enabled=False)(plain)  # type: ignore[method-assign]
    HashHook.hash_fn = staticmethod(_hash_bytes)  # type: ignore[method-assign]
    try:
        yield
    finally:
        IncrementalPCA.partial_fit, HashHook.hash_fn = plain, staticmethod(slow)  # type: ignore[method-assign]


def _hash_bytes(tensor: torch.Tensor) -> int:
    return hash(tensor.contiguous().view(torch.uint8).numpy().tobytes())


def _set_directions(model: Any, directions: dict[str, torch.Tensor]) -> None:
    """Put A into each layer, with its rank; PEFT takes the adapter from a layer of rank 0."""
    dtype = next(iter(linear_lora_layers(model).values())).lora_A["default"].weight.dtype
    initialize_lora_eva_weights(model, eva_state_dict=directions)
    for layer in linear_lora_layers(model).values():
        for name, parameter in layer.named_parameters():
            if not name.startswith("base_layer"):
                parameter.data = parameter.data.to(dtype)  # PEFT makes new ones, in the dtype of the base
