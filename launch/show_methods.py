"""See every training method on the shape of a 7B model: what it trains, what it costs, what it is good for.

    python launch/show_methods.py
    python launch/show_methods.py --methods lora ia3 prefix --json

No weight is read or made. Each method is attached with its default options to Llama-2-7B without data, and one step is
followed, as a training script estimates its memory: bf16, a row of 2,048 tokens, activations recomputed, one GPU.
Whether a method can be merged is tried on a tiny model.
"""

import json
import sys
from typing import Any

import accel_llm.system.chatter

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.described import METHOD_DESCRIPTIONS, MethodDescription
from accel_llm.adapters.methods import REFUSED_METHODS, check_method, peft_methods
from accel_llm.config.command_line import parse_options
from accel_llm.config.options import METHODS_WITHOUT_ADAPTER, SftOptions
from accel_llm.config.tool_options import MethodsOptions
from accel_llm.errors import ConfigError
from accel_llm.system.exit import run_script
from accel_llm.training.memory_estimate import GB, estimate_memory

LLAMA_2_7B = LlamaConfig(
    vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
)
TINY = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32
)


def main() -> None:
    options = parse_options(MethodsOptions)
    known = [*METHODS_WITHOUT_ADAPTER, *peft_methods()]
