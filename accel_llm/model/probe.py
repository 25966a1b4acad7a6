"""Tests on the model itself, exactly as it will train: its rows are causal and isolated."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from accel_llm.data.batches import collate_packed, collate_padded, to_device
from accel_llm.errors import ConfigError
from accel_llm.model.attention import (
    PACKED_ATTENTION,
    REMEDY,
    forward_arguments,
    stock_attention,
    unwrap_causal_lm,
)
from accel_llm.model.balance import asks_for_balance
from accel_llm.model.classifier import has_scores, token_states
from accel_llm.model.virtual_tokens import count_virtual_tokens

# Relative differences of logits that rounding explains, by the dtype of the matrix products (int8: an 8-bit base).
# PACKED: a row of documents and a single one use different kernels, which sum in a different order.
# LEAK: changing one document should change nothing in the others. Only bitsandbytes' 8-bit products change: they treat
# a column separately if any token of the row is an outlier in it.
PACKED_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.int8: 1e-1}
LEAK_TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 2e-3, torch.int8: 5e-2}

# Lengths at which a model changes its behavior, by their names in configs, rotary scalings and modules.
BEHAVIOR_LENGTHS = ["sliding_window", "sliding_window_size", "attention_chunk_size", "floor_scale"]
BEHAVIOR_LENGTHS += ["log_scaling_n_floor", "keep_window_size", "index_topk"]
# LongRoPE, and the temperature of Ministral 3; other scalings read it only while the model is built.
SCALING_LENGTHS = ["original_max_position_embeddings"]
# `dynamic` scaling; other models read these only while they are built.
DYNAMIC_LENGTHS = ["max_position_embeddings", "original_max_seq_len", "max_seq_len_cached"]
# During the test they are 4 tokens, so documents of these lengths lie on both sides.
SHORT_LENGTH = 4
DOCUMENT_LENGTHS = (7, 12, 3)
# The tokens of a shared prompt and of its two answers: all longer than that, the answers on both sides, all shorter.
SHARED_LENGTHS = ((7, 6, 2), (2, 1, 5), (1, 2, 2))

# Fields by which a config lets tokens see later ones, and the values that do it.
SEES_LATER_TOKENS = [("use_bidirectional_attention", True), ("use_bidirectional_attention", "all")]
SEES_LATER_TOKENS += [("is_causal", False), ("is_decoder", False)]


@torch.no_grad()
def check_causality(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> None:
    """Test on the model that no token sees a later one: two rows that differ in their second half.

    An encoder, or a decoder whose config makes it see both ways, would read the tokens that it must predict. `dtype` is
    the dtype of the matrix products. Every rank runs the same forward, under transformers' own attention.

    Raises:
        ConfigError: a later token changes the logits of an earlier one.
    """
    inner, training = unwrap_causal_lm(model), model.training
    model.eval()
    half, size = 6, inner.config.get_text_config().vocab_size
    row = _random_documents(size, device, [2 * half])[0]
    rows = [
        row[None],
        torch.cat([row[:half], (row[half:] + 1) % size])[None],
    ]  # other tokens, not another order of them
    with stock_attention(model):  # one after the other: a mixture of all rows of a batch would be the same in each
        logits = [_logits(model, {"input_ids": r, "attention_mask": torch.ones_like(r)})[:, :half] for r in rows]
    model.train(training)

    # In a new model the leak may be smaller than rounding; but without one the same products are the same numbers.
    moved, remedy = _relative_distance(*([each] for each in logits)), _causal_remedy(inner.config)
    allowed = 0.0 if remedy else LEAK_TOLERANCE[dtype]
    if not moved <= allowed:  # so that NaN is an error too
        raise ConfigError(
            f"model_name_or_path: {type(inner).__name__} is not causal here: a later token changes the logits of "
            f"earlier ones by {moved:.1e} (relative; allowed is {allowed:.0g}), so training would show it the tokens "
            f"that it must predict; {remedy}name a causal language model."
        )


def _causal_remedy(config: PreTrainedConfig) -> str:
    """Return what to set in a config that lets tokens see later ones, or ""."""
    text = config.get_text_config(decoder=True)
    for field, value in SEES_LATER_TOKENS:
        if getattr(text, field, None) == value:
            return f'set "{field}": {str(not value).lower()} in its config.json, or '
    return ""


@torch.no_grad()
def check_isolation(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype,
    packed: bool = True,
    max_length: int | None = None,
) -> None:
    """Test on the model, exactly as it will train, that the documents of a packed row or a padded batch are isolated.

    Three documents together must give the same logits as each alone under transformers' own attention, and the logits
    of the others must not change when one does. Each length below `max_length` at which the model changes its behavior
    (a sliding window, the two sides of LongRoPE) is made so short that documents lie on both sides. `dtype` is the
    dtype of the matrix products (of autocast, if it is on). Every rank runs the same 5 forwards, so this also works
    where a forward is a collective.

    Raises:
        ConfigError: the batch changes the logits of a document.
    """
    inner, training = unwrap_causal_lm(model), model.training
    model.eval()

    # The first document changes at all places, the second one behind its first half.
    size = inner.config.get_text_config().vocab_size
    documents = _random_documents(size, device, DOCUMENT_LENGTHS)
    first, second, third = documents
    half = len(second) // 2
    replaced = [(first + 1) % size, torch.cat([second[:half], (second[half:] + 1) % size]), third]
    with narrow_lengths(model, max_length):
        with stock_attention(model):  # first, because a model may remember the longest input
            alone = [_logits(model, {"input_ids": document[None]})[0] for document in documents]
        together = _logits_together(model, documents, packed)
        changed = _logits_together(model, replaced, packed)
    model.train(training)

    option = "packing: true" if packed else "per_device_train_batch_size: more than one document in a batch"
    remedy = REMEDY if packed else "set per_device_train_batch_size: 1 and per_device_eval_batch_size: 1"
    where = f"{type(inner).__name__} with attention {inner.config._attn_implementation!r}"
    leak = _relative_distance([changed[1][:half], changed[2]], [together[1][:half], together[2]])
    if not leak <= LEAK_TOLERANCE[dtype]:
        raise ConfigError(
            f"{option} leaks in {where}: changing one document changes the logits of others in its "
            f"{'row' if packed else 'batch'} by {leak:.1e} (relative; allowed is {LEAK_TOLERANCE[dtype]:.0e}); {remedy}."
        )
    difference = _relative_distance(together, alone)
    if not difference <= PACKED_TOLERANCE[dtype]:
        kind = "packed" if packed else "padded"
        raise ConfigError(
            f"{option} changes the results of {where}: the logits of {kind} and of single documents differ by "
            f"{difference:.1e} (relative; allowed is {PACKED_TOLERANCE[dtype]:.0e}); {remedy}."
        )


@torch.no_grad()
def sharing_obstacle(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype, max_length: int | None = None
) -> str | None:
    """Return the reason why two answers cannot share a prompt that stands in a packed row once, or None.

    Tests on the model, exactly as it will train, that shared prompts and their answers have the logits that they have
    in documents of their own. Lengths at which the model changes its behavior are treated as in `check_isolation`:
    where an answer's length decides how its prompt is rotated (LongRoPE), the two answers need a prompt each. Every
    rank runs the same 2 forwards, or none.
    """
    inner, training = unwrap_causal_lm(model), model.training
    if inner.config._attn_implementation != PACKED_ATTENTION:
        return "the rows are padded"
    if count_virtual_tokens(model):
        return "each document begins with the virtual tokens of the method"
    if asks_for_balance(inner):
        return "output_router_logits asks for a balance loss, in which the tokens of the prompt would count once"

    model.eval()
    tokens = _random_documents(
        inner.config.get_text_config().vocab_size, device, [n for k in SHARED_LENGTHS for n in k]
    )
    shared = list(zip(tokens[::3], tokens[1::3], tokens[2::3], strict=True))
    documents = [torch.cat([prompt, answer]) for prompt, *answers in shared for answer in answers]
    with narrow_lengths(model, max_length):
        expected = _logits_together(model, documents, packed=True)
        logits = _logits_of_shared(model, shared)
    model.train(training)
    expected[1::2] = [each[len(prompt) :] for each, (prompt, _, _) in zip(expected[1::2], shared, strict=True)]
    difference = _relative_distance(logits, expected)
    if difference <= PACKED_TOLERANCE[dtype]:
        return None
    return (
        f"the logits of {type(inner).__name__} after a shared prompt and after one of their own differ by "
        f"{difference:.1e} (relative; allowed is {PACKED_TOLERANCE[dtype]:.0e})"
    )


def _logits_of_shared(
    model: nn.Module, shared: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """Return the logits of each prompt with its first answer, and of its second answer, all in one packed row."""
    parts, keys, start = [], [], 0
    for prompt, first, second in shared:
        parts += [torch.cat([prompt, first]), second]
        places, whole = torch.arange(start, start + len(prompt) + len(first) + len(second)), len(parts[-2])
        keys += [places[:whole], torch.cat([places[: len(prompt)], places[whole:]])]
        start += len(places)
    batch = collate_packed([(part.cpu().numpy(), part.cpu().numpy()) for part in parts])
    lengths = [len(each) for each in keys]
    positions = [torch.arange(n)[-len(part) :] for n, part in zip(lengths, parts, strict=True)]
    batch |= {
        "position_ids": torch.cat(positions)[None],
        "key_positions": torch.cat(keys),
        "key_lengths": lengths,
        "cu_seqlens_k": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen_k": max(lengths),
    }
    return list(_logits(model, forward_arguments(to_device(batch, parts[0].device)))[0].split(batch["lengths"]))


@contextmanager
def narrow_lengths(model: nn.Module, max_length: int | None = None) -> Iterator[None]:
    """Set the lengths at which the model changes its behavior to 4 tokens, if they are at most `max_length`.

    With their own values the small documents of a test could not reach them. ModernBERT's layers count the token itself
    in their window, its config does not: a length that is larger than another of its name by 1 becomes 5.
    """
    lengths = [item for item in behavior_lengths(model) if max_length is None or item[2] <= max_length]
    smallest: dict[str, int] = {}
    for _, name, value in lengths:
        smallest[name] = min(value, smallest.get(name, value))
    for holder, name, value in lengths:
        _assign(holder, name, SHORT_LENGTH + (value == smallest[name] + 1))
    try:
        yield
    finally:
        for holder, name, value in lengths:
            _assign(holder, name, value)


def behavior_lengths(model: nn.Module) -> list[tuple[Any, str, int]]:
    """Return each length at which the model changes its behavior: who holds it, its name and its value.

    Some families read them from the config at each forward, others from the attention module.
    """
    config = unwrap_causal_lm(model).config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    scalings = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    rope_types = {scaling.get("rope_type") for scaling in scalings}

    names = list(BEHAVIOR_LENGTHS)
    if "longrope" in rope_types or "llama_4_scaling_beta" in parameters:
        names += SCALING_LENGTHS
    if "dynamic" in rope_types:
        names += DYNAMIC_LENGTHS
    # ModernBERT's config computes its window from another field, and takes it back.
    computed = [name for name in names if getattr(getattr(type(config), name, None), "fset", None)]
    held = [(config, name, getattr(config, name)) for name in computed]
    held += [(holder, name, vars(holder).get(name)) for holder in (config, *model.modules()) for name in names]
    held += [(scaling, name, scaling.get(name)) for scaling in scalings for name in names]
    return [(holder, name, value) for holder, name, value in held if isinstance(value, int) and value > 0]


def _assign(holder: Any, name: str, value: int) -> None:
    if isinstance(holder, dict):
        holder[name] = value
    else:
        setattr(holder, name, value)


def _random_documents(vocab_size: int, device: torch.device | str, lengths: Iterable[int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocab_size, (length,), generator=generator).to(device) for length in lengths]


def _logits_together(model: nn.Module, documents: list[torch.Tensor], packed: bool) -> list[torch.Tensor]:
    """Return float32 [n, vocabulary] for each document of n tokens, computed in one packed row or padded batch."""
    virtual, device = count_virtual_tokens(model), documents[0].device
    rows = [(document.cpu().numpy(), document.cpu().numpy()) for document in documents]
    batch = collate_packed(rows, None, virtual) if packed else collate_padded(rows, 0, None, virtual)
    logits = _logits(model, forward_arguments(to_device(batch, device)))
    lengths = batch["lengths"]
    parts = logits[0].split(lengths) if packed else [row[:n] for row, n in zip(logits, lengths, strict=True)]
    return [part[virtual:] for part in parts]


def _logits(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return float32 [rows, tokens, vocabulary], without what PEFT's own forward puts before the rows.

    Of a model that gives scores it is what its head reads.
    """
    if has_scores(unwrap_causal_lm(model).config):
        return token_states(model, inputs).float()
    return model(**inputs, use_cache=False).logits[:, -inputs["input_ids"].shape[1] :].float()


def _relative_distance(logits: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Return the largest relative difference over the documents, without the mean, which softmax ignores."""
    return max(
        float((a - b).norm() / (b - b.mean(-1, keepdim=True)).norm()) for a, b in zip(logits, expected, strict=True)
    )
