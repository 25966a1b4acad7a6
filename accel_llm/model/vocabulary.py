"""Adds tokens that a tokenizer lacks: to the tokenizer, as rows to the model, and as trainable rows to an adapter.

A model has a row for each token in its embedding and in its output head; often both are one matrix. The new tokens of a
run are a `range` of ids that follow the tokenizer's old ones. With an empty range nothing here has any effect.
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
from accel_llm.config.data_options import DataOptions
from accel_llm.errors import ConfigError

NEW_ROWS = "new_rows"  # name of the parameter that holds the trained rows, in the embedding and in the head
ROW_IDS = "row_ids"  # name of the buffer with their ids, sorted
PEFT_ROWS = "token_adapter.trainable_tokens_delta"  # PEFT's name for it in an adapter's file


def add_missing_tokens(tokenizer: PreTrainedTokenizerFast, options: DataOptions) -> range:
    """With the option `add_tokens`, add the chat template's tokens that the tokenizer would split; return their ids."""
    return add_tokens(tokenizer, missing_tokens(tokenizer, options.chat_template) if options.add_tokens else [])


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: list[str]) -> range:
    """Make each of `tokens` a single special token and return the new ids; a token that is there keeps its id."""
    first = _largest_id(tokenizer) + 1
    special_tokens: list[Any] = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    return range(first, _largest_id(tokenizer) + 1)


def _largest_id(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values())


def extend_vocabulary(model: PreTrainedModel, tokens: range) -> None:
    """Give the model a row for each of `tokens` in embedding, head and the head's bias: the mean of all older rows.

    So a new token is at first at most as likely as the average one (Hewitt 2021, "Initializing New Word Embeddings for
    Pretrained Language Models"). Spare rows of the model are used first; the matrices grow only if needed. Tied
    matrices stay tied. Call this after loading and before anything wraps the model.

    Raises:
        ConfigError: the model does not have a plain embedding and a linear head.
    """
    if not tokens:
        return
    embedding, head = _embedding_and_head(model)
    first = min(tokens.start, embedding.num_embeddings)

    # Grow the matrices.
    if tokens.stop > embedding.num_embeddings:
        # Resizing draws random numbers; under ZeRO-3 it draws a different amount. Restore the generator, so that the
        # adapter's first values depend on the seed alone.
        with torch.random.fork_rng([embedding.weight.device] if embedding.weight.is_cuda else []):
            # mean_resizing would compute a covariance over the whole vocabulary, for rows that are overwritten below.
            model.resize_token_embeddings(tokens.stop, mean_resizing=False)
        embedding, head = _embedding_and_head(model)

    # Fill the new rows; tied matrices are one tensor and are filled once.
    bias: nn.Parameter | None = head.bias
    matrices = {id(matrix): matrix for matrix in (embedding.weight, head.weight, bias) if matrix is not None}
    for matrix in matrices.values():
        with torch.no_grad(), _gathered(matrix):
            matrix[first : tokens.stop] = matrix[:first].mean(0, dtype=torch.float32)


def _embedding_and_head(model: PreTrainedModel) -> tuple[nn.Embedding, nn.Linear]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        not isinstance(embedding, nn.Embedding)
        or not isinstance(head, nn.Linear)
        or not (embedding.weight.is_floating_point() and head.weight.is_floating_point())
    ):
        raise ConfigError(
            f"add_tokens: {type(model).__name__} has no plain embedding and linear head to add rows to; use a "
            "tokenizer that has the template's tokens, or another template."
        )
    return embedding, head


