"""The log-probabilities of answers: only the positions that predict their tokens are projected to the vocabulary."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from accel_llm.model.attention import forward_arguments
from accel_llm.model.balance import asks_for_balance, balance_loss
from accel_llm.model.logits import needs_recomputation, project
from accel_llm.model.recomputation import has_dropout

# What the forward reads of a batch beside its inputs.
ANSWER_TARGETS = ("answer_positions", "answer_ids", "target_columns")


class AnswerScores(NamedTuple):
    """The log-probabilities of a batch of answers, see `answer_log_probabilities`."""

    sums: torch.Tensor
    tokens: torch.Tensor
    log_squares: torch.Tensor | None
    balance: torch.Tensor | None


@dataclass
class TokenScores(ModelOutput):
    """What the forward of a model returns for a batch of answers: values [n] of their tokens, and a balance loss []."""

    log_probabilities: torch.Tensor | None = None
    log_squares: torch.Tensor | None = None
    balance: torch.Tensor | None = None


def answer_log_probabilities(model: nn.Module, batch: dict, squares: bool = False) -> AnswerScores:
    """Return log p of each answer of a batch, float64 [answers], and of each token of the answers, float32 [n].

    Call `attach_loss` on the model first; after that it may be wrapped (PEFT, DDP, DeepSpeed, FSDP2). The batch is
    packed or padded. Beside the arguments of the forward it has, for token j of n: `answer_positions`, the place in the
    flattened batch whose hidden state predicts the token (several tokens may be predicted at one place); `answer_ids`,
    the token; `answer_numbers`, the answer that it belongs to; all int64 [n]. `answer_lengths` is a list with one
    number for each answer, and `target_columns` are the columns of the places, each of them once and in order.

    `sums` add up the tokens of an answer. They are in float64, because float32 would round the sum of a thousand tokens
    to 1e-4. With `squares` the scores also have `log_squares` [n] = log sum_v p_v^2 over the vocabulary, which WPO
    needs (arXiv 2406.11827); it has no gradient. In training mode `balance` [] is the loss of unbalanced experts, if the
    config asks for one: add it once for each unit of the batch, as if it were a term of the unit.
    """
    targets = {name: batch[name] for name in ANSWER_TARGETS} | {"squares": squares}
    targets["row_length"] = batch["input_ids"].shape[1]
    # As labels, the ids have the length of the rows that a wrapper makes of them.
    output = model(**forward_arguments(batch), labels=batch["input_ids"], targets=targets, use_cache=False)
    tokens = output.log_probabilities
    sums = tokens.new_zeros(len(batch["answer_lengths"]), dtype=torch.float64)
    sums = sums.index_add(0, batch["answer_numbers"], tokens.double())
    return AnswerScores(sums, tokens, output.log_squares, output.balance)


def score_answers(
    model: PreTrainedModel, *args, labels: torch.Tensor, targets: dict[str, Any], **kwargs
) -> TokenScores:
    """Compute the scores of a batch of answers inside the model's own forward, by the path that `attach_loss` chose."""
    places, ids, squares = targets["answer_positions"], targets["answer_ids"], targets["squares"]
    if model.loss_path == "own":  # type: ignore
        hidden = model.base_model(*args, **kwargs)[0].flatten(0, 1).index_select(0, places)
        return TokenScores(*log_probabilities(model, hidden, ids, squares))
    # The family computes logits for the columns in which any row has a target.
    columns = targets["target_columns"]
    output = type(model).forward(model, *args, logits_to_keep=columns, **kwargs)
    rows, in_row = places // targets["row_length"], places % targets["row_length"]
    logits = output.logits.flatten(0, 1).index_select(0, rows * len(columns) + torch.searchsorted(columns, in_row))
    balance: Any = balance_loss(model, output) if model.training and asks_for_balance(model) else None
    return TokenScores(*LogProbabilities.apply(_wide(logits), ids, squares), balance)  # type: ignore


