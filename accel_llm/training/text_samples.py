"""Texts that the model continues during a pretraining: the same beginnings again and again, to see what it has learned."""

from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedTokenizerFast

from accel_llm.backend.accelerator import unwrap_model
from accel_llm.backend.strategy import strategy
from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.config.options import TrainOptions
from accel_llm.config.sample_options import SampleOptions
from accel_llm.model.attention import stock_attention, unwrap_causal_lm
from accel_llm.model.evaluating import evaluating
from accel_llm.model.generation import cut_at_stop, pad_left, without_own_settings
from accel_llm.model.positions import positions_for_tokens
from accel_llm.model.tokenizer import pad_token_id

SHARDED = ("zero3", "fsdp2")


def samples_are_due(options: TrainOptions, step: int) -> bool:
    """Return whether texts are continued after `step`."""
    return isinstance(options, SampleOptions) and bool(options.sample_text) and step % (options.sample_steps or 1) == 0


def continue_texts(
    accelerator: Accelerator, model: Any, tokenizer: PreTrainedTokenizerFast, options: TrainOptions, stop_ids: list[int]
) -> list[dict[str, Any]]:
    """Continue the texts of `sample_text` greedily; return `prompt` and `generated` of each.

    All processes must call it, and all get the same texts, if they hold the same weights. No random number is drawn. A
    beginning that leaves the model's positions no room loses its first tokens.
    """
    assert isinstance(options, SampleOptions)
    inner = unwrap_model(accelerator, model)
    causal_lm, pad = unwrap_causal_lm(inner), pad_token_id(tokenizer)
    limit = positions_for_tokens(causal_lm) or 2**31
    new_tokens = min(options.sample_tokens, limit - 1)
    # An empty beginning is that of a text: the token before its first one.
    start = [tokenizer.bos_token_id, *stop_ids, 0]
    first = next(token for token in start if isinstance(token, int))
    prompts = [np.array(_prompt_ids(tokenizer, text) or [first])[new_tokens - limit :] for text in options.sample_text]
    settings = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad
    )  # fmt: skip
    samples = []
    # As in `exact_match` (evaluation.py). One text at a time, so that none depends on the others.
    with evaluating(inner), accelerator.autocast(), stock_attention(inner), without_own_settings(causal_lm):
        for text, prompt in zip(options.sample_text, prompts, strict=True):
            inputs = pad_left([prompt], pad, accelerator.device)
            output = inner.generate(**inputs, generation_config=settings, synced_gpus=strategy() in SHARDED)
            ids, _ = cut_at_stop(output[0, len(prompt) :].tolist(), stop_ids)
            # Alone, the first word would lose the space before it.
            before, whole = (decode_tokens(tokenizer, part) for part in (prompt.tolist(), [*prompt.tolist(), *ids]))
            generated = whole.removeprefix(before) if whole.startswith(before) else decode_tokens(tokenizer, ids)
            samples.append({"prompt": text, "generated": generated})
    return samples


def _prompt_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the ids of a beginning, without an end token that the tokenizer adds itself."""
    ids = tokenizer.encode(text)
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token)) else ids
