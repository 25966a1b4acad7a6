"""What a method cannot do under a launch YAML or on a quantized base, said before a model is loaded.

The list holds only exceptions: a method that is not in it works under every launch YAML, as tests/proofs/backends.py
shows. tests/adapters/test_refusals.py shows that each failure is still there.
"""

from typing import NamedTuple

from transformers import PreTrainedConfig

from accel_llm.adapters.quantized_base import problem_on_quantized_base
from accel_llm.backend.strategy import strategy
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError
from accel_llm.model.stored_quantization import is_stored_in_4_bits


class Refusal(NamedTuple):
    """A method that cannot run under some strategies, and why; `remedy` are launch YAMLs under which it can.

    `only_in_4_bits`: with a base in 16 bits it can.
    """

    method: str
    strategies: tuple[str, ...]
    reason: str
    remedy: str
    only_in_4_bits: bool = False


REFUSALS = (
    Refusal(
        "osf",
        ("fsdp2",),
        "PEFT projects its gradients in hooks of its parameters, and FSDP2 puts shards in their place, which have none",
        "ddp.yaml, zero2.yaml or zero3.yaml",
    ),
    Refusal(
        "adalora",
        ("zero1", "zero2", "zero3"),
        "it measures how important each rank is from weights and gradients, and DeepSpeed steps flat pieces of them",
        "ddp.yaml or fsdp2.yaml",
    ),
    Refusal(
        "shira",
        ("fsdp2",),
        "PEFT unpacks the 4-bit weights with scales that it looks for at the weights, and FSDP2 puts shards in their place",
        "ddp.yaml, zero2.yaml or zero3.yaml, or leave load_in_4bit out",
        only_in_4_bits=True,
    ),
)


def backend_problems(options: MethodOptions) -> list[str]:
    """Return a sentence if the method cannot run under the strategy of the launch YAML."""
    return [
        f"method: {method} cannot run under {strategy()}: {reason}; use {remedy}."
        for method, strategies, reason, remedy, only_in_4_bits in REFUSALS
        if method == options.method and strategy() in strategies and (options.in_4_bits or not only_in_4_bits)
    ]


def check_quantized_base(options: MethodOptions, config: PreTrainedConfig) -> None:
    """Check that the method can train on the base, if the base is in 4 or 8 bits.

    Raises:
        ConfigError: it cannot.
    """
    stored = is_stored_in_4_bits(config)
    if not options.has_adapter or not (options.in_4_bits or options.load_in_8bit or stored):
        return
    if reason := problem_on_quantized_base(options, stored):
        bits, option = (8, "load_in_8bit") if options.load_in_8bit else (4, "load_in_4bit")
        field, remedy = (option, f"leave {option} out")
        if stored:
            field, remedy = "model_name_or_path", "name the same model in 16 bits"
        raise ConfigError(
            f"{field}: method {options.method} cannot be trained on a base in {bits} bits: {reason}; {remedy}, or use "
            "method lora."
        )
