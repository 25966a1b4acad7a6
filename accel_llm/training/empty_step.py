"""Follows the memory of a training step with tensors that have a shape and a dtype, but no data.

The real code runs: the layers of the model's family, the adapter, 4-bit layers, our attention and our loss. So nothing
about a family or a method is counted by hand. Only a few layers are built: with each further layer of the same kind
every figure grows by the same amount.
"""

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import accel_llm.system.chatter

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig

from accel_llm.adapters.data_starts import start_figures
from accel_llm.adapters.partial import last_layers
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch, collate_packed, collate_padded
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.classifier import answer_scores
from accel_llm.model.document_attention import assumed_gpu
from accel_llm.model.encoders import text_scores
from accel_llm.model.loss import fit_loss_chunks, next_token_loss
from accel_llm.system.quiet import quietly
from accel_llm.training.empty_model import StepSettings, build_empty, fill_model, shorten_config
from accel_llm.training.optimizer_state import optimizer_bytes

# The parts of a step in which its memory can be largest. The first and the last of the layers stand for all.
PARTS = ("forward", "loss", "first backward", "last backward", "embedding backward")
BatchSize = tuple[int, int]  # rows of a micro-batch, and the tokens in each
ALIKE = {"sliding_attention": "full_attention", "chunked_attention": "full_attention"}  # in memory


def follow_step(options: TrainOptions, config: PreTrainedConfig, settings: StepSettings) -> dict[str, int]:
    """Return the memory of a micro-batch of the largest size, as bytes by name.

    `weights` are all weights, `trained` those that are trained; `parameters` and `trainable` are their numbers; `layer`
    is the largest layer, `layer trainable` the most trained numbers of one, `embedding` the input embedding if it is frozen and used for nothing else, `tied` is 1 if it is the head too; the optimizers have
    the names of `optimizer_bytes`, and there are those of `start_figures`. For each part of PARTS that the step has
    there are three figures: the gradients and the stored activations when the part begins (`loss: gradients`,
    `loss: stored`), and the most that it adds (`loss: added`).
    """
    size = options.per_device_train_batch_size, options.max_length
    return follow_steps(options, config, settings, [size])[size]


