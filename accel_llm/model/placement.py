"""Brings weights from the files to the devices layer by layer: read or drawn, cast, quantized, sharded.

`load_model` only memory-maps the checkpoint, which takes no memory until a weight is read. Here each layer is read,
cast to its final dtype, quantized if the options say so and, under ZeRO-3 and FSDP2, sharded over the ranks before the
next layer is read. So a process never holds more than its own shard and one layer. The weights of a fresh model are
drawn where others are read, see first_weights.py.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accel_llm.system.chatter

import torch
from accelerate import Accelerator
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from accel_llm.backend.strategy import PRECISION_DTYPES, strategy, training_device
from accel_llm.config.options import TrainOptions
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.offloaded_embedding import embedding_to_offload, keep_on_host
from accel_llm.system.memory import release_pages, returning_freed_memory
from accel_llm.system.progress import tracked


def place_weights(accelerator: Accelerator, model: nn.Module, options: TrainOptions) -> None:
    """Move all weights of `model` to the device, in their final dtype, and shard them as the strategy says.

    Call it after everything that adds weights (new tokens, adapters) and before building the optimizer. Under ZeRO-3
    and FSDP2 it is a collective.

    Raises:
        ConfigError: `offload_embeddings` is set, but the embedding cannot stay in host memory.
    """
    # "no", Accelerate's word for float32, is not in the table.
    compute = PRECISION_DTYPES.get(accelerator.mixed_precision, torch.float32)
    # DeepSpeed keeps float32 master weights itself, and needs one dtype for all weights.
    masters = not strategy().startswith("zero") and options.master_weights == "float32"
    shard = {"zero3": _zero3_sharder, "fsdp2": _fsdp2_sharder}.get(strategy(), _no_sharder)(accelerator, model)

    # A module belongs to the first unit that contains it, so the last unit gets only what is left.
    done: set[nn.Module] = set()
    with returning_freed_memory():
        if options.offload_embeddings:
            embedding = embedding_to_offload(model)
            if accelerator.device.type == "cpu":
                accelerator.print(
                    "offload_embeddings: without a GPU all weights lie in host memory, so it has no effect"
                )
            else:
                _draw(model, [embedding])
                materialize_weights(model, [embedding], compute, torch.device("cpu"), masters)
                keep_on_host(embedding)
        for unit in tracked(_shard_units(model), "load layers"):
            modules = [module for module in unit.modules() if module not in done]
            fresh = _draw(model, modules)
            materialize_weights(model, modules, compute, accelerator.device, masters, copy=not fresh)
            done.update(modules)
            shard(unit)
    # From now on the loss can be tested on the model, see `attach_loss`.
    unwrap_causal_lm(model).unread = False  # type: ignore[assignment]
    vars(unwrap_causal_lm(model)).pop("first_weights", None)


def _draw(model: nn.Module, modules: list[nn.Module]) -> bool:
    """Draw the first weights directly in `modules` on the host, if the model is a fresh one; tell whether it is."""
    first_weights: Any = getattr(unwrap_causal_lm(model), "first_weights", None)
    if first_weights is not None:
        first_weights.draw(modules)
    return first_weights is not None


def _shard_units(model: nn.Module) -> list[nn.Module]:
    """Return the modules to read and shard one after the other: decoder layers, embedding, then the whole model."""
    inner = unwrap_causal_lm(model)
    layer_classes = set(inner._no_split_modules or [])
    # Backwards, so that a layer inside another one comes first.
    layers = [module for module in reversed(list(model.modules())) if type(module).__name__ in layer_classes]
    # An embedding that shares its weight with the head stays with it in the last unit. With `modules_to_save` PEFT keeps
    # the shared weight inside a wrapper, beside the copy that is trained.
    embedding = inner.get_input_embeddings()
    own = set() if embedding is None else set(embedding.modules())
    others = {parameter for module in model.modules() if module not in own for parameter in module.parameters(False)}
    tied = embedding is not None and not others.isdisjoint(embedding.parameters())
    # BERT names its embeddings, in which the embedding is, as one of the parts to keep whole.
    inside = any(embedding is module for layer in layers for module in layer.modules())
    return [*layers, *([] if tied or inside or embedding is None else [embedding]), model]


def materialize_weights(
    model: nn.Module,
    modules: list[nn.Module],
    compute: torch.dtype,
    device: torch.device,
    masters: bool = True,
    copy: bool = True,
) -> None:
    """Copy the weights directly in `modules` (not in submodules) from the files to `device`, in their final dtype.

    Frozen weights get the dtype `compute`; trained ones are float32 with `masters`, else also `compute`, and so do the
    buffers of an adapter. The weights of 4-bit layers (see `prepare_4bit_layers`) are quantized here, unless that was
    done before. With `copy` no weight stays in the memory where it was, which may be that of a file.
    """
    float32 = _float32_parameter_ids(model)
    for module in modules:
        # AdaMSS of PEFT 0.21 casts its input to the dtype that the weights had when it was attached to them.
        if isinstance(module, BaseTunerLayer) and isinstance(vars(module).get("dtype"), torch.dtype):
            vars(module)["dtype"] = compute
        # An adapter's buffers, such as VeRA's matrices, are multiplied by its weights. PEFT 0.21 makes them float32, and
        # DeepSpeed 0.19 and FSDP2 leave them so. FSDP2 casts trained weights in each forward pass.
        in_one_dtype = isinstance(module, BufferDict) and (not masters or strategy() == "fsdp2")
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device, compute if in_one_dtype and buffer.is_floating_point() else None)
        for name, parameter in list(module.named_parameters(recurse=False)):
            old = parameter.data
            if isinstance(parameter, Params4bit) and not parameter.bnb_quantized:
                # vars() passes on the settings and also the layer, which bitsandbytes updates when it quantizes.
                unquantized: Any = Params4bit(old.to(device, compute), requires_grad=False, **vars(parameter))
                module._parameters[name] = unquantized.to(device)  # bitsandbytes quantizes in `to`
            elif isinstance(parameter, Params4bit) and old.device != device:
                quantized: Any = parameter
                module._parameters[name] = quantized.to(device)  # together with the scales, its quant_state
            elif parameter.is_floating_point() and not isinstance(parameter, Params4bit):
                full_precision = (masters and _is_trained(module, parameter)) or id(parameter) in float32
                dtype = torch.float32 if full_precision else compute
                parameter.data = old.to(device, dtype, copy=copy)
            else:
                continue
            # The pages of the file that were just read would otherwise count as memory of this process.
            release_pages(old)


def quantize_layers(model: nn.Module, compute: torch.dtype, device: torch.device | None = None) -> None:
    """Quantize the 4-bit linear layers of `model` now, on `device` (none: that of this process); read nothing else."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, Linear4bit)]
    materialize_weights(model, layers, compute, device or training_device())


