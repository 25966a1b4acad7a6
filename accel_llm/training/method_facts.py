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
from accel_llm.config.options import METHODS_WITHOUT_ADAPTER, SftOptions
from accel_llm.errors import ConfigError
from accel_llm.training.memory_estimate import estimate_memory

RECORDED = Path(__file__).with_name("method_facts.json")
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
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    return {name: MethodFacts(**facts) for name, facts in recorded.items()}


def find_facts(method: str) -> MethodFacts:
    """Count and try a method, which takes seconds."""
    try:
        estimate = estimate_memory(_default_options(method), LLAMA_2_7B, 1)
    except ConfigError as error:
        return MethodFacts(refused=str(error).removeprefix("method: "))
    return MethodFacts(
        trained=estimate.trainable,
        share=estimate.trainable / WEIGHTS,
        memory=estimate.total,
        packed=bool(_default_options(method).packing),
        mergeable=_can_be_merged(_default_options(method)),
        four_bit=_is_allowed(method, load_in_4bit=True),
        eight_bit=_is_allowed(method, load_in_8bit=True),
    )


def _default_options(method: str, **others: Any) -> Any:
    values: dict[str, Any] = {"method": method, "precision": "bf16", "max_length": 2048, "gradient_checkpointing": True}
    options = SftOptions(**values | NEEDED.get(method, {}) | others)
    options = fill_method_options(options)
    check_method(options)
    return options


def _can_be_merged(options: Any) -> bool:
    """Ask PEFT, on a tiny model."""
    if not options.has_adapter:
        return False
    with torch.random.fork_rng(devices=[]):
        model: Any = attach_adapter(LlamaForCausalLM(TINY), options)
    try:
        model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError):
        return False
    return True


def _is_allowed(method: str, **base: bool) -> bool:
    try:
        _default_options(method, **base)
    except ConfigError:
        return False
    return True
