"""Follows the memory of a training step with tensors that have a shape and a dtype, but no data.

The real model code runs: the family's own layers, the adapter, 4-bit layers, our attention and loss. So nothing about
a family or a method is counted by hand. Only a few layers are built. Layers are alike, so each figure grows by the same
amount with each further layer.
"""

import copy
import io
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.functional import QuantState
from bitsandbytes.nn.modules import Params4bit
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import Batch
from accel_llm.model.attention import assumed_gpu, unwrap_causal_lm
from accel_llm.model.language_part import causal_lm_loader, freeze_other_parts
from accel_llm.model.loading import OWN_IMPLEMENTATIONS, configure_for_training
from accel_llm.model.loss import next_token_loss
from accel_llm.model.positions import scale_by_document
from accel_llm.model.quantization import build_quantization_config, prepare_4bit_layers

# The parts of a step at which its memory can be largest.
PARTS = ("embedding", "forward", "loss", "first backward", "last backward", "embedding backward")


class Allocations(TorchDispatchMode):
    """Counts the bytes of the results of all operations, as long as something holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0
        self.held: dict[int, tuple[int, weakref.ref]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.held:
            self.held[storage._cdata] = storage.nbytes(), weakref.ref(storage, partial(self.remove, storage._cdata))
            self.live += storage.nbytes()
            self.most = max(self.most, self.live)

    def remove(self, key: int, _: Any) -> None:
        size, _ = self.held.pop(key)
        self.live -= size


class Recorder:
    """Notes for each part of a step what is in memory when it begins, and the most that it adds."""

    def __init__(self, allocations: Allocations, model: nn.Module):
        self.allocations = allocations
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.fixed = allocations.live
        self.figures: dict[str, int] = {}
        self.part = ""

    def begin(self, part: str, *_: Any) -> None:
        """Begin a part; if the same part goes on, nothing changes."""
        if part == self.part:
            return
        self.end()
        self.part, self.allocations.most = part, self.allocations.live
        if part:
            gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
            self.figures[f"{part}: gradients"] = gradients
            self.figures[f"{part}: stored"] = self.allocations.live - self.fixed - gradients

    def end(self) -> None:
        if self.part:
            begun = self.figures[f"{self.part}: stored"] + self.figures[f"{self.part}: gradients"] + self.fixed
            self.figures[f"{self.part}: added"] = self.allocations.most - begun
        self.part = ""


def follow_step(
    options: TrainOptions,
    config: PreTrainedConfig,
    compute: torch.dtype,
    masters: bool,
    periods: int,
    device_type: str = 'cuda',
) -> dict[str, int]:
    """Return the memory figures of one micro-batch of a model with `periods` times the shortest run of unlike layers.

    `compute` is the dtype of matrix products; with `masters` trained weights are float32.
    """
    config, layers = _shortened(config, periods)
    with _quiet(), torch.device("meta"):
        model = _empty_model(options, config, compute)
    with FakeTensorMode(allow_non_fake_inputs=True), Allocations() as allocations:
        _fill(model, compute, masters)
        recorder = Recorder(allocations, model)
        _mark_parts(model, recorder, layers // periods)
        autocast = torch.autocast("cpu", compute) if compute != torch.float32 else nullcontext()
        recorder.begin("embedding")
        with assumed_gpu() if device_type == 'cuda' else nullcontext():
            with autocast:
                loss = next_token_loss(model, _longest_batch(options))
            loss.backward()
        recorder.end()
        return recorder.figures


def _shortened(config: PreTrainedConfig, periods: int) -> tuple[PreTrainedConfig, int]:
    """Return a config with fewer layers, and their number."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None):
        del config.quantization_config
    text: Any = config.get_text_config()
    whole = text.num_hidden_layers
    layers = min(periods * _period(getattr(text, "layer_types", None) or [""]), whole)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == whole:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config, layers


