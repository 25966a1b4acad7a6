"""Says, before any weight is read, how much of a model a quantized method really holds in 4 or 8 bits."""

import functools

import torch
from transformers import PreTrainedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from accel_llm.backend.strategy import strategy
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError
from accel_llm.model.experts import expert_weights
from accel_llm.model.language_part import causal_lm_class, causal_lm_loader
from accel_llm.model.quantization import quantized_weights
from accel_llm.model.stored_quantization import is_stored_in_4_bits
from accel_llm.system.launcher import process_rank

# Share of the weights, without embedding and head, that may stay in 16 bits: norms, routers, small adapters of a family.
ALLOWED_SHARE = 0.2


def check_quantized_share(config: PreTrainedConfig, options: MethodOptions) -> None:
    """Print which share of the weights stays in 16 bits with `load_in_4bit` (method qlora) or `load_in_8bit`, and refuse a large one.

    The model is built on the meta device, without weights.

    Raises:
        ConfigError: most of what should be quantized would not be, or the strategy cannot shard it.
    """
    quantizes = options.in_4_bits or options.load_in_8bit
    if not quantizes or causal_lm_class(config) is None:  # without a class it is code that comes with the model
        return
    unset_hf_deepspeed_config()  # otherwise transformers shards it under ZeRO-3, for which it needs weights
    with torch.device("meta"):
        model = causal_lm_loader(config).from_config(config)
    experts = {name for name, _, _ in expert_weights(model)}
    option, bits = ("load_in_8bit", 8) if options.load_in_8bit else ("load_in_4bit", 4)
    if options.method == "qlora":
        option = "method: qlora"
    if experts and bits == 4 and strategy() == "zero3":
        raise ConfigError(
            f"{option}: the experts of a mixture would be held in 4 bits, which ZeRO-3 cannot gather; use fsdp2.yaml, "
            "zero2.yaml or ddp.yaml, or 16 bits."
        )

    # Only 4 bits, on weights that we quantize ourselves, reaches the experts.
    quantized = quantized_weights(model).keys() - (experts if bits == 8 or is_stored_in_4_bits(config) else set())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    other = {parameter for module in ends for parameter in module.parameters()}
    left = {name: sizes[name] for name, parameter in model.named_parameters() if name not in quantized}
    body_left = {name: size for name, size in left.items() if model.get_parameter(name) not in other}
    body = sum(sizes.values()) - (sum(left.values()) - sum(body_left.values()))
    share, largest = sum(body_left.values()) / body, max(body_left, key=lambda name: body_left[name], default="")
    if share > ALLOWED_SHARE:
        raise ConfigError(
            f"{option}: {share:.0%} of the weights between embedding and head would stay in 16 bits "
            f"({_size_in_16_bits(sum(body_left.values()))}), such as {largest}; {_remedy(bits, config)}."
        )
    total = sum(sizes.values())
    _say_once(
        f"{bits}-bit weights: {1 - sum(left.values()) / total:.1%} of {total:,}; the others (embedding, head, norms, "
        f"routers) take {_size_in_16_bits(sum(left.values()))} in 16 bits"
    )


@functools.cache  # the config is read again for each plan
def _say_once(text: str) -> None:
    if process_rank() == 0:
        print(text, flush=True)


def _size_in_16_bits(count: int) -> str:
    return f"{2 * count / 1e9:.2g} GB" if count >= 5e7 else f"{2 * count / 1e6:.2g} MB"


def _remedy(bits: int, config: PreTrainedConfig) -> str:
    if is_stored_in_4_bits(config):
        return "name the same model in 16 bits, and load_in_4bit quantizes them too"
    return "use load_in_4bit, which quantizes experts too" if bits == 8 else "use 16 bits, sharded by fsdp2.yaml"
