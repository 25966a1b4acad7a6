"""What a run leaves for others to use: adapter/ or model/, with tokenizer, chat template and generation config."""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.adapters import attach as adapter
from accel_llm.backend.accelerator import bare, gather_state
from accel_llm.data.stream import Start
from accel_llm.model.attention import causal_lm
from accel_llm.model.loading import saveable


def stop_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, turn_end_id: int | None) -> list[int]:
    """The tokens that end generation: the end of a turn first, then what the model's own config and tokenizer name."""
    named = getattr(causal_lm(model).generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return list(
        dict.fromkeys(token for token in (turn_end_id, *listed, tokenizer.eos_token_id) if isinstance(token, int))
    )


def generation_config(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop: list[int]) -> GenerationConfig:
    """The generation config to save: the model's own, ending at `stop`."""
    settings = saveable(model.generation_config)
    settings.eos_token_id = stop[0] if len(stop) == 1 else stop or None
    settings.pad_token_id = tokenizer.pad_token_id
    return settings


def export(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    stop: list[int],
    base: str,
    dtype: torch.dtype,
    start: Start,
) -> Path:
    """Write adapter/ or model/ in the run's folder; it appears whole by one rename. A collective.

    Full weights are written in `dtype`, the one the base was stored in; adapters in float32, with the name of `base` and
    its fingerprint.
    """
    inner = bare(accelerator, model)
    peft = hasattr(inner, "peft_config")
    folder = start.output_dir / ("adapter" if peft else "model")
    state = gather_state(accelerator, model, trainable_only=peft)
    if accelerator.is_main_process:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if peft:
            adapter.save(inner, partial, state, base, start.identity["base"])
        else:
            _save_whole(causal_lm(inner), partial, state, dtype)
        generation_config(causal_lm(inner), tokenizer, stop).save_pretrained(str(partial))
        tokenizer.save_pretrained(str(partial))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()
    return folder


def _save_whole(model: PreTrainedModel, folder: Path, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    # What is part of a model without being trained, such as DeepSeek-V3's expert biases.
    state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()}
    model.save_pretrained(str(folder), state_dict=state)
    # transformers 5.23 writes the dtype that the model trains in, float32, and would load what was just written so.
    model.config.dtype = dtype
    model.config.save_pretrained(str(folder))