def follow_steps(
    options: TrainOptions, config: PreTrainedConfig, settings: StepSettings, sizes: Sequence[BatchSize]
) -> dict[BatchSize, dict[str, int]]:
    """Return the figures of `follow_step` for micro-batches of several sizes: (rows, tokens in each)."""
    kinds = _layer_kinds(config)
    start, period = _pattern(kinds)
    few = start + (2 * period if period == 1 else period)  # no gradient reaches the input of the first layer
    few += len(kinds) if (trained := last_layers(options)) is None else -(-trained // period) * period
    if few + period >= len(kinds):
        return _follow(options, config, settings, sizes, len(kinds), max(start, period))
    fewer, more = (
        _follow(options, config, settings, sizes, layers, max(start, period)) for layers in (few, few + period)
    )
    rest = (len(kinds) - few) / period
    return {
        size: {name: round(value + rest * (more[size][name] - value)) for name, value in fewer[size].items()}
        for size in fewer
    }


def _layer_kinds(config: PreTrainedConfig) -> list[tuple]:
    """Return for each layer what the config says about it alone."""
    text: Any = config.get_text_config()
    layers = text.num_hidden_layers
    columns = [value for value in vars(text).values() if isinstance(value, list) and len(value) == layers]
    dense = getattr(text, "first_k_dense_replace", None) or 0
    marks = [[k < dense for k in range(layers)], *([ALIKE.get(v, v) for v in column] for column in columns)]
    return [tuple(map(str, marks_of_layer)) for marks_of_layer in zip(*marks, strict=True)]


def _pattern(kinds: list[tuple]) -> tuple[int, int]:
    """Return after how many layers the kinds begin to repeat, and every how many they do."""
    patterns = ((start, period) for period in range(1, len(kinds) + 1) for start in range(min(period, 8) + 3))
    return next((s, p) for s, p in patterns if all(a == b for a, b in zip(kinds[s:], kinds[s + p :], strict=False)))


def _follow(
    options: TrainOptions,
    config: PreTrainedConfig,
    settings: StepSettings,
    sizes: Sequence[BatchSize],
    layers: int,
    group: int,
) -> dict[BatchSize, dict[str, int]]:
    """Follow steps of a model with so many layers; the first and the last `group` layers are taken together."""
    with quietly():
        with torch.device("meta"):
            model, quantized = build_empty(options, shorten_config(config, layers), settings)
        parameters = sum(parameter.numel() for parameter in model.parameters())  # those in 4 bits are still whole
        with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
            fill_model(model, settings)
            figures = _weight_figures(model, settings.device_type) | start_figures(model, options)
            figures |= {"weights": allocations.live - quantized, "parameters": parameters}
            followed: dict[BatchSize, dict[str, int]] = {}
            for rows, length in dict.fromkeys(sizes):
                sized = options.model_copy(update={"per_device_train_batch_size": rows, "max_length": length})
                followed[rows, length] = figures | _follow_batch(model, allocations, sized, settings, group)
            return followed


def _follow_batch(
    model: nn.Module, allocations: "Allocations", options: TrainOptions, settings: StepSettings, group: int
) -> dict[str, int]:
    """Take a step with the largest batch of the options; return the figures of its parts."""
    if not options.gives_scores:
        fit_loss_chunks(unwrap_causal_lm(model), options.per_device_train_batch_size * options.max_length)
    for parameter in model.parameters():
        filled = settings.accumulated and parameter.requires_grad
        parameter.grad = torch.empty_like(parameter) if filled else None
    recorder = Recorder(allocations, model, allocations.live - _gradient_bytes(model))
    hooks = _mark_parts(model, recorder, group)
    on_device = assumed_gpu() if settings.device_type == "cuda" else nullcontext()
    computes_in_16_bits = settings.autocast and settings.compute != torch.float32
    batch = _largest_batch(options)
    with on_device:
        with torch.autocast("cpu", settings.compute) if computes_in_16_bits else nullcontext():
            loss = _loss(model, batch, options)
        loss.backward()
    recorder.end()
    for hook in hooks:
        hook.remove()
    return recorder.figures


def _loss(model: nn.Module, batch: Batch, options: TrainOptions) -> torch.Tensor:
    if isinstance(options, ClassifyOptions):
        return text_scores(model, batch).sum()
    return answer_scores(model, batch).sum() if options.gives_scores else next_token_loss(model, batch)


def _layers(model: nn.Module) -> list[nn.Module]:
    inner = unwrap_causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    modules = [module for part in (inner.get_decoder(), inner) if part is not None for module in part.modules()]
    return list(next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == number))


def _gradient_bytes(model: nn.Module) -> int:
    return sum(gradient.nbytes for p in model.parameters() if (gradient := p.grad) is not None)


def _weight_figures(model: nn.Module, device_type: str) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner, layers = unwrap_causal_lm(model), _layers(model)
    weight: Any = getattr(inner.get_input_embeddings(), "weight", None)
    head: Any = inner.get_output_embeddings()
    alone = weight is not None and not weight.requires_grad and weight is not getattr(head, "weight", None)
    return {
        "trained": sum(parameter.nbytes for parameter in trained),
        "trainable": sum(parameter.numel() for parameter in trained),
        "layer": max(sum(p.nbytes for p in layer.parameters()) for layer in layers),
        "layer trainable": max(sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in layers),
        "embedding": weight.nbytes if weight is not None and alone else 0,
        "tied": int(weight is not None and weight is getattr(head, "weight", None)),
        **optimizer_bytes(model, device_type),
    }