def _period(kinds: list[str]) -> int:
    """Return after how many layers the kinds of layers repeat."""
    return next(n for n in range(1, len(kinds) + 1) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what is said about the model: it is said again when the real one is built."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _empty_model(options: TrainOptions, config: PreTrainedConfig, compute: torch.dtype) -> nn.Module:
    loader = causal_lm_loader(config)
    arguments = OWN_IMPLEMENTATIONS | {"trust_remote_code": options.trust_remote_code}
    model: PreTrainedModel = loader.from_config(config, dtype=compute, **arguments)
    freeze_other_parts(model, config)
    model.unread = True  # type: ignore[assignment]
    quantization = build_quantization_config(options, compute, sharded=False)
    if options.method == "qlora" and quantization:
        prepare_4bit_layers(model, quantization)
    configure_for_training(model, options)
    return model if options.method == "full" else attach_adapter(model, options)


def _fill(model: nn.Module, compute: torch.dtype, masters: bool) -> None:
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in filled:
                filled[id(parameter)] = _filled(parameter, compute, masters)
            module._parameters[name] = filled[id(parameter)]


def _filled(parameter: nn.Parameter, compute: torch.dtype, masters: bool) -> nn.Parameter:
    if isinstance(parameter, Params4bit):
        settings: Any = parameter
        filled: Any = nn.Parameter(torch.empty(-(-parameter.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
        filled.quant_state = settings.module.quant_state = _empty_scales(parameter.shape, compute)
        return filled
    dtype = parameter.dtype
    if parameter.is_floating_point():
        dtype = torch.float32 if parameter.requires_grad and masters else compute
    return nn.Parameter(torch.empty(parameter.shape, dtype=dtype), requires_grad=parameter.requires_grad)


def _empty_scales(shape: torch.Size, compute: torch.dtype) -> QuantState:
    """Return the scales of NF4 weights: one in 8 bits for 64 weights, and one in 32 bits for 256 of those."""
    blocks = -(-shape.numel() // 64)
    absmax = torch.empty(-(-blocks // 256))
    outer = QuantState(absmax, code=torch.empty(256), blocksize=256, dtype=torch.float32)
    return QuantState(
        torch.empty(blocks, dtype=torch.uint8), shape, torch.empty(16), 64, "nf4", compute, torch.empty(()), outer
    )


def _mark_parts(model: nn.Module, recorder: Recorder, period: int) -> None:
    inner = unwrap_causal_lm(model)
    classes = set(inner._no_split_modules or [])
    layers = [module for module in inner.get_decoder().modules() if type(module).__name__ in classes]
    last = len(layers) - period
    layers[last].register_forward_pre_hook(partial(recorder.begin, "forward"))
    layers[-1].register_forward_hook(partial(recorder.begin, "loss"))

    def at_gradient(part: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if tensor.requires_grad:
            tensor.register_hook(lambda _: recorder.begin(part))

    for k, layer in enumerate(layers):
        part = "first backward" if k >= last else "last backward" if k < period else ""
        layer.register_forward_hook(partial(at_gradient, part))
    inner.get_input_embeddings().register_forward_hook(partial(at_gradient, "embedding backward"))


def _longest_batch(options: TrainOptions) -> Batch:
    rows, length = options.per_device_train_batch_size, options.max_length
    shape = (1, rows * length) if options.packing else (rows, length)
    ids = torch.zeros(shape, dtype=torch.int64)
    targets = rows * (length - 1)
    batch: Batch = {"input_ids": ids, "labels": ids, "lengths": [length] * rows}
    batch |= {"num_targets": targets, "total_weight": float(targets)}
    batch |= {"target_positions": torch.zeros(targets, dtype=torch.int64)}
    batch |= {"target_columns": torch.zeros(targets if options.packing else length - 1, dtype=torch.int64)}
    if not options.packing:
        return batch | {"attention_mask": torch.ones_like(ids)}
    boundaries = torch.zeros(rows + 1, dtype=torch.int32)
    return batch | {"position_ids": ids, "cu_seqlens": boundaries, "max_seqlen": length}
