"""Follows the memory of a training step with tensors that have a shape and a dtype, but no data.

The real code runs: the layers of the model's family, the adapter, 4-bit layers, our attention and our loss. So nothing
about a family or a method is counted by hand. Only a few layers are built: with each further layer of the same kind
every figure grows by the same amount.
"""

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import accel_llm.system.chatter

import numpy as np
import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as transformers_deepspeed

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.data_starts import start_figures
from accel_llm.adapters.partial import last_layers, train_part
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch, collate_packed, collate_padded
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.classifier import answer_scores, model_loader
from accel_llm.model.document_attention import assumed_gpu
from accel_llm.model.encoders import text_scores
from accel_llm.model.language_part import freeze_other_parts
from accel_llm.model.loading import OWN_IMPLEMENTATIONS, configure_for_training
from accel_llm.model.loss import next_token_loss
from accel_llm.model.quantization import build_quantization_config, prepare_4bit_layers, quantized_weights
from accel_llm.system.quiet import quietly
from accel_llm.training.optimizer_state import optimizer_bytes

# The parts of a step in which its memory can be largest. The first and the last of the layers stand for all.
PARTS = ("forward", "loss", "first backward", "last backward", "embedding backward")
ALIKE = {"sliding_attention": "full_attention", "chunked_attention": "full_attention"}  # in memory


@dataclass(frozen=True)
class StepSettings:
    """What decides about the memory of a step besides options and config.

    `compute` is the dtype of matrix products. With `masters` trained weights are float32, and autocast computes. With
    `accumulated` the gradients of earlier micro-batches are there already.
    """

    device_type: str
    compute: torch.dtype
    masters: bool = True
    autocast: bool = True
    accumulated: bool = False


def follow_step(options: TrainOptions, config: PreTrainedConfig, settings: StepSettings) -> dict[str, int]:
    """Return the memory of a micro-batch of the largest size, as bytes by name.

    `weights` are all weights, `trained` those that are trained, `trainable` their number, `layer` the largest layer,
    `embedding` the input embedding if it is frozen and used for nothing else; the optimizers have the names of
    `optimizer_bytes`, and there are those of `start_figures`. For each part of PARTS that the step has there are three figures: the gradients and the stored
    activations when the part begins (`loss: gradients`, `loss: stored`), and the most that it adds (`loss: added`).
    """
    kinds = _layer_kinds(config)
    start, period = _pattern(kinds)
    few = start + (2 * period if period == 1 else period)  # no gradient reaches the input of the first layer
    few += len(kinds) if (trained := last_layers(options)) is None else -(-trained // period) * period
    if few + period >= len(kinds):
        return _follow(options, config, settings, len(kinds), max(start, period))
    fewer, more = (_follow(options, config, settings, layers, max(start, period)) for layers in (few, few + period))
    rest = (len(kinds) - few) / period
    return {name: round(size + rest * (more[name] - size)) for name, size in fewer.items()}


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
    options: TrainOptions, config: PreTrainedConfig, settings: StepSettings, layers: int, group: int
) -> dict[str, int]:
    """Follow a step of a model with so many layers; the first and the last `group` layers are taken together."""
    with quietly():
        with torch.device("meta"):
            model, quantized = _build(options, _shorten(config, layers), settings)
        with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
            _fill(model, settings)
            figures = _weight_figures(model, settings.device_type) | start_figures(model, options)
            figures["weights"] = allocations.live - quantized
            if settings.accumulated:
                for parameter in model.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            recorder = Recorder(allocations, model, allocations.live - _gradient_bytes(model))
            _mark_parts(model, recorder, group)
            on_device = assumed_gpu() if settings.device_type == "cuda" else nullcontext()
            computes_in_16_bits = settings.autocast and settings.compute != torch.float32
            batch = _largest_batch(options)
            with on_device:
                with torch.autocast("cpu", settings.compute) if computes_in_16_bits else nullcontext():
                    loss = _loss(model, batch, options)
                loss.backward()
            recorder.end()
        return figures | recorder.figures


def _loss(model: nn.Module, batch: Batch, options: TrainOptions) -> torch.Tensor:
    if isinstance(options, ClassifyOptions):
        return text_scores(model, batch).sum()
    return answer_scores(model, batch).sum() if options.gives_scores else next_token_loss(model, batch)


def attach_without_weights(options: TrainOptions, config: PreTrainedConfig) -> None:
    """Build the whole model without data, and choose what is trained of it, as the run will.

    Raises:
        ConfigError: the method or its options do not fit the model.
    """
    with quietly(), torch.device("meta"):
        layers = config.get_text_config().num_hidden_layers
        _build(options, _shorten(config, layers), StepSettings("cpu", torch.float32))


@contextmanager
def _whole() -> Iterator[None]:
    """Keep transformers from sharding a model while it builds it: the other processes do not build this one."""
    settings: Any = transformers_deepspeed
    reference = settings._hf_deepspeed_config_weak_ref
    settings.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        settings._hf_deepspeed_config_weak_ref = reference