def _is_trained(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Return whether `parameter` of `module` is trained, or has the dtype of one that is.

    On a CPU torch 2.13 computes no LayerNorm whose weight is in bfloat16 and whose bias is in float32.
    """
    both = module.parameters(recurse=False) if isinstance(module, nn.LayerNorm) else [parameter]
    return any(each.requires_grad for each in both)


def _float32_parameter_ids(model: nn.Module) -> set[int]:
    """Return the `id` of each parameter that the family always keeps in float32; none under DeepSpeed (one dtype)."""
    inner = unwrap_causal_lm(model)
    # The pattern matches a whole part of a dotted name, and nothing if there are no names.
    names = [] if strategy().startswith("zero") else list(inner._keep_in_fp32_modules_strict or [])
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in names) or r"(?!)")
    return {id(parameter) for name, parameter in inner.named_parameters() if pattern.search(name)}


def _no_sharder(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    return lambda unit: None


def _zero3_sharder(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    import deepspeed

    # Only the keys that zero.Init understands; "auto" values are filled in later, by `prepare`.
    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    settings = json.loads(json.dumps(plugin.deepspeed_config, default=str))
    zero = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {key: settings[key] for key in ("bf16", "fp16") if key in settings}
    sharded: list[Any] = []

    def shard(unit: nn.Module) -> None:
        parameters = [parameter for parameter in unit.parameters() if not hasattr(parameter, "ds_id")]
        # A sharded parameter can shard others; only the first unit needs zero.Init.
        if sharded:
            sharded[0].convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            deepspeed.zero.Init(module=unit, config_dict_or_path=config)
            sharded.append(parameters[0])

    return shard


def _fsdp2_sharder(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin: Any = accelerator.state.fsdp_plugin
    # Accelerate 1.15's policy rounds outputs (here the loss) and inputs (the tokens' weights) to bf16, and sums
    # gradients in bf16.
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    policy = replace(policy, output_dtype=None, cast_forward_inputs=False)
    if policy.param_dtype is not None:
        policy = replace(policy, reduce_dtype=torch.float32)

    shared = _shared_by_units(model)

    def shard(unit: nn.Module) -> None:
        # None keeps the outermost unit unsharded after the forward pass: the backward pass needs it first.
        reshard = None if unit is model else plugin.reshard_after_forward
        fully_shard(
            unit,
            mp_policy=policy,
            offload_policy=plugin.cpu_offload,
            reshard_after_forward=reshard,
            ignored_params=set() if unit is model else shared,
        )

    return shard


def _shared_by_units(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters that several units use, such as the bank of vectors from which VB-LoRA makes all layers.

    A unit is whole only while it computes itself. These belong to the outermost one, which is whole all the time.
    """
    units, users = _shard_units(model)[:-1], Counter()
    for unit in units:
        inside = set(unit.modules())
        inner = {
            parameter for other in units if other in inside and other is not unit for parameter in other.parameters()
        }
        users.update(set(unit.parameters()) - inner)
    return {parameter for parameter, count in users.items() if count > 1}
