"""What each method trains and costs on the shape of Llama-2-7B, whether it can be merged, and on which bases it works.

Nothing is measured on a GPU. A method is attached with its default options to a model without data, and a step is
followed as for the estimate of a run (memory_estimate.py): bf16, one row of 2,048 tokens, activations recomputed, one
GPU. All methods together take minutes, so the figures are recorded in method_facts.json, and a test counts some anew.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import accel_llm.system.chatter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.adapters.methods import check_method, peft_methods
from accel_llm.adapters.refusals import check_quantized_base
from accel_llm.config.method import METHODS_WITHOUT_ADAPTER
from accel_llm.config.options import SftOptions
from accel_llm.demo.files import DEMO_BASE
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.loading import configure_for_training
from accel_llm.system.quiet import quietly
from accel_llm.training.memory_estimate import estimate_memory

FACTS_FILE = Path(__file__).with_name("method_facts.json")
LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
WEIGHTS = 6_738_415_616  # of Llama-2-7B
TINY = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
# Options without which a method has nothing to train.
NEEDED: dict[str, Any] = {"trainable_tokens": {"method_options": {"token_indices": [1, 2, 3, 4]}}}


class MethodFacts(NamedTuple):
    """Facts of a method: its trained weights, their share, bytes of the GPU, what it works with; or why it is refused."""

    refused: str = ""
    trained: int = 0
    share: float = 0.0
    memory: int = 0
    packed: bool = False
    mergeable: bool = False
    four_bit: bool = False
    eight_bit: bool = False


def all_methods() -> list[str]:
    """Return the names of all methods, those that are refused too."""
    return [*METHODS_WITHOUT_ADAPTER, *peft_methods()]


def recorded_facts() -> dict[str, MethodFacts]:
    """Return the recorded facts by method."""
    recorded = json.loads(FACTS_FILE.read_text(encoding="utf-8"))
    return {name: MethodFacts(**facts) for name, facts in recorded.items()}


def find_facts(method: str) -> MethodFacts:
    """Count and try a method, which takes seconds."""
    with quietly():
        try:
            options = _default_options(method)
            memory, trained = _follow(options)
        except ConfigError as error:
            return MethodFacts(refused=str(error).removeprefix("method: "))
        return MethodFacts(
            trained=trained,
            share=trained / WEIGHTS,
            memory=memory,
            packed=bool(options.packing),
            mergeable=_can_be_merged(options),
            four_bit=_is_allowed(method, load_in_4bit=True),
            eight_bit=_is_allowed(method, load_in_8bit=True),
        )


def _default_options(method: str, **others: Any) -> Any:
    values: dict[str, Any] = {"method": method, "precision": "bf16", "max_length": 2048, "gradient_checkpointing": True}
    options = SftOptions(**values | NEEDED.get(method, {}) | others, model_name_or_path=str(DEMO_BASE))
    raise_problems(options.problems())
    options = fill_method_options(options)
    check_method(options)
    check_quantized_base(options, LLAMA_2_7B)
    return options


def _follow(options: Any) -> tuple[int, int]:
    """Return the bytes of the GPU, 0 if they cannot be known without data, and the number of trained weights.

    Raises:
        ConfigError: the method does not fit the model.
    """
    try:
        estimate = estimate_memory(options, LLAMA_2_7B, 1)
        return estimate.total, estimate.trainable
    except (RuntimeError, NotImplementedError, ConfigError) as error:
        if isinstance(error, ConfigError) and "Cannot copy out of meta tensor" not in str(error):
            raise
        # PEFT reads values when it attaches the method. Weights that nobody has written take no memory.
        one, two = (_count(options, layers) for layers in (1, 2))
        return 0, one + (LLAMA_2_7B.num_hidden_layers - 1) * (two - one)


def _count(options: Any, layers: int) -> int:
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig.from_dict(LLAMA_2_7B.to_dict() | {"num_hidden_layers": layers}))
    wrapped = attach_adapter(model.bfloat16().to_empty(device="cpu"), options)
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def _can_be_merged(options: Any) -> bool:
    """Ask PEFT, on a tiny model."""
    if not options.has_adapter:
        return False
    with torch.random.fork_rng(devices=[]):
        model: Any = attach_adapter(configure_for_training(LlamaForCausalLM(TINY), options), options)
    try:
        model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError):
        return False
    return True


def _is_allowed(method: str, **base: bool) -> bool:
    try:
        return _default_options(method, **base).has_adapter
    except ConfigError:
        return False
