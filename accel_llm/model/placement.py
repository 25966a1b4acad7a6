"""Weights on their way from the files to the devices: one layer at a time, cast, quantised and shared out among the ranks.

A model is loaded as memory maps of its checkpoint, which take no memory until they are read. Here each layer is read, cast
to the dtype that it trains in, quantised where that was asked for and, under ZeRO-3 and FSDP2, cut into the shares of the
ranks before the next layer is read. So no process ever holds more than its share and one layer.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import accel_llm.system.chatter

import torch
from accelerate import Accelerator
from bitsandbytes.nn.modules import Params4bit
from torch import nn

from accel_llm.backend.strategy import strategy
from accel_llm.config.options import OptimOptions
from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.system.memory import release_pages, returning_freed_memory


def place_weights(accelerator: Accelerator, model: nn.Module, options: OptimOptions) -> None:
    """Bring all weights of `model` to the device, in their final dtype, and share them out as the strategy says.

    To be called when nothing will add weights any more, and before the optimizer is built. A collective under ZeRO-3 and
    FSDP2.
    """
    compute = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
    # DeepSpeed keeps float32 masters itself, and wants one dtype throughout.
    masters = not strategy().startswith("zero") and options.master_weights == "float32"
    share = {"zero3": _share_by_zero3, "fsdp2": _share_by_fsdp2}.get(strategy(), _share_with_nobody)(accelerator, model)
    settled: set[nn.Module] = set()
    with returning_freed_memory():
        for unit in _units(model):
            modules = [module for module in unit.modules() if module not in settled]
            settle_weights(model, modules, compute, accelerator.device, masters)
            settled.update(modules)
            share(unit)
    unwrap_causal_lm(model).unread = False  # type: ignore[assignment]


def _units(model: nn.Module) -> list[nn.Module]:
    """What is read and shared out at a time, parts before the whole: decoder layers, the embedding, then all the rest."""
    inner = unwrap_causal_lm(model)
    names = set(inner._no_split_modules or [])
    layers = [module for module in reversed(list(model.modules())) if type(module).__name__ in names]
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    tied = head is not None and getattr(embedding, "weight", 0) is getattr(head, "weight", 1)
    return [*layers, *([] if tied or embedding is None else [embedding]), model]


def settle_weights(
    model: nn.Module, modules: list[nn.Module], compute: torch.dtype, device: torch.device, masters: bool = True
) -> None:
    """Read the weights that stand directly in `modules` into memory of their own on `device`, in their final dtype.

    What is frozen has the dtype of the computation, what is trained is float32 with `masters`. Weights that wait for it are
    quantised.
    """
    float32 = _kept_in_float32(model)
    for module in modules:
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
        for name, parameter in list(module.named_parameters(recurse=False)):
            old = parameter.data
            if isinstance(parameter, Params4bit) and not parameter.bnb_quantized:
                # vars() has the layer as well, which is told of the quantisation
                waiting: Any = Params4bit(old.to(device, compute), requires_grad=False, **vars(parameter))
                module._parameters[name] = waiting.to(device)
            elif parameter.is_floating_point() and not isinstance(parameter, Params4bit):
                whole = (parameter.requires_grad and masters) or id(parameter) in float32
                dtype = torch.float32 if whole else compute
                parameter.data = old.to(device, dtype, copy=True)
            else:
                continue
            release_pages(old)


def _kept_in_float32(model: nn.Module) -> set[int]:
    """Identities of parameters that the family computes in float32 whatever the rest is in; DeepSpeed has no such."""
    inner = unwrap_causal_lm(model)
    names = [] if strategy().startswith("zero") else list(inner._keep_in_fp32_modules_strict or [])
    pattern = re.compile("|".join(rf"(?:^|\.){re.escape(name)}(?:\.|$)" for name in names) or r"(?!)")
    return {id(parameter) for name, parameter in inner.named_parameters() if pattern.search(name)}


def _share_with_nobody(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    return lambda unit: None


def _share_by_zero3(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    import deepspeed

    plugin = accelerator.state.deepspeed_plugin
    assert plugin is not None
    settings = json.loads(json.dumps(plugin.deepspeed_config, default=str))
    zero = {key: value for key, value in settings["zero_optimization"].items() if value != "auto"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    config |= {key: settings[key] for key in ("bf16", "fp16") if key in settings}
    converted: list[Any] = []

    def share(unit: nn.Module) -> None:
        parameters = [parameter for parameter in unit.parameters() if not hasattr(parameter, "ds_id")]
        if converted:
            converted[0].convert_to_zero_parameters(param_list=parameters)
        elif parameters:
            deepspeed.zero.Init(module=unit, config_dict_or_path=config)
            converted.append(parameters[0])

    return share


def _share_by_fsdp2(accelerator: Accelerator, model: nn.Module) -> Callable[[nn.Module], None]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin: Any = accelerator.state.fsdp_plugin
    # Accelerate's policy rounds to bf16 what is returned, here the loss, and what is given, the tokens' weights, and it sums
    # gradients in bf16.
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    policy = replace(policy, output_dtype=None, cast_forward_inputs=False)
    if policy.param_dtype is not None:
        policy = replace(policy, reduce_dtype=torch.float32)

    def share(unit: nn.Module) -> None:
        # None leaves the outermost unit whole from the forward to the backward pass, where it is needed first.
        again = None if unit is model else plugin.reshard_after_forward
        fully_shard(unit, mp_policy=policy, offload_policy=plugin.cpu_offload, reshard_after_forward=again)

    return share
