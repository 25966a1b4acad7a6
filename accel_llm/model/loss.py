"""The next-token loss as a sum over labeled tokens, computed inside the model's own forward."""

import functools
from contextlib import nullcontext
from types import MethodType
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import collate_packed, collate_padded, to_device
from accel_llm.errors import ConfigError
from accel_llm.model.attention import PACKED_ATTENTION, forward_arguments, stock_attention, unwrap_causal_lm
from accel_llm.model.balance import asks_for_balance, balance_loss
from accel_llm.model.log_probabilities import score_answers
from accel_llm.model.logits import chunk_count, sum_of_chunks, sum_terms
from accel_llm.model.virtual_tokens import count_virtual_tokens

LossPath = Literal["own", "stock"]
# What the loss reads of a batch beside the labels.
TARGETS = ("target_positions", "target_columns", "total_weight", "weights", "sources")
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3, torch.int8: 2e-3}  # relative


def next_token_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Return the sum of the cross-entropies of all labeled tokens of a batch, float32 [].

    `batch` is packed or padded, see data/batches.py. With `weights` in it, each term is multiplied by its token's
    weight. Call `attach_loss` on the model first; after that it may be wrapped (PEFT, DDP, DeepSpeed, FSDP2).

    If the batch has `sources`, this adds to it what `measured` says in report/metrics.py: for each of `source_names` the
    loss of its tokens, as `loss/NAME`.
    """
    targets = {name: batch[name] for name in TARGETS if name in batch} | {"row_length": batch["labels"].shape[1]}
    names = batch.get("source_names", ())
    inner: Any = unwrap_causal_lm(model) if names else None
    if names:
        inner.source_sums = torch.zeros(len(names), 2, dtype=torch.float64, device=batch["labels"].device)
    loss = model(**forward_arguments(batch), labels=batch["labels"], targets=targets, use_cache=False).loss
    if names:
        # From here on nothing is added: logits may be computed again in the backward pass.
        sums, inner.source_sums = inner.source_sums, None
        batch["measured"] = {f"loss/{name}": part for name, part in zip(names, sums, strict=True)}
    return loss


def attach_loss(
    model: PreTrainedModel,
    tokens_per_batch: int,
    tokens_per_eval_batch: int | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> LossPath:
    """Replace the forward of a causal LM: with `targets` it returns the SUM of their cross-entropies and no logits.

    `next_token_loss` passes them; without them the forward stays the family's own, and with those of
    `answer_log_probabilities` it returns the log-probabilities of answers. Call this before PEFT wraps the model and
    before `accelerator.prepare`: then the loss is computed inside the forward of DDP, DeepSpeed and FSDP2.
    `tokens_per_batch` is the largest number of tokens in a micro-batch. It sets the number of chunks in which the
    vocabulary is projected; evaluation may have larger batches.

    In training mode, and only there, up to three terms are added: label smoothing and z-loss (see model/logits.py)
    and, if the config sets `output_router_logits`, the balance loss of the experts (see `_stock_loss`).

    Returns the path in use. "own" projects only labeled positions, chunk by chunk. "stock" takes the logits of those
    positions from the family's forward; it is used where the own path does not give the family's loss. Weights that
    are sharded or not loaded yet cannot be tested here: then call `check_loss` after `accelerator.prepare`.

    Raises:
        ConfigError: neither path gives the family's loss.
    """

    # `wraps` keeps the signature: transformers' generate reads from it which inputs the model takes.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args, targets: dict[str, Any] | None = None, **kwargs):
        if targets is None:
            return type(self).forward(self, *args, **kwargs)
        # The places of the targets count from the first token of a row.
        if self.loss_path != "family" and kwargs["labels"].shape[1] != targets["row_length"]:
            raise ConfigError(
                "method: PEFT's own forward has put virtual tokens before the rows of a batch; call fit_virtual_tokens on "
                "the model, and give each document places for them (`virtual` in data/batches.py)."
            )
        if "answer_ids" in targets:
            return score_answers(self, *args, targets=targets, **kwargs)
        path = LOSS_PATHS[self.loss_path]  # type: ignore
        return CausalLMOutputWithPast(loss=path(self, *args, targets=targets, **kwargs))  # type: ignore

    # The settings live on the model, where every wrapper finds them.
    fit_loss_chunks(model, tokens_per_batch, tokens_per_eval_batch or 0)
    model.label_smoothing, model.z_loss_coef = label_smoothing, z_loss_coef  # type: ignore
    model.loss_path = _candidate_paths(model)[0]  # type: ignore
    model.forward = MethodType(forward, model)

    # A model whose weights are still in the files (see load_model) cannot be tested yet.
    if getattr(model, "unread", False):
        return _candidate_paths(model)[0]
    parameter = next(model.parameters())
    return check_loss(model, parameter.device, model.dtype)


def fit_loss_chunks(model: PreTrainedModel, tokens_per_batch: int, tokens_per_eval_batch: int = 0) -> None:
    """Set the numbers of chunks in which the vocabulary is projected for micro-batches of so many tokens."""
    text = model.config.get_text_config()
    sizes = text.hidden_size, text.vocab_size
    model.loss_chunks = max(1, chunk_count(tokens_per_batch, *sizes))  # type: ignore
    model.eval_loss_chunks = chunk_count(tokens_per_eval_batch, *sizes)  # type: ignore


def _shifted(values: torch.Tensor, last: float) -> torch.Tensor:
    """Return values [B, L], each of them one position earlier: position i predicts token i + 1."""
    return F.pad(values[:, 1:], (0, 1), value=last)


def _candidate_paths(model: PreTrainedModel) -> list[LossPath]:
    """Return the paths to try, in order."""
    # The family itself computes its balance loss, and a family without a separate decoder gives us no hidden states.
    return ["stock"] if asks_for_balance(model) or model.base_model is model else ["own", "stock"]


@torch.no_grad()
def check_loss(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> LossPath:
    """Compare our loss with the family's own on a random padded batch, and choose the path; `model` may be wrapped.

    Plain cross-entropies are compared: a balance loss is subtracted from the family's loss. `dtype` is the dtype of the
    matrix products. Every rank runs the same 2 or 3 forwards. With virtual tokens the reference is PEFT's own forward,
    and ours computes the rows with the attention that will train.

    Raises:
        ConfigError: no path gives the family's loss, or the config asks for a balance loss that the family lacks.
    """
    inner, training = unwrap_causal_lm(model), model.training
    model.eval()
    rows, virtual = _random_rows(inner.config.get_text_config().vocab_size), count_virtual_tokens(model)
    inner.loss_path = "family"  # type: ignore
    with stock_attention(model):
        expected = float(next_token_loss(model, to_device(collate_padded(rows, 0), device)))
    packed = virtual and inner.config._attn_implementation == PACKED_ATTENTION
    batch = collate_packed(rows, None, virtual) if packed else collate_padded(rows, 0, None, virtual)
    batch = to_device(batch, device)
    with nullcontext() if virtual else stock_attention(model):
        for path in _candidate_paths(inner):
            inner.loss_path = path  # type: ignore
            loss = float(next_token_loss(model, batch))
            if abs(loss / expected - 1) <= LOSS_TOLERANCE[dtype]:
                model.train(training)
                return path
    if virtual:
        raise ConfigError(
            f"method: the virtual tokens do not work with {type(inner).__name__} here: the loss of a test batch is "
            f"{loss:.6g}, but {expected:.6g} by PEFT's own forward; use method prompt if this is another one, or lora."
        )
    raise ConfigError(
        f"model_name_or_path: {type(inner).__name__} cannot be trained here: its own loss on a test batch is "
        f"{expected:.6g}, but the cross-entropies of its logits sum to {loss:.6g}; use a model of another family."
    )


def _random_rows(vocab_size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return two rows of different lengths, some tokens without a label."""
    first, second = np.random.default_rng(0).integers(vocab_size, size=(2, 12))
    return [(first, np.where(np.arange(12) < 4, IGNORED, first)), (second[:9], second[:9])]


