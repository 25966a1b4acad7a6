"""The next-token loss as a sum over labelled tokens, computed inside the model's own forward."""

import functools
from types import MethodType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from accel_llm.chat.targets import IGNORED
from accel_llm.data.batches import count_targets, total_weight
from accel_llm.errors import ConfigError
from accel_llm.model.attention import forward_arguments, stock_attention, unwrap_causal_lm

LossPath = Literal["own", "stock"]
LOGITS_BYTES = 512 * 2**20  # float32 logits held at once: where more would be needed, the projection goes in chunks
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3, torch.int8: 2e-3}  # relative


def next_token_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Sum, float32 [], of the cross-entropies of a batch's labelled tokens, each times its weight where the batch has
    `weights`; `model` may be wrapped, see `attach`."""
    weights = {"weights": batch["weights"]} if "weights" in batch else {}
    return model(**forward_arguments(batch), labels=batch["labels"], use_cache=False, **weights).loss


def attach_loss(
    model: PreTrainedModel,
    tokens_per_batch: int,
    tokens_per_eval_batch: int | None = None,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
) -> LossPath:
    """Give the causal LM a forward that answers `labels` with the SUM of their cross-entropies, and nothing else.

    Without `labels` the forward is the family's own. It is bound to the instance before PEFT wraps it and before it
    is prepared, so that the loss is computed inside the forward of DDP, DeepSpeed and FSDP2. `tokens_per_batch`, the
    most tokens of a micro-batch, sets the number of chunks in which the vocabulary is projected; evaluation may have
    larger batches.

    Three terms join the cross-entropies in training mode, and in that mode only: label smoothing and z-loss, see
    `_regularised`, and, where the config asks for `output_router_logits`, the experts' balance loss, see `_stock_loss`.

    Returns the path in force. "own" projects labelled positions only, chunk by chunk; "stock" asks the family's
    forward for the logits of those positions, where the own path differs from the family's loss. Weights that are
    sharded or not yet there cannot be tried here: `check` settles it after prepare.
    """

    # transformers' generate reads from the signature which inputs the model takes
    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args,
        labels: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
        **kwargs,
    ):
        if labels is None:
            return type(self).forward(self, *args, **kwargs)
        path = LOSS_PATHS[self.loss_path]  # type: ignore
        return CausalLMOutputWithPast(loss=path(self, *args, labels=labels, weights=weights, **kwargs))  # type: ignore

    bytes_per_token = model.config.get_text_config().vocab_size * 4
    model.loss_chunks = max(1, -(-tokens_per_batch * bytes_per_token // LOGITS_BYTES))  # type: ignore
    model.eval_loss_chunks = -(-(tokens_per_eval_batch or 0) * bytes_per_token // LOGITS_BYTES)  # type: ignore
    model.label_smoothing, model.z_loss_coef = label_smoothing, z_loss_coef  # type: ignore
    model.loss_path = _paths(model)[0]  # type: ignore
    model.forward = MethodType(forward, model)
    if getattr(model, "unread", False):
        return _paths(model)[0]
    parameter = next(model.parameters())
    return check_loss(model, parameter.device, model.dtype)


def _paths(model: PreTrainedModel) -> list[LossPath]:
    """The paths worth trying, in order."""
    balanced = getattr(model.config.get_text_config(), "output_router_logits", False)
    # the balance loss is the family's to compute; a family without a decoder of its own has no hidden states to take
    return ["stock"] if balanced or model.base_model is model else ["own", "stock"]


@torch.no_grad()
def check_loss(model: nn.Module, device: torch.device | str, dtype: torch.dtype) -> LossPath:
    """Compare with the family's own loss on a random padded batch and settle the path; `model` may be wrapped.

    Compared are plain cross-entropies: a balance loss is taken off the family's.

    `dtype` is what the matrix products run in. Every rank runs the same 2 or 3 forwards. Raises ConfigError where
    no path gives the family's loss.
    """
    inner, training = unwrap_causal_lm(model), model.training
    model.eval()
    batch = _random_batch(inner.config.get_text_config().vocab_size, device)
    inner.loss_path = "family"  # type: ignore
    with stock_attention(model):
        expected = float(next_token_loss(model, batch))
        for path in _paths(inner):
            inner.loss_path = path  # type: ignore
            found = float(next_token_loss(model, batch))
            if abs(found / expected - 1) <= LOSS_TOLERANCE[dtype]:
                model.train(training)
                return path
    raise ConfigError(
        f"model {type(inner).__name__} cannot be trained here: its own loss on a test batch is {expected:.6g}, "
        f"the cross-entropies of its logits sum up to {found:.6g}"
    )


def _random_batch(vocab_size: int, device: torch.device | str) -> dict:
    """Two uneven rows with some tokens unlabelled."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(vocab_size, (2, 12), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, 9:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
    labels[0, :4] = IGNORED
    batch = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _own_loss(
    model: PreTrainedModel, *args, labels: torch.Tensor, weights: torch.Tensor | None, **kwargs
) -> torch.Tensor:
    hidden = model.base_model(*args, **kwargs)[0]
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # the one place where labels are shifted
    labelled = (targets != IGNORED).nonzero().squeeze(1)
    given = [hidden.flatten(0, 1).index_select(0, labelled), targets.index_select(0, labelled)]
    if weights is not None:
        given.append(F.pad(weights[:, 1:], (0, 1)).flatten().index_select(0, labelled))
    chunks: int = (not model.training and model.eval_loss_chunks) or model.loss_chunks  # type: ignore
    if chunks == 1:
        return _chunk_loss(model, *given)
    # Under ZeRO-3 and FSDP2 a use of the head is a collective: every rank makes as many, whatever its labels, so a
    # chunk may be empty
    parts = zip(*(tensor.tensor_split(chunks) for tensor in given), strict=True)
    return torch.stack([checkpoint(_chunk_loss, model, *part, use_reentrant=False) for part in parts]).sum()


