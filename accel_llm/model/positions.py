"""Positions: how many a model has, and rotary embeddings that depend on a document's length."""

import functools
import inspect
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from accel_llm.data.batches import start_copy
from accel_llm.model.virtual_tokens import count_virtual_tokens

# Fields that hold the number of positions, in the names of the model families.
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
# RoBERTa and the families that grew from it count positions from `pad_token_id` + 1; the rows before stay unused.
PADDED_POSITIONS = {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm"}
PADDED_POSITIONS |= {"xlm-roberta", "xlm-roberta-xl", "xmod"}


def position_limit(config: PreTrainedConfig) -> int | None:
    """Return the number of positions that a model can be used with, or None if its config sets no limit.

    Learned positions end there: a longer input is an IndexError. Rotary positions go on without an error, but beyond
    the limit the model was never meant to work. A scaling of rotary positions counts:

    - `llama3` and `longrope` (Llama 3.1, Phi-3 128k) write the scaled number in `max_position_embeddings`.
    - `linear` and `dynamic` write the unscaled one: it is multiplied by `factor`, as transformers reads it.
    - `yarn` names the unscaled one in `original_max_position_embeddings`. The limit is `factor` times it, or
      `max_position_embeddings` if that is more (Qwen2.5 has 32768 in both; DeepSeek and gpt-oss have the product).

    If kinds of layers have scalings of their own (Gemma 3), `max_position_embeddings` holds for the whole model.
    """
    text = config.get_text_config(decoder=True)
    values = (getattr(text, field, None) for field in POSITION_FIELDS)
    limit = next((value for value in values if isinstance(value, int) and value > 0), None)
    if limit is None:
        return None
    if text.model_type in PADDED_POSITIONS:
        return limit - (text.pad_token_id or 0) - 1
    scaling = getattr(text, "rope_parameters", None) or {}
    factor = scaling.get("factor") or 1
    if scaling.get("rope_type") in ("linear", "dynamic"):
        return int(limit * factor)
    if scaling.get("rope_type") == "yarn":
        return max(limit, int(scaling["original_max_position_embeddings"] * factor))
    return limit


def positions_for_tokens(model: PreTrainedModel) -> int | None:
    """Return the `position_limit` of a model, less the positions that virtual tokens take."""
    limit = position_limit(model.config)
    return limit and limit - count_virtual_tokens(model)


def scale_by_document(model: PreTrainedModel) -> None:
    """Let rotary embeddings that depend on the input's length read the length of each document, not of the batch.

    LongRoPE (`longrope`: Phi-3, MiniCPM) has one set of frequencies for short documents and one for long ones; the
    frequencies of `dynamic` NTK follow the length. transformers 5.24 chooses by the largest position of the whole batch,
    and `dynamic` remembers the longest input so far. Afterwards each document is computed as if it were the first input
    of a new model, in packed rows, padded rows and generation. Other models are not changed.
    """
    rotaries = [module for module in model.modules() if _rope_types(module) & {"longrope", "dynamic"}]
    for module in rotaries:
        module.forward = MethodType(functools.wraps(type(module).forward)(_rotate_by_document), module)
    if rotaries:
        model.register_forward_pre_hook(_add_position_ids, with_kwargs=True)


def _rope_types(module: nn.Module) -> set[str | None]:
    """Return the kinds of scaling of a rotary embedding: one, or one for each kind of layer."""
    rope_type: Any = getattr(module, "rope_type", None)
    return set(rope_type.values()) if isinstance(rope_type, dict) else {rope_type}


def _add_position_ids(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give a padded batch positions that end with each row's document: without them all rows look equally long."""
    mask, inputs = kwargs.get("attention_mask"), kwargs.get("input_ids")
    inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
    if mask is not None and mask.ndim == 2 and inputs is not None and kwargs.get("position_ids") is None:
        # Behind cached tokens the mask is longer than the input. Padding on the right repeats the last position.
        positions: Any = (mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
        positions.lengths = getattr(mask, "lengths", None)
        kwargs = kwargs | {"position_ids": positions}
    return args, kwargs


def _rotate_by_document(
    self: Any, x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Take the place of a rotary embedding's forward: call that for the documents of each length that makes a change.

    position_ids [B, T] -> cosines and sines, each [B, T, rotary dimensions], or one tensor of complex numbers.
    """
    kind = {} if layer_type is None else {"layer_type": layer_type}
    rope_type = self.rope_type if layer_type is None else self.rope_type[layer_type]
    if rope_type not in ("longrope", "dynamic"):
        return type(self).forward(self, x, position_ids, **kind)

    # The documents of each group are rotated as an input of the group's length.
    lengths = _document_lengths(position_ids)
    if rope_type == "longrope":
        scaling = self.config.rope_parameters if layer_type is None else self.config.rope_parameters[layer_type]
        limit = scaling["original_max_position_embeddings"]
        groups = {limit: lengths <= limit, limit + 1: lengths > limit}
    else:
        limit = self.original_max_seq_len  # up to here nothing is scaled
        host_lengths = getattr(position_ids, "lengths", None) or lengths.unique().tolist()
        groups = {limit: lengths <= limit} | {n: lengths == n for n in sorted(host_lengths) if n > limit}

    # transformers 5.24 reads the length from the device; its function inside does not.
    forward = inspect.unwrap(type(self).forward)
    outputs = None
    for length, group in groups.items():
        _set_frequencies(self, rope_type, layer_type, length, x.device)
        # In the places of other documents stands position 0: PhiMoE looks at the largest position itself.
        output = forward(self, x, position_ids.where(group, 0), **kind)
        tensors = output if isinstance(output, tuple) else (output,)
        previous = tensors if outputs is None else outputs
        outputs = tuple(a.where(group[..., None], b) for a, b in zip(tensors, previous, strict=True))
    assert outputs is not None
    return outputs if isinstance(output, tuple) else outputs[0]


def _set_frequencies(rotary: Any, rope_type: str, layer_type: str | None, length: int, device: torch.device) -> None:
    """Give a rotary embedding the frequencies of an input of `length` tokens."""
    kind = {} if layer_type is None else {"layer_type": layer_type}
    # As transformers 5.24 does it: `dynamic` computes with a tensor, `longrope` compares a number.
    seq_len = torch.tensor(length) if rope_type == "dynamic" else length
    frequencies, _ = ROPE_INIT_FUNCTIONS[rope_type](rotary.config, torch.device("cpu"), seq_len=seq_len, **kind)
    setattr(rotary, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq", start_copy(frequencies, device))


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return, for each token of position_ids [B, T], the number of positions up to the end of its document [B, T].

    A document ends where the next position is not one larger.
    """
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) != 1
    documents = starts.cumsum(-1)
    ends = torch.zeros(
        position_ids.shape[0], position_ids.shape[1] + 1, dtype=position_ids.dtype, device=position_ids.device
    )
    return ends.scatter_reduce(1, documents, position_ids + 1, "amax").gather(1, documents)