def _own_loss(model: PreTrainedModel, *args, labels: torch.Tensor, targets: dict[str, Any], **kwargs) -> torch.Tensor:
    """Sum over the targets, projecting only their positions to the vocabulary."""
    hidden, labels = model.base_model(*args, **kwargs)[0], _shifted(labels, IGNORED)
    hidden, labels = (tensor.flatten(0, 1).index_select(0, targets["target_positions"]) for tensor in (hidden, labels))
    weights, sources = (
        each if each is None else _shifted(each, 0).flatten().index_select(0, targets["target_positions"])
        for each in (targets.get("weights"), targets.get("sources"))
    )
    return sum_of_chunks(model, hidden, labels, weights, sources)


def _stock_loss(model: PreTrainedModel, *args, labels: torch.Tensor, targets: dict[str, Any], **kwargs) -> torch.Tensor:
    """Return the same sum as `_own_loss`, from the family's logits; in training plus the balance loss of the experts.

    The family computes the balance loss from the routing of this micro-batch's real tokens. We multiply it by the
    micro-batch's `total_weight`, as if it were one more term of each target. The training loop divides by the weight of
    the whole step, so a step's balance loss is the mean over its micro-batches in proportion to their targets. With a
    single micro-batch this is the family's loss. Each micro-batch is balanced by itself, so more and smaller
    micro-batches ask for more balance.
    """
    # The family computes logits for the columns in which any row has a target.
    columns = targets["target_columns"]
    output = type(model).forward(model, *args, logits_to_keep=columns, **kwargs)
    logits, labels = output.logits.flatten(0, 1).float(), _shifted(labels, IGNORED)
    weights, sources = (
        each if each is None else _shifted(each, 0).index_select(1, columns).flatten()
        for each in (targets.get("weights"), targets.get("sources"))
    )
    loss = sum_terms(model, logits, labels.index_select(1, columns).flatten(), weights, sources)
    if not model.training:
        return loss
    return loss + balance_loss(model, output) * targets["total_weight"]


def _family_loss(
    model: PreTrainedModel, *args, labels: torch.Tensor, targets: dict[str, Any], **kwargs
) -> torch.Tensor:
    """Return the reference of `check_loss`: the family's mean loss times the number of targets, no balance loss."""
    assert "weights" not in targets, "the families' own losses do not support weights"
    output = type(model).forward(model, *args, labels=labels, **kwargs)
    if asks_for_balance(model) and getattr(output, "aux_loss", None) is None:
        raise ConfigError(
            f"output_router_logits: the config of the model asks for a balance loss of its experts, but "
            f"{type(model).__name__} computes none; set it to false in config.json."
        )
    return (output.loss - balance_loss(model, output)) * targets["total_weight"]


LOSS_PATHS = {"own": _own_loss, "stock": _stock_loss, "family": _family_loss}