def _gathered(matrix: torch.Tensor) -> AbstractContextManager[Any]:
    """Gather a matrix that ZeRO-3 has sharded (its local tensor is empty); rank 0's changes are kept."""
    if not hasattr(matrix, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([matrix], modifier_rank=0)


def train_rows(
    model: PreTrainedModel, tokens: range, chosen: list[int] | dict[str, list[int]] | None = None
) -> dict[str, list[int]]:
    """Make some rows of the vocabulary, and no others, trainable in a model that PEFT has frozen and adapted.

    These are the rows of the new `tokens`, in embedding and head, and those that `chosen` names as PEFT's
    `trainable_token_indices` does: ids for the embedding, or for each module by its name.

    The trained rows are a separate float32 parameter [rows, width] beside each matrix; forward hooks put its results in
    place of the frozen rows' results. A matrix in `modules_to_save` is trained as a whole already. Returns the value of
    `trainable_token_indices` for the adapter's config, with which PEFT loads the rows for inference.

    PEFT 0.21's own layer is not used for training: it copies the whole matrix in every forward, reads the matrix
    outside the module for which ZeRO-3 gathers it, and leaves out the head's bias.

    Raises:
        ConfigError: the model has no such rows, the adapter changes the embedding or head itself, or the head has a
            bias.
    """
    if not tokens and not chosen:
        return {}
    pair: Any = model.get_input_embeddings(), model.get_output_embeddings()
    embedding, head = pair
    names = {module: name for name, module in model.named_modules() if module in pair}
    ids = _rows_of_modules(names, embedding, tokens, chosen or [])
    trained_whole = [isinstance(module, ModulesToSaveWrapper) for module in pair]
    if all(trained_whole):
        return {}

    tied = head is not None and _frozen_module(embedding).weight is _frozen_module(head).weight
    if tied:
        ids[embedding] = ids[head] = sorted({*ids[embedding], *ids[head]})
    _check_rows_can_be_saved(names, ids, tied and any(trained_whole))

    # One parameter for each matrix; tied modules share it.
    indices = {}
    hooks: list[tuple[Any, Any]] = [(embedding, _replace_embedded), (head, _replace_logits)]
    for module, hook in hooks:
        if isinstance(module, ModulesToSaveWrapper) or not ids.get(module):
            continue
        shared = module is head and tied
        module.register_parameter(NEW_ROWS, embedding.new_rows if shared else _copy_rows(module.weight, ids[module]))
        module.register_buffer(ROW_IDS, torch.tensor(ids[module]), persistent=False)
        module.register_forward_hook(hook)
        if not shared:
            indices[names[module]] = ids[module]
    return indices


def _check_rows_can_be_saved(names: dict[Any, str], ids: dict[Any, list[int]], one_of_two_is_whole: bool) -> None:
    """Refuse combinations in which the rows would not be trained, or not be saved."""
    for module, name in names.items():
        if ids[module]:
            _check_not_adapted(module, name)
    if one_of_two_is_whole:
        raise ConfigError(
            f"modules_to_save: {' and '.join(names.values())} are one matrix, and single rows of it are trained "
            "(add_tokens, trainable_token_indices); name both or neither."
        )


def _rows_of_modules(
    names: dict[Any, str], embedding: nn.Module, tokens: range, chosen: list[int] | dict[str, list[int]]
) -> dict[Any, list[int]]:
    """Return the ids of the rows to train of the embedding and of the head, sorted."""
    by_name = chosen if isinstance(chosen, dict) else {names[embedding]: chosen}
    rows = {module: set(tokens) for module in names}
    for key, ids in by_name.items():
        modules = [module for module, name in names.items() if name == key or name.endswith(f".{key}")]
        if not modules:
            raise ConfigError(
                f"trainable_token_indices: {key!r} is neither the embedding nor the head; these are "
                f"{' and '.join(names.values())}."
            )
        for module in modules:
            size = (
                len(_frozen_module(module).weight) if not hasattr(module, "num_embeddings") else module.num_embeddings
            )
            if wrong := [k for k in ids if not 0 <= k < size]:
                raise ConfigError(
                    f"trainable_token_indices: {key} has no row {wrong[0]}, only 0 to {size - 1}; tokens that the chat "
                    "template needs are added by add_tokens."
                )
            rows[module].update(ids)
    return {module: sorted(ids) for module, ids in rows.items()}


def _frozen_module(module: Any) -> Any:
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else module


def _check_not_adapted(module: nn.Module, name: str) -> None:
    if isinstance(module, BaseTunerLayer):
        raise ConfigError(
            f"lora_target_modules: single rows of {name} are trained (add_tokens, trainable_token_indices), so it cannot "
            "be adapted as well; leave it out, or name it in modules_to_save."
        )
    if getattr(module, "bias", None) is not None and not isinstance(module, ModulesToSaveWrapper):
        # PEFT 0.21 computes a head with trained rows without its bias.
        raise ConfigError(
            f"add_tokens: {name} has a bias, which an adapter of single rows leaves out; name it in modules_to_save, "
            "or set method: full."
        )


def _copy_rows(matrix: nn.Parameter, ids: list[int]) -> nn.Parameter:
    with torch.no_grad(), _gathered(matrix):
        return nn.Parameter(matrix[ids].float().clone())


def _replace_embedded(module: Any, args: tuple[torch.Tensor], embedded: torch.Tensor) -> torch.Tensor:
    """Return `embedded` [..., width] with the trained rows of their tokens; `args[0]` [...] holds the ids."""
    positions = torch.searchsorted(module.row_ids, args[0]).clamp(max=len(module.row_ids) - 1)
    is_trained = module.row_ids[positions] == args[0]
    # Look up a row for every token, so that the rows are in the gradient graph of every rank, whatever its tokens.
    # Families such as Gemma 3 scale their embeddings.
    rows = F.embedding(positions, module.new_rows) * getattr(module, "embed_scale", 1)
    return torch.where(is_trained[..., None], rows.to(embedded.dtype), embedded)


def _replace_logits(module: Any, args: tuple[torch.Tensor], logits: torch.Tensor) -> torch.Tensor:
    """Return `logits` [..., vocabulary] with those of trained rows replaced; `args[0]` [..., width] is the input."""
    values = F.linear(args[0], module.new_rows.to(args[0].dtype))
    return logits.index_copy_(-1, module.row_ids, values.to(logits.dtype))


def adapter_vocabulary_size(model: PreTrainedModel, settings: dict[str, Any], weights: dict[str, torch.Tensor]) -> int:
    """Return the least number of rows in the vocabulary that an adapter was trained with; 0 if its files do not say.

    `settings` is its adapter_config.json, `weights` are its tensors by name, `model` is its base.
    """
    # From the ids of single trained rows.
    indices = settings.get("trainable_token_indices") or {}
    id_lists = indices.values() if isinstance(indices, dict) else [indices]
    sizes = [max(ids) + 1 for ids in id_lists if ids]

    # From an embedding or head that was saved as a whole.
    pair = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"base_model.model.{name}.weight" for name, module in model.named_modules() if module in pair]
    sizes += [len(weights[name]) for name in names if name in weights]
    return max([0, *sizes])
