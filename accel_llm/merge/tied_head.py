"""Separates an output head from the embedding that shares its matrix, where an adapter makes the two different."""

from typing import Any

import accel_llm.system.chatter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PEFT_PREFIX
from accel_llm.merge.attached import AttachedAdapters
from accel_llm.merge.one_module import plain_module


def untie_head(model: PreTrainedModel, attached: AttachedAdapters) -> bool:
    """Give the head a matrix of its own if the adapter changes only one of the tied matrices. Returns whether it did.

    In one shared matrix, merging a change of the head would change the embedding too.
    """
    # Only tied matrices that the adapter makes different must be separated.
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(module is None for module in modules):
        return False
    embedding, head = map(plain_module, modules)
    if embedding.weight is not head.weight or not _makes_different(model, attached):
        return False
    head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    return True


def _makes_different(model: PreTrainedModel, attached: AttachedAdapters) -> bool:
    """Return whether the adapter makes embedding and head different matrices."""
    embedding_and_head: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    # Trained rows of both: PEFT knows whether it ties them.
    if all(isinstance(module, TrainableTokensWrapper) for module in embedding_and_head):
        return not embedding_and_head[1].token_adapter.tied_adapter
    # Both saved whole: they stay tied if they are equal.
    matrices = [_replacement_matrix(model, attached, module) for module in embedding_and_head]
    if all(matrix is not None for matrix in matrices):
        return not torch.equal(*matrices)  # type: ignore[arg-type]
    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in embedding_and_head)


def _replacement_matrix(model: PreTrainedModel, attached: AttachedAdapters, module: Any) -> torch.Tensor | None:
    """Return the whole matrix that the adapter's file holds for a module (modules_to_save), if it does."""
    if not isinstance(module, ModulesToSaveWrapper):
        return None
    name = next(name for name, other in model.named_modules() if other is module)
    return attached.pending.get(f"{PEFT_PREFIX}{name}.modules_to_save.default.weight")
