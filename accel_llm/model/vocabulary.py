"""Tokens that a tokenizer lacks: added to it, given rows in the model, and trained with an adapter row by row.

A model's vocabulary stands in its embedding and in its output head, often one matrix. The tokens of a run are a `range`
of ids after all that the tokenizer had; with an empty one everything here does nothing.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import accel_llm.system.chatter

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from tokenizers import AddedToken
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from accel_llm.chat.template import missing_tokens
from accel_llm.config.options import DataOptions
from accel_llm.errors import ConfigError

NEW_ROWS = "new_rows"  # the parameter of an embedding or head that holds the trained rows
PEFT_ROWS = "token_adapter.trainable_tokens_delta"  # what PEFT calls it in an adapter's file


def add_missing_tokens(tokenizer: PreTrainedTokenizerFast, options: DataOptions) -> range:
    """With `add_tokens`: make what the chat template writes and the tokenizer would split its tokens; the new ids."""
    return add_tokens(tokenizer, missing_tokens(tokenizer, options.chat_template) if options.add_tokens else [])


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> range:
    """Make each of `tokens` a single special token, and return the ids that are new; one it had keeps its id."""
    first = _last_id(tokenizer) + 1
    added: list[Any] = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return range(first, _last_id(tokenizer) + 1)


def _last_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values())


def extend_vocabulary(model: PreTrainedModel, tokens: range) -> None:
    """Give the model a row for each of `tokens`, the mean of all rows before them: in the embedding, head and its bias.

    So a new token begins at most as likely as the average one (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). Rows that the model has to spare are used before it grows. Tied matrices stay tied. To be
    called after loading, before anything wraps the model.

    Raises:
        ConfigError: the vocabulary of this family does not stand in an embedding and a linear head.
    """
    if not tokens:
        return
    embedding, head = _plain_ends(model)
    first = min(tokens.start, embedding.num_embeddings)
    if tokens.stop > embedding.num_embeddings:
        # Rows are drawn on the way, under ZeRO-3 more of them: what the seed gives to the adapter must not depend on it.
        with torch.random.fork_rng([embedding.weight.device] if embedding.weight.is_cuda else []):
            # Without its own mean_resizing, a draw around the mean that costs a covariance over the whole vocabulary.
            model.resize_token_embeddings(tokens.stop, mean_resizing=False)
        embedding, head = _plain_ends(model)
    bias: nn.Parameter | None = head.bias
    matrices = {id(matrix): matrix for matrix in (embedding.weight, head.weight, bias) if matrix is not None}
    for matrix in matrices.values():
        with torch.no_grad(), _whole(matrix):
            matrix[first : tokens.stop] = matrix[:first].mean(0, dtype=torch.float32)


def _plain_ends(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        not isinstance(embedding, nn.Embedding)
        or not isinstance(head, nn.Linear)
        or not (embedding.weight.is_floating_point() and head.weight.is_floating_point())
    ):
        raise ConfigError(
            f"add_tokens: {type(model).__name__} has no plain embedding and linear head to add rows to; give a "
            "tokenizer that has the template's tokens, or another template."
        )
    return embedding, head


def _whole(matrix: torch.Tensor) -> AbstractContextManager[Any]:
    """Under ZeRO-3 a loaded weight is an empty tensor until it is gathered; what rank 0 has made of it is kept."""
    if not hasattr(matrix, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([matrix], modifier_rank=0)


def train_new_rows(model: PreTrainedModel, tokens: range) -> dict[str, list[int]]:
    """Train the rows of `tokens`, and no others, of a model that PEFT has frozen and adapted.

    They are float32 parameters of their own, [tokens, width] beside each matrix, whose results replace those of the
    frozen rows. Returns what PEFT's `trainable_token_indices` must say of it. PEFT 0.21's own layer is for inference
    here: training with it copies the whole matrix in every forward, reads it outside the module that ZeRO-3 gathers
    it for, and leaves out the head's bias. A matrix in `modules_to_save` is trained whole already.

    Raises:
        ConfigError: an embedding or head that the adapter changes too, or a head with a bias.
    """
    if not tokens:
        return {}
    ends: Any = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = ends
    saved = [isinstance(module, ModulesToSaveWrapper) for module in ends]
    if all(saved):
        return {}
    names = {module: name for name, module in model.named_modules() if module in ends}
    for module, name in names.items():
        _check_free(module, name)
    tied = _frozen(embedding).weight is _frozen(head).weight
    if tied and any(saved):
        raise ConfigError(
            f"modules_to_save: {' and '.join(names.values())} are one matrix, and add_tokens trains rows of it; name "
            "both or neither."
        )
    indices = {}
    for module, replace in ((embedding, _replace_embedded), (head, _replace_logits)):
        if isinstance(module, ModulesToSaveWrapper):
            continue
        shared = module is head and tied
        module.register_parameter(NEW_ROWS, embedding.new_rows if shared else _rows_of(module.weight, tokens))
        module.register_forward_hook(replace(tokens))
        if not shared:
            indices[names[module]] = list(tokens)
    return indices


def _frozen(module: Any) -> Any:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _check_free(module: nn.Module, name: str) -> None:
    if isinstance(module, BaseTunerLayer):
        raise ConfigError(
            f"lora_target_modules: {name} gets new rows by add_tokens and cannot be adapted as well; leave it out, or "
            "name it in modules_to_save."
        )
    if getattr(module, "bias", None) is not None and not isinstance(module, ModulesToSaveWrapper):
        # PEFT 0.21 computes an adapted head without its bias.
        raise ConfigError(
            f"add_tokens: {name} has a bias, which an adapter of single rows leaves out; name it in modules_to_save, or "
            "give method full."
        )


def _rows_of(matrix: nn.Parameter, tokens: range) -> nn.Parameter:
    with torch.no_grad(), _whole(matrix):
        return nn.Parameter(matrix[tokens.start : tokens.stop].float().clone())


def _replace_embedded(tokens: range) -> Any:
    def replace(module: Any, args: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
        """embedded [..., width] of args[0] [...], with the trained rows where a token is new."""
        positions = args[0] - tokens.start
        new = (positions >= 0) & (positions < len(tokens))
        # Gemma 3 and kin scale what they look up; clamped, every rank's rows are in the graph, whatever its tokens.
        rows = F.embedding(positions.clamp(0, len(tokens) - 1), module.new_rows) * getattr(module, "embed_scale", 1)
        return torch.where(new[..., None], rows.to(embedded.dtype), embedded)

    return replace


def _replace_logits(tokens: range) -> Any:
    def replace(module: Any, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
        """logits [..., vocabulary] of args[0] [..., width], with those of the trained rows in place."""
        logits[..., tokens.start : tokens.stop] = F.linear(args[0], module.new_rows.to(args[0].dtype))
        return logits

    return replace


def adapter_vocabulary_size(model: PreTrainedModel, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> int:
    """How many rows the vocabulary had that an adapter was trained with, as far as its files tell (0: not at all).

    `settings` is its adapter_config.json, `weights` its tensors by name, `model` its base.
    """
    indices = settings.get("trainable_token_indices") or {}
    lists = indices.values() if isinstance(indices, dict) else [indices]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"base_model.model.{name}.weight" for name, module in model.named_modules() if module in ends]
    return max([0, *(max(ids) + 1 for ids in lists if ids), *(len(weights[name]) for name in names if name in weights)])