def _shorten(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """Return a copy of the config with fewer layers, and with rotary embeddings that read no lengths."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    rotary = getattr(text, "rope_parameters", None) or {}
    for scaling in (rotary, *rotary.values()):  # one for the model, or one for each kind of layer
        if isinstance(scaling, dict) and scaling.get("rope_type") in ("dynamic", "longrope"):
            scaling["rope_type"] = "default"  # its results have the same sizes
    for owner in (config, text):
        if getattr(owner, "quantization_config", None):  # of the files, which are not read
            del owner.quantization_config  # type: ignore[attr-defined]
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == text.num_hidden_layers:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _build(options: TrainOptions, config: PreTrainedConfig, settings: StepSettings) -> tuple[nn.Module, int]:
    """Build the model that is trained, without memory. The second value: the bytes that 8-bit weights take less.

    Layers in 8 bits choose columns by their values, so they are followed as 16-bit ones.
    """
    arguments = OWN_IMPLEMENTATIONS | {"trust_remote_code": options.trust_remote_code}
    with _whole():
        model: PreTrainedModel = model_loader(config).from_config(config, dtype=settings.compute, **arguments)
    freeze_other_parts(model, config)
    model.unread = True  # type: ignore[assignment]
    saved = 0
    if options.load_in_8bit:
        names = quantized_weights(model)
        saved = sum(p.numel() * (p.itemsize - 1) - 4 * len(p) for n, p in model.named_parameters() if n in names)
    elif quantization := build_quantization_config(options, settings.compute, sharded=False):
        prepare_4bit_layers(model, quantization)
    # First values need weights. They take no further memory in a step.
    kept = [
        each for each in options.modules_to_save if any(f".{n}".endswith(f".{each}") for n, _ in model.named_modules())
    ]
    changes = {"init_lora_weights": True, "adapter_name_or_path": None, "modules_to_save": kept}
    options = options.model_copy(update=changes)
    configure_for_training(model, options)
    if options.has_adapter:
        return attach_adapter(model, options), saved
    train_part(model, options)
    return model, saved


def _fill(model: nn.Module, settings: StepSettings) -> None:
    """Give all weights and buffers a place on the CPU, in the dtype that they are trained in."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                filled[id(parameter)] = _filled(parameter, settings)
            setattr(module, name, filled[id(parameter)])  # an LSTM also keeps a list of its parameters


def _filled(parameter: nn.Parameter, settings: StepSettings) -> nn.Parameter:
    if isinstance(parameter, Params4bit):
        four_bit: Any = parameter
        packed: Any = nn.Parameter(torch.empty(-(-parameter.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        packed.quant_state = four_bit.module.quant_state = _empty_scales(parameter.shape, settings.compute)
        return packed
    dtype = parameter.dtype
    if parameter.is_floating_point():
        dtype = torch.float32 if parameter.requires_grad and settings.masters else settings.compute
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)


def _empty_scales(shape: torch.Size, compute: torch.dtype) -> QuantState:
    """Return the scales of NF4 weights: 8 bits for each 64 weights, and 32 bits for each 256 of those.

    Not by bitsandbytes' own `quantize_4bit`, which would keep tensors without data for later calls.
    """
    blocks = -(-shape.numel() // 64)
    outer = QuantState(torch.empty(-(-blocks // 256)), code=torch.empty(256), blocksize=256, dtype=torch.float32)
    absmax = torch.empty(blocks, dtype=torch.uint8)
    return QuantState(absmax, shape, torch.empty(16), 64, "nf4", compute, torch.empty(()), outer)


def _layers(model: nn.Module) -> list[nn.Module]:
    inner = unwrap_causal_lm(model)
    number = inner.config.get_text_config().num_hidden_layers
    modules = [module for part in (inner.get_decoder(), inner) if part is not None for module in part.modules()]
    return list(next(m for m in modules if isinstance(m, nn.ModuleList) and len(m) == number))


def _gradient_bytes(model: nn.Module) -> int:
    return sum(gradient.nbytes for p in model.parameters() if (gradient := p.grad) is not None)


def _weight_figures(model: nn.Module, device_type: str) -> dict[str, int]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inner = unwrap_causal_lm(model)
    weight: Any = getattr(inner.get_input_embeddings(), "weight", None)
    head: Any = inner.get_output_embeddings()
    alone = weight is not None and not weight.requires_grad and weight is not getattr(head, "weight", None)
    return {
        "trained": sum(parameter.nbytes for parameter in trained),
        "trainable": sum(parameter.numel() for parameter in trained),
        "layer": max(sum(p.nbytes for p in layer.parameters()) for layer in _layers(model)),
        "embedding": weight.nbytes if weight is not None and alone else 0,
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


def _mark_parts(model: nn.Module, recorder: Recorder, group: int) -> None:
    """Let `recorder` know when each part begins: by the layers' forwards, and by the gradients of what they return."""
    layers = _layers(model)

    def begin_at_gradient(part: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda _: recorder.begin(part))

    first, last = max(0, len(layers) - group), min(group, len(layers))
    layers[first].register_forward_pre_hook(partial(recorder.begin, "forward"))
    layers[-1].register_forward_hook(partial(recorder.begin, "loss"))
    for k, layer in enumerate(layers):
        part = "first backward" if k >= first else "last backward" if k < last else ""
        layer.register_forward_hook(partial(begin_at_gradient, part))
    unwrap_causal_lm(model).get_input_embeddings().register_forward_hook(
        partial(begin_at_gradient, "embedding backward")
    )


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
