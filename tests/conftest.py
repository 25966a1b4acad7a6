"""Fixtures of several test files: tokenizers, tiny models in memory and on disk, chat files, scripts in this process."""

import os

# One thread computes tiny tensors faster, above all if two pytest processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import importlib.util
import json
import string
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accel_llm.config.early  # here, where no script runs; in one it may end the process

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from support import ROOT, SPECIAL, character_tokenizer, reset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.scripts import TRAINING_SCRIPTS
from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def no_product_without_a_gradient(monkeypatch) -> None:
    """Fail a test in which a 4-bit layer is repacked for the product of bitsandbytes that has no backward pass.

    bitsandbytes 0.50.2 does that in eval mode on a CPU with AVX512-BF16; each test believes that its CPU is such a one.
    """

    def repacked(*_: object) -> None:
        raise AssertionError("a 4-bit layer was repacked")

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    monkeypatch.setattr("bitsandbytes.nn.modules._convert_weight_packed_for_cpu", repacked)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """Accelerate's state is global to the process, so each test starts and ends with a clean state."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    def build(seed: int = 0, **sizes: Any) -> LlamaForCausalLM:
        """Build a float32 model with random weights so large that every visible token changes the logits."""
        torch.manual_seed(seed)
        defaults = {
            "vocab_size": len(SPECIAL) + len(string.printable),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        model = LlamaForCausalLM(LlamaConfig(**{**defaults, **sizes}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Path]:
    """Write a two-layer Llama of the given dtype with the demo's tokenizer: the same weights for the same config."""

    def make(folder: Path, dtype: torch.dtype = torch.float32, **config) -> Path:
        tokenizer = build_demo_tokenizer()
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model, tmp_path_factory) -> Path:
    """The folder of a float32 model that tests must not change."""
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """24 short conversations of the demo's generator."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = demo_conversations("train")[:24]
    path.write_text("".join(json.dumps({"messages": row["messages"]}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def quiet() -> None:
    """Silence the libraries' own warnings, as every script does."""
    quiet_libraries()


@pytest.fixture
def script(monkeypatch, tmp_path_factory) -> Callable[..., None]:
    """`script("sft", "--max_steps", 3)` runs the main function of launch/sft.py in this process; errors are raised."""
    cache = tmp_path_factory.getbasetemp() / "encoded"

    def call(name: str, *arguments: object) -> None:
        path = ROOT / "launch" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"launch_{name}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        argv = [str(path), *map(str, arguments)]
        if name in ("sft", "show_data", "pretrain"):
            argv += ["--cache_dir", str(cache)]
        if (
            name in TRAINING_SCRIPTS and "--preflight" not in argv
        ):  # two seconds a run; runs as a user starts them have it
            argv += ["--preflight", "false"]
        monkeypatch.setattr(sys, "argv", argv)
        reset()
        try:
            spec.loader.exec_module(module)
            module.main()
        finally:
            reset()

    return call


@pytest.fixture
def sft_errors(script, tiny, chats, tmp_path) -> Callable[..., list[str]]:
    """`sft_errors(*options)` runs sft.py and returns its error messages. A later option overrides an earlier one."""
    out = tmp_path / "out"

    def run(*more: object, rows: str | None = None, name: str = "rows.jsonl") -> list[str]:
        files = chats
        if rows is not None:
            files = tmp_path / name
            files.write_text(rows, encoding="utf-8")
        words = ("--model_name_or_path", tiny, "--train_files", files, "--max_length", 128, "--output_dir", out)
        with pytest.raises((ConfigError, DataError)) as error:
            script("sft", *words, "--max_steps", 1, *more)
        assert not out.exists()
        sentences = str(error.value).splitlines()
        assert all(len(sentence) < 600 for sentence in sentences)
        return sentences

    return run