def log_probabilities(
    model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, squares: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return log p [n] of the tokens `ids` [n] that hidden [n, width] predict, and `log_squares` [n] if asked.

    The vocabulary is projected in chunks, and only one chunk of logits is in memory. With a frozen head, log p of a
    token depends on its own hidden state only. So the gradient by that is computed at once, and multiplied in the
    backward pass by the gradient of the loss by log p. Otherwise the logits are computed again in the backward pass.
    """
    # Using the head may be a collective: all ranks need the same number of chunks, so a chunk may be empty. In
    # evaluation mode a batch may be one of training (the pass of a reference) or of evaluation.
    chunks: int = model.loss_chunks if model.training else max(model.loss_chunks, model.eval_loss_chunks)  # type: ignore
    head: Any = model.get_output_embeddings()
    trained = any(parameter.requires_grad for parameter in head.parameters())
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or trained)
    if differentiated and not trained and not needs_recomputation(head, hidden):
        return LogProbabilitiesInOnePass.apply(model, chunks, hidden, ids, squares)  # type: ignore

    parts = zip(hidden.tensor_split(chunks), ids.tensor_split(chunks), strict=True)
    if chunks == 1 or not differentiated:
        return _joined([_score_chunk(model, *part, squares) for part in parts])
    # An adapter of the head may have dropout; without it no state of the random generators has to be kept.
    settings: Any = {"use_reentrant": False, "preserve_rng_state": has_dropout(head)}
    return _joined([checkpoint(_score_chunk, model, *part, squares, **settings) for part in parts])


def _joined(parts: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, log_squares = zip(*parts, strict=True)
    return torch.cat(tokens), None if log_squares[0] is None else torch.cat(log_squares)


def _score_chunk(model: PreTrainedModel, hidden: torch.Tensor, ids: torch.Tensor, squares: bool) -> Any:
    return LogProbabilities.apply(_wide(project(model, hidden)), ids, squares)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    """Return logits in float32; those of a model in float64 stay exact."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class LogProbabilitiesInOnePass(torch.autograd.Function):
    """Computes the scores of all chunks, and the gradient of each log p by its hidden state together with it."""

    @staticmethod
    def forward(
        ctx: Any, model: PreTrainedModel, chunks: int, hidden: torch.Tensor, ids: torch.Tensor, squares: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        scores: list[Any] = []
        ctx.gradient = torch.empty_like(hidden)
        parts = (tensor.tensor_split(chunks) for tensor in (hidden, ids, ctx.gradient))
        for some_hidden, some_ids, gradient in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = some_hidden.detach().requires_grad_()
                logits = _wide(project(model, leaf))
            tokens, log_squares, sums = _scores(logits.detach(), some_ids, squares)
            scores.append((tokens, log_squares))
            by_logits = _exponentials_to_gradient(logits.detach(), some_ids, sums)
            gradient.copy_(torch.autograd.grad(logits, leaf, by_logits)[0])
            del logits, by_logits
        tokens, log_squares = _joined(scores)
        if log_squares is not None:
            ctx.mark_non_differentiable(log_squares)
        return tokens, log_squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_tokens: torch.Tensor, _: Any) -> tuple[Any, ...]:
        gradient, ctx.gradient = ctx.gradient, None  # not kept: it is multiplied in place
        # In 16 bits the product would first round the factors to 16 bits.
        for rows, factors in zip(gradient.split(4096), by_tokens.split(4096), strict=True):
            rows.copy_(rows * factors[:, None])
        return None, None, gradient, None, None


class LogProbabilities(torch.autograd.Function):
    """Computes the scores of logits. If log p has a gradient by them, it takes their place in memory."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, squares: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tokens, log_squares, sums = _scores(logits.detach(), ids, squares)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(_exponentials_to_gradient(logits.detach(), ids, sums))
        if log_squares is not None:
            ctx.mark_non_differentiable(log_squares)
        return tokens, log_squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_tokens: torch.Tensor, _: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(by_tokens[:, None]), None, None


def _scores(
    logits: torch.Tensor, ids: torch.Tensor, squares: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return log p of `ids` [n], log sum p^2 [n], and the sums [n] of what `logits` [n, vocabulary] become.

    They become exp(logit - largest logit): log_softmax would need a second matrix.
    """
    logits -= logits.amax(1, keepdim=True)
    at_ids = logits.gather(1, ids[:, None]).squeeze(1)
    sums = logits.exp_().sum(1)
    log_squares = 2 * (torch.linalg.vector_norm(logits, dim=1) / sums).log() if squares else None
    return at_ids - sums.log(), log_squares, sums


def _exponentials_to_gradient(exponentials: torch.Tensor, ids: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Return the gradient of log p of `ids` by the logits, 1 at the token less p, in the place of their exponentials."""
    exponentials *= (-1 / sums)[:, None]
    return exponentials.scatter_add_(1, ids[:, None], torch.ones_like(sums)[:, None])
