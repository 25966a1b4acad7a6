"""Where an answer stops, and the generation config that is saved."""

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.model.attention import unwrap_causal_lm

SAMPLING_VALUES = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def saveable_generation_config(settings: GenerationConfig | None) -> GenerationConfig:
    """A copy that can be saved: without the sampling values of a model that says it does not sample.

    Many published models hold such values. transformers 5 loads them, and raises when a changed copy is saved.
    """
    copy = GenerationConfig.from_dict(settings.to_dict() if settings else {})
    if not copy.do_sample:
        for name in SAMPLING_VALUES:
            setattr(copy, name, None)
    return copy


def cut_at_stop(ids: list[int], stop_ids: list[int]) -> tuple[list[int], bool]:
    end = next((k for k, token in enumerate(ids) if token in stop_ids), None)
    return (ids, False) if end is None else (ids[: end + 1], True)


def pad_left(prompts: list[np.ndarray], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for k, prompt in enumerate(prompts):
        input_ids[k, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[k, width - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, turn_end_id: int | None) -> list[int]:
    """The tokens that end generation: the end of a turn first, then what the model's own config and tokenizer name."""
    named = getattr(unwrap_causal_lm(model).generation_config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return list(
        dict.fromkeys(token for token in (turn_end_id, *listed, tokenizer.eos_token_id) if isinstance(token, int))
    )


def build_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop: list[int]
) -> GenerationConfig:
    """The generation config to save: the model's own, ending at `stop`."""
    settings = saveable_generation_config(model.generation_config)
    settings.eos_token_id = stop[0] if len(stop) == 1 else stop or None
    settings.pad_token_id = tokenizer.pad_token_id
    return settings
