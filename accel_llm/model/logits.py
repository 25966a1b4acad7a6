"""The projection of hidden states to the vocabulary and the loss of its logits, chunk by chunk, in little memory."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from accel_llm.chat.targets import IGNORED
from accel_llm.model.recomputation import has_dropout

# The vocabulary is projected in chunks of positions. For each logit of a chunk, 6 bytes are in memory at once: the logit
# in float32, in whose place its gradient is computed, and the head's output or the gradient in 16 bits. A chunk takes
# less than what a layer of usual proportions takes to be recomputed, which is about LAYER_BYTES for each element of its
# input, or CHUNK_BYTES if that is more.
LOGIT_BYTES = 6
LAYER_BYTES = 48
CHUNK_BYTES = 256 * 2**20


def chunk_count(tokens: int, width: int, vocabulary: int) -> int:
    """Return in how many chunks hidden states [tokens, width] are projected to the vocabulary; 0 for no tokens."""
    room = max(CHUNK_BYTES, LAYER_BYTES * tokens * width)
    return -(-LOGIT_BYTES * tokens * vocabulary // room)


def sum_of_chunks(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    sources: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of hidden [n, width] for targets [n], float32 []: the sum of `sum_terms`, with its gradient.

    `sources` [n] are numbers of sources, whose parts of the loss are added to `model.source_sums`.
    """
    # Using the head may be a collective: all ranks need the same number of chunks, so a chunk may be empty.
    chunks: int = (not model.training and model.eval_loss_chunks) or model.loss_chunks  # type: ignore
    head: Any = model.get_output_embeddings()
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    differentiated = torch.is_grad_enabled() and (hidden.requires_grad or bool(trained))
    if differentiated and not needs_recomputation(head, hidden):
        loss: Any = LossInOnePass.apply(model, chunks, targets, weights, sources, hidden, *trained)
        return loss

    tensors = (hidden, targets, weights, sources)
    split = ([None] * chunks if tensor is None else tensor.tensor_split(chunks) for tensor in tensors)
    parts: list[Any] = list(zip(*split, strict=True))
    if chunks == 1 or not differentiated:
        return torch.stack([_chunk_loss(model, *part) for part in parts]).sum()
    # Logits are recomputed in the backward pass, so only one chunk of them is in memory. An adapter of the head may
    # have dropout; without it no state of the random generators has to be kept.
    settings: Any = {"use_reentrant": False, "preserve_rng_state": has_dropout(head)}
    return torch.stack([checkpoint(_chunk_loss, model, *part, **settings) for part in parts]).sum()


def needs_recomputation(head: nn.Module, hidden: torch.Tensor) -> bool:
    """Return whether the gradient cannot be computed together with the loss.

    ZeRO-3 lets a gradient of the head be computed in the backward pass only. And in fp16 a gradient would lose digits
    or vanish without the scale of the loss, which is known in the backward pass only: with token weights of 0.001 the
    gradient of the hidden states would be 2% off.
    """
    device = hidden.device.type
    half = hidden.dtype == torch.float16
    if torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device) == torch.float16
    return half or any(hasattr(parameter, "ds_id") for parameter in head.parameters())