def _chunk_loss(
    model: PreTrainedModel, hidden: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum of terms, float32 [], of hidden [n, width] for targets [n]; 0 with a graph where n is 0."""
    return _summed(model, _logits(model, hidden).float(), targets, weights)


def _summed(
    model: PreTrainedModel, logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    smoothing, z_coef = (model.label_smoothing, model.z_loss_coef) if model.training else (0.0, 0.0)
    if smoothing or z_coef:
        terms = _regularised(logits, targets, smoothing, z_coef)  # type: ignore
    elif weights is None:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    else:
        terms = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return (terms if weights is None else terms * weights).sum()


def _regularised(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, z_coef: float) -> torch.Tensor:
    """(1 - smoothing) * -log p(target) + smoothing * mean of -log p over the vocabulary + z_coef * (log Z)^2.

    logits [n, vocabulary] -> [n], 0 where nothing is labelled. Z is the sum of exp(logits), which its square keeps near
    1 (PaLM, arXiv 2204.02311, section 5).
    """
    # Indexed, not gathered, and log Z = logit - log p: the backward of gather or logsumexp would keep the logits as well
    chosen = torch.arange(len(targets), device=targets.device), targets.clamp(min=0)
    log_probs = logits.log_softmax(1)
    log_p = log_probs[chosen]
    terms = -log_p
    if smoothing:
        terms = (1 - smoothing) * terms - smoothing * log_probs.mean(1)
    if z_coef:
        terms = terms + z_coef * (logits[chosen] - log_p).square()
    return terms.masked_fill(targets == IGNORED, 0)


def _logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [n, width] -> logits [n, vocabulary], with what families apply to them."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # type: ignore
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite; HyperCLOVA multiplies and takes the stock path
        logits = logits / scale
    if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = torch.tanh(logits / cap) * cap
    return logits


def _stock_loss(
    model: PreTrainedModel, *args, labels: torch.Tensor, weights: torch.Tensor | None, **kwargs
) -> torch.Tensor:
    """As `_own_loss`, from the family's logits; in training with the experts' balance loss, if the config wants one.

    The family computes it from the routing of this micro-batch's real tokens. It is weighed with the micro-batch's
    `total_weight`, like one more term of each target. Divided by the weight of the whole step, the micro-batches of all
    ranks have shares that add up to 1: the step's balance loss is the mean of theirs in proportion to their targets,
    times the config's coefficient, however the step is cut; one micro-batch gives the family's loss. Balance is asked of
    each micro-batch, so finer cuts ask for more of it.
    """
    targets = labels[:, 1:]
    columns = (targets != IGNORED).any(0).nonzero().squeeze(1)
    if not len(columns):
        columns = columns.new_zeros(1)  # keep the graph: every rank takes part in the backward
    output = type(model).forward(model, *args, logits_to_keep=columns, **kwargs)
    logits, targets = output.logits.flatten(0, 1).float(), targets[:, columns].flatten()
    loss = _summed(model, logits, targets, None if weights is None else weights[:, 1:][:, columns].flatten())
    if not model.training:
        return loss
    given = {"labels": labels} if weights is None else {"labels": labels, "weights": weights}
    return loss + _balance(model, output) * total_weight(given).float()


def _balance(model: PreTrainedModel, output: ModelOutput) -> torch.Tensor | float:
    """What the family adds to its mean loss for the balance of its experts; 0 where it computes none."""
    if getattr(output, "aux_loss", None) is None:
        return 0.0
    holders = (model, model.config.get_text_config())
    names = ("router_aux_loss_coef", "aux_loss_coef")  # the second is JetMoE's
    found = [getattr(holder, name) for holder in holders for name in names if hasattr(holder, name)]
    return found[0] * output.aux_loss  # type: ignore


def _family_loss(
    model: PreTrainedModel, *args, labels: torch.Tensor, weights: torch.Tensor | None, **kwargs
) -> torch.Tensor:
    assert weights is None, "families know no weights"
    output = type(model).forward(model, *args, labels=labels, **kwargs)
    return (output.loss - _balance(model, output)) * count_targets(labels)


LOSS_PATHS = {"own": _own_loss, "stock": _stock_loss, "family": _family_loss}
