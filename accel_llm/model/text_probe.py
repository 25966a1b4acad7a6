"""Tests on a model for sequence classification, exactly as it will train: its scores of a batch are those of each text."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from accel_llm.data.batches import Batch, join_documents, stack_documents, to_device
from accel_llm.errors import ConfigError
from accel_llm.model.attention import (
    PACKED_ATTENTION,
    REMEDY,
    enable_packing,
    packing_obstacle,
    stock_attention,
    unwrap_causal_lm,
)
from accel_llm.model.classifier import SCORE_TOLERANCE
from accel_llm.model.encoders import position_table, takes_segments, text_scores
from accel_llm.model.probe import LEAK_TOLERANCE, narrow_lengths

TEXT_LENGTHS = (12, 5, 9)
MOST_POSITIONS = 1024  # a packed row of the test is longer than a table of up to so many positions


def check_text_scores(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, max_length: int | None = None
) -> None:
    """Test on the model, as it will train, that its scores of a batch are those of each text alone; it may be wrapped.

    `dtype` is the dtype of the matrix products. Every rank runs the same 5 forwards under any backend. Call
    `attach_scores` before.

    Raises:
        ConfigError: they differ, or a text changes the scores of another one.
    """
    reason = _differences(model, device, dtype, max_length)
    if reason:
        packed = unwrap_causal_lm(model).config._attn_implementation == PACKED_ATTENTION
        remedy = REMEDY if packed else "set per_device_train_batch_size: 1 and per_device_eval_batch_size: 1"
        raise ConfigError(f"model_name_or_path: {reason}; {remedy}.")


def text_packing_obstacle(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, max_length: int | None = None
) -> str | None:
    """Return the reason why the texts of a packed row cannot be scored as if alone, or None; the model tells.

    The attention of the model stays as it is. Call `attach_scores` before.
    """
    if reason := packing_obstacle(model):
        return reason
    inner = unwrap_causal_lm(model)
    ours: Any = inner.config._attn_implementation
    enable_packing(model)
    try:
        return _differences(model, device, dtype, max_length)
    # Families that do not pass on the boundaries, or do not take the names; heads that want something else than states.
    except (ConfigError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"{type(inner).__name__} cannot compute a packed row ({' '.join(str(error).split())[:200]})"
    finally:
        inner.set_attn_implementation(ours)


@torch.no_grad()
def _differences(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, max_length: int | None
) -> str | None:
    """Return a sentence about the difference between texts in a batch and alone, or None."""
    inner, training = unwrap_causal_lm(model), model.training
    packed = inner.config._attn_implementation == PACKED_ATTENTION
    texts = _random_texts(inner, repeats=_repeats(inner) if packed else 1)
    changed = [_next_tokens(inner, texts[0]), *texts[1:]]
    model.eval()
    try:
        with narrow_lengths(model, max_length):
            with stock_attention(model):
                alone = torch.cat([_own_scores(model, _batch(inner, [ids], False, device)) for ids in texts[:3]])
            together = text_scores(model, _batch(inner, texts, packed, device))
            after = text_scores(model, _batch(inner, changed, packed, device))
    finally:
        model.train(training)
    kind, name = "packed row" if packed else "padded batch", type(inner).__name__
    leak = float((after[1:] - together[1:]).norm() / together[1:].norm())
    if not leak <= LEAK_TOLERANCE[dtype]:  # so that NaN is an error too
        return (
            f"in a {kind} of {name} one text changes the scores of the others by {leak:.1e} (relative; allowed is "
            f"{LEAK_TOLERANCE[dtype]:.0e})"
        )
    alone = alone.repeat(len(texts) // 3, 1)
    difference = float((together - alone).norm() / alone.norm())
    if not difference <= SCORE_TOLERANCE[dtype]:
        return (
            f"the scores of texts in a {kind} of {name} and alone differ by {difference:.1e} (relative; allowed is "
            f"{SCORE_TOLERANCE[dtype]:.0e})"
        )
    return None


def _own_scores(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the scores of one text by the family's own forward, which `attach_scores` has left as it is."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: batch[name] for name in names if name in batch}).logits.float()


def _repeats(model: PreTrainedModel) -> int:
    """Return how often the texts stand in the row, so that it is longer than the model has positions."""
    table = position_table(model)
    positions = 0 if table is None else table.num_embeddings
    return 1 + positions // sum(TEXT_LENGTHS) if positions <= MOST_POSITIONS else 1


def _random_texts(model: PreTrainedModel, repeats: int) -> list[torch.Tensor]:
    """Return texts of random tokens, none of them special but the last: some heads read the state of the end token."""
    generator = torch.Generator().manual_seed(0)
    tokens = _plain_tokens(model)
    texts = [tokens[torch.randint(len(tokens), (n,), generator=generator)] for n in TEXT_LENGTHS]
    config = model.config.get_text_config()
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and end != config.pad_token_id:  # decoders take the score before pad tokens
        for ids in texts:
            ids[-1] = end
    return texts * repeats


def _next_tokens(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return other tokens in place of all but the last one."""
    tokens = _plain_tokens(model)
    places = torch.searchsorted(tokens, ids[:-1])
    return torch.cat([tokens[(places + 1) % len(tokens)], ids[-1:]])


def _plain_tokens(model: PreTrainedModel) -> torch.Tensor:
    config = model.config.get_text_config()
    names = ("pad", "bos", "eos", "cls", "sep", "mask", "unk")
    special = {getattr(config, f"{name}_token_id", None) for name in names}
    return torch.tensor([k for k in range(config.vocab_size) if k not in special])


def _batch(model: PreTrainedModel, texts: list[torch.Tensor], packed: bool, device: torch.device | str) -> Batch:
    """Return a batch as `collate_texts` makes it; the second half of each text is a second segment, if there are two."""
    documents, lengths = [ids.numpy() for ids in texts], torch.tensor([len(ids) for ids in texts])
    batch = join_documents(documents) if packed else stack_documents(documents, model.config.pad_token_id or 0)
    starts = lengths.cumsum(0) - lengths if packed else torch.arange(len(texts)) * batch["input_ids"].shape[1]
    batch |= {"first_positions": starts, "last_positions": starts + lengths - 1}
    if (getattr(model.config, "type_vocab_size", None) or 0) > 1 and takes_segments(model):
        segments = torch.zeros_like(batch["input_ids"])
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            segments.view(-1)[start + length // 2 : start + length] = 1
        batch["token_type_ids"] = segments
    return to_device(batch, device)