class LossInOnePass(torch.autograd.Function):
    """Sums the loss of all chunks, and computes the gradient of each chunk as soon as its loss is known.

    So the vocabulary is projected once, and only one chunk of logits is ever in memory. What is kept is the gradient of
    the hidden states and of the trained parameters of the head.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: PreTrainedModel,
        chunks: int,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        sources: torch.Tensor | None,
        hidden: torch.Tensor,
        *trained: torch.Tensor,
    ) -> torch.Tensor:
        losses: list[torch.Tensor] = []
        sums: list[Any] = []
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        for start, end in pairwise(k * len(targets) // chunks for k in range(chunks + 1)):
            part = slice(start, end)
            with torch.enable_grad():
                some_hidden = hidden[part].detach().requires_grad_(gradient is not None)
                logits = project(model, some_hidden).float()
            some_weights, some_sources = (each if each is None else each[part] for each in (weights, sources))
            loss, by_logits = _loss_and_gradient(model, logits.detach(), targets[part], some_weights, some_sources)
            losses.append(loss)
            inputs = [*trained, *([] if gradient is None else [some_hidden])]
            by_inputs = torch.autograd.grad(logits, inputs, by_logits, allow_unused=True)
            del logits, by_logits
            if gradient is not None:
                gradient[part] = by_inputs[-1]
            new = by_inputs[: len(trained)]
            sums = [a if b is None else a.add_(b) for a, b in zip(sums, new, strict=True)] if losses[1:] else list(new)
        ctx.gradients = [gradient, *sums]
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # not kept: they are scaled in place
        return (None, None, None, None, None, *(_scale(gradient, scale) for gradient in gradients))


def _scale(tensor: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
    """Multiply `tensor` in place by a float32 number. In 16 bits a product would first round the number to 16 bits."""
    if tensor is None or tensor.dtype == torch.float32:
        return tensor if tensor is None else tensor.mul_(scale)
    for part in tensor.split(4096):
        part.copy_(part.float() * scale)
    return tensor


class SumOfTerms(torch.autograd.Function):
    """Sums the terms of logits. Their gradient is computed with the sum, and takes the place of the logits in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        model: PreTrainedModel,
        logits: torch.Tensor,
        targets: torch.Tensor,
        weights: torch.Tensor | None,
        sources: torch.Tensor | None,
    ) -> torch.Tensor:
        loss, gradient = _loss_and_gradient(model, logits.detach(), targets, weights, sources)
        ctx.save_for_backward(gradient)  # so that a chunk that is recomputed later does not keep it
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return None, gradient.mul_(scale), None, None, None


def _loss_and_gradient(
    model: Any,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    sources: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of the terms of logits [n, vocabulary], float32 [], and its gradient in the place of the logits.

    Each target t [n] has the term -(1 - s) * log p[t] - s * mean of log p + z * (log Z)^2, all times its weight. Z is
    the sum of exp(logits); the squared term keeps it near 1 (z-loss: PaLM, arXiv 2204.02311, section 5). Label
    smoothing s: Szegedy et al. 2016, arXiv 1512.00567, section 7. With log p[j] = logit[j] - log Z the gradient by
    logit[j] is (1 + 2 * z * log Z) * p[j] - s / vocabulary, and less 1 - s where j = t, all times the weight.
    """
    smoothing, z_coef = (model.label_smoothing, model.z_loss_coef) if model.training else (0.0, 0.0)
    # Each step overwrites the last one: log_softmax would need a second matrix, and its exp is ten times less exact.
    largest = logits.amax(1, keepdim=True)
    logits -= largest
    at_target = logits.gather(1, targets[:, None]).squeeze(1)
    mean = logits.mean(1) if smoothing else at_target
    sums = logits.exp_().sum(1)
    log_sums = sums.log()
    terms = log_sums - at_target
    if smoothing:
        terms -= smoothing * (mean - at_target)
    factors = 1 / sums
    if z_coef:
        log_z = log_sums + largest.squeeze(1)
        terms += z_coef * log_z.square()
        factors *= 1 + 2 * z_coef * log_z

    # From here on `logits` becomes the gradient.
    if weights is None:
        weights = torch.ones_like(terms)
    logits *= (factors * weights)[:, None]
    if smoothing:
        logits -= (smoothing / logits.shape[1] * weights)[:, None]
    logits.scatter_add_(1, targets[:, None], ((smoothing - 1) * weights)[:, None])
    terms = terms * weights
    if sources is not None and model.source_sums is not None:
        model.source_sums.index_add_(0, sources, torch.stack([terms, weights], 1).double())
    return terms.sum(), logits


def _chunk_loss(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    sources: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of hidden [n, width] for targets [n], float32 []; for n = 0 it is 0, with a gradient graph."""
    return SumOfTerms.apply(model, project(model, hidden).float(), targets, weights, sources)  # type: ignore


def sum_terms(
    model: PreTrainedModel,
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None,
    sources: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over logits [n, vocabulary] of the terms of targets [n], each times its weight if there are any."""
    labeled = (targets != IGNORED).float()
    weights = labeled if weights is None else labeled * weights
    logits = logits.to(torch.float32, copy=True)  # the family may need its own for the gradient
    return SumOfTerms.apply(model, logits, targets.clamp(min=0), weights, sources)  # type: ignore


def project(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Return the logits [n, vocabulary] of hidden [n, width], with the scales and caps of some families."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)  # type: ignore
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite; HyperCLOVA multiplies, on the stock path
        logits = logits / scale
    if scale := getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = torch.tanh(logits / cap) * cap
    return logits
