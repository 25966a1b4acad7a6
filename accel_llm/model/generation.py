"""Generation: where an answer stops, how prompts are padded, and the generation config that is saved."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.model.attention import unwrap_causal_lm
from accel_llm.model.loading import short_reason

SAMPLING_VALUES = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def saveable_generation_config(settings: GenerationConfig | None) -> GenerationConfig:
    """Return a copy of `settings` that transformers can save.

    If the model does not sample, its sampling values are removed. Many published models have such values: transformers
    5.23 loads them, but raises an error when a changed copy is saved.
    """
    copy = GenerationConfig.from_dict(settings.to_dict() if settings else {})
    if not copy.do_sample:
        for name in SAMPLING_VALUES:
            setattr(copy, name, None)
    return copy


@contextmanager
def without_own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, `generate` does what the config that it is given says, and nothing else.

    transformers 5.24 takes each setting that is not given from the model's own generation config: a greedy search would
    have the repetition penalty of Qwen2.5, for example.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def cut_at_stop(ids: list[int], stop_ids: list[int]) -> tuple[list[int], bool]:
    """Return the ids up to and including the first stop token, and whether there was one."""
    end = next((k for k, token in enumerate(ids) if token in stop_ids), None)
    return (ids, False) if end is None else (ids[: end + 1], True)


def pad_left(prompts: list[np.ndarray], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Stack prompts (ids [n]) to `input_ids` and `attention_mask`, int64 [prompts, longest], padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for k, prompt in enumerate(prompts):
        input_ids[k, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[k, width - len(prompt) :] = 1
    return {"input_ids": input_ids.to(device), "attention_mask": mask.to(device)}


def stop_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, turn_end_id: int | None) -> list[int]:
    """Return the tokens that end generation: the end of a turn, then the model's own, then the tokenizer's."""
    eos_token_id = getattr(unwrap_causal_lm(model).generation_config, "eos_token_id", None)
    model_ids = eos_token_id if isinstance(eos_token_id, list) else [eos_token_id]
    candidates = (turn_end_id, *model_ids, tokenizer.eos_token_id)
    # A dict drops repeated ids and keeps the order.
    return list(dict.fromkeys(token for token in candidates if isinstance(token, int)))


def build_generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop: list[int]
) -> GenerationConfig:
    """Return the generation config to save: the model's own, with the stop tokens `stop`.

    transformers refuses to save settings that contradict one another, which it loads. Of such a config only the tokens
    are kept, and this is said.
    """
    own: Any = model.generation_config
    tokens = {"eos_token_id": stop[0] if len(stop) == 1 else stop or None, "pad_token_id": tokenizer.pad_token_id}
    try:
        settings = saveable_generation_config(own)
        settings.update(**tokens)
        settings.validate(strict=True)
    except ValueError as error:
        names = ", ".join(re.findall(r"^- `(\w+)`", str(error), re.MULTILINE)) or short_reason(error)
        print(f"generation_config.json of the export holds only token ids: the model's own is not valid ({names})")
        settings = GenerationConfig(bos_token_id=own.bos_token_id, **tokens)
    return settings
