"""Decides whether a model whose files hold quantized weights can be trained, and how."""

from typing import Any

import torch
from transformers import PreTrainedConfig

from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError

# Formats that transformers unpacks to 16 bits while it loads: DeepSeek's FP8, gpt-oss' MXFP4. Then any method trains them.
UNPACKED = ("fp8", "mxfp4")


def stored_quantization(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return how the weights in the files are quantized, as config.json says; None if they are not."""
    settings: Any = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(), "quantization_config", None)
    return settings if isinstance(settings, dict | None) else settings.to_dict()


def is_stored_in_4_bits(config: PreTrainedConfig) -> bool:
    """Return whether the files hold weights in bitsandbytes' 4-bit format."""
    settings = stored_quantization(config) or {}
    return settings.get("quant_method") == "bitsandbytes" and bool(settings.get("load_in_4bit"))


def unpack_when_loaded(config: PreTrainedConfig) -> None:
    """Let `from_pretrained` unpack weights in FP8 or MXFP4, which without this it does only where no kernel is."""
    settings = stored_quantization(config) or {}
    if settings.get("quant_method") in UNPACKED:
        config.quantization_config = settings | {"dequantize": True}  # type: ignore[attr-defined]


def check_stored_quantization(config: PreTrainedConfig, options: MethodOptions, sharded: torch.dtype | None) -> None:
    """Check that the method can train a model whose weights are stored as `config` says.

    `sharded` is the dtype of matrix products if the strategy shards the weights, else None.

    Raises:
        ConfigError: it cannot.
    """
    settings, name = stored_quantization(config), config._name_or_path
    if settings is None:
        return
    how = describe_quantization(settings)
    in_16_bits = "name the same model in 16 bits"
    if options.load_in_8bit:
        raise ConfigError(f"load_in_8bit: the weights of {name} are quantized already ({how}); {in_16_bits}.")
    if settings.get("quant_method") in UNPACKED:
        return
    if not is_stored_in_4_bits(config):
        raise ConfigError(
            f"model_name_or_path: the weights of {name} are quantized ({how}), and only bitsandbytes 4-bit, FP8 and "
            f"MXFP4 can be trained; {in_16_bits}, and set load_in_4bit: true to hold it in 4 bits."
        )
    if not options.has_adapter:
        raise ConfigError(
            f"method: {options.method} trains weights of the model itself, but those of {name} are quantized ({how}); "
            f"give a method with an adapter, such as lora, or {in_16_bits}."
        )
    storage = str(settings.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if sharded is not None and storage != str(sharded).removeprefix("torch."):
        raise ConfigError(
            f"model_name_or_path: {name} keeps its 4-bit weights as {storage} (bnb_4bit_quant_storage), but ZeRO-3 and "
            f"FSDP2 shard only {str(sharded).removeprefix('torch.')} here; {in_16_bits} with load_in_4bit, or use "
            "ddp.yaml or zero2.yaml."
        )


def describe_quantization(settings: dict[str, Any]) -> str:
    """Return the name of the format that `stored_quantization` returns."""
    method = str(settings.get("quant_method", "unknown"))
    if method == "bitsandbytes":
        return "bitsandbytes 4-bit" if settings.get("load_in_4bit") else "bitsandbytes 8-bit"
    return method.upper() if method in ("gptq", "awq", *UNPACKED) else method