class Allocations(TorchDispatchMode):
    """Counts the bytes of the results of all operations, for as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.held: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # asked thousands of times
        if func is aten.addmm.out:
            return (kwargs or {})[
                "out"
            ]  # torch 2.13 would go through the decomposition, which takes a third of the time
        if func is aten._local_scalar_dense.default:
            return getattr(args[0], "is_greater", False)  # there is no value; a layer of PEFT may ask for one
        if func is aten._grouped_mm.default and args[0].dtype == torch.float32:
            # For tensors without data torch 2.13 takes bfloat16 only.
            result = func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **(kwargs or {})).float()
        elif func is aten.index.Tensor:
            # A mask has no values: everything is chosen, as by a list of as many places.
            places = [place.long() if place is not None and place.dtype == torch.bool else place for place in args[1]]
            result = func(args[0], places)
        else:
            result = func(*args, **(kwargs or {}))
        if func is aten.gt.Scalar and result.numel() == 1:
            result.is_greater = True  # a random number than the share of steps in which a module drops out
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.held:
            self.held[key] = storage.nbytes(), weakref.ref(storage, partial(self.remove, key))
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)

    def remove(self, key: int, _: Any) -> None:
        size, _ = self.held.pop(key)
        self.live -= size


class Recorder:
    """Notes for each part of a step what is in memory when it begins, besides `fixed`, and the most that it adds."""

    def __init__(self, allocations: Allocations, model: nn.Module, fixed: int):
        self.allocations, self.model, self.fixed = allocations, model, fixed
        self.figures: dict[str, int] = {}
        self.part, self.begun = "", 0

    def begin(self, part: str, *_: Any) -> None:
        """Begin a part. The same part goes on if it is named again; "" is a part that is not noted."""
        if part == self.part:
            return
        self.end()
        self.part, self.begun = part, self.allocations.live
        self.allocations.most = self.begun
        if part:
            self.figures[f"{part}: gradients"] = _gradient_bytes(self.model)
            self.figures[f"{part}: stored"] = self.begun - self.fixed - self.figures[f"{part}: gradients"]

    def end(self) -> None:
        if self.part:
            self.figures[f"{self.part}: added"] = self.allocations.most - self.begun
        self.part = ""


def _mark_parts(model: nn.Module, recorder: Recorder, group: int) -> list[RemovableHandle]:
    """Let `recorder` know when each part begins: by the layers' forwards, and by the gradients of what they return.

    Return the hooks, to be removed after the step.
    """
    layers = _layers(model)

    def begin_at_gradient(part: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda _: recorder.begin(part))

    first, last = max(0, len(layers) - group), min(group, len(layers))
    hooks = [
        layers[first].register_forward_pre_hook(partial(recorder.begin, "forward")),
        layers[-1].register_forward_hook(partial(recorder.begin, "loss")),
    ]
    for k, layer in enumerate(layers):
        part = "first backward" if k >= first else "last backward" if k < last else ""
        hooks.append(layer.register_forward_hook(partial(begin_at_gradient, part)))
    embedding = unwrap_causal_lm(model).get_input_embeddings()
    return [*hooks, embedding.register_forward_hook(partial(begin_at_gradient, "embedding backward"))]


def _largest_batch(options: TrainOptions) -> Batch:
    """Return a batch without data: as many rows of as many tokens as the options allow, and all of them targets."""
    virtual = options.virtual_tokens
    row = np.zeros(options.max_length - virtual, np.int32)
    rows = [(row, row)] * options.per_device_train_batch_size
    batch = collate_packed(rows, None, virtual) if options.packing else collate_padded(rows, 0, None, virtual)
    batch["last_positions"] = batch["target_positions"]  # of scores; a batch of answers has fewer
    if isinstance(options, ClassifyOptions):  # each row is one text
        batch["first_positions"] = torch.arange(len(rows)) * len(row)
        batch["last_positions"] = batch["first_positions"] + len(row) - 1
    return {
        name: torch.empty(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
