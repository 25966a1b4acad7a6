"""Noise on the input embeddings during training (NEFTune)."""

import torch
from torch import nn

from accel_llm.model.virtual_tokens import count_virtual_tokens


def attach_neftune(model: nn.Module, alpha: float | None) -> None:
    """Add uniform noise in +-alpha / sqrt(L d) to the input embeddings in training mode (NEFTune, arXiv 2310.05914).

    L is the length of the token's own document, so `alpha` means the same for packed and padded batches; d is the
    width of the embedding. Virtual tokens have no noise and do not count, but a shared prompt does. L is read from the
    arguments of `model`'s forward: from `cu_seq_lens_k` of a packed batch, else from `attention_mask`. So `model` must
    be the outermost module before `accelerator.prepare`, PEFT's wrapper included.

    The noise comes from the device's global generator. Seed each rank differently, or all ranks draw the same noise.
    """
    if not alpha:
        return
    virtual = count_virtual_tokens(model)
    # Lengths of the current batch, one tensor that broadcasts to [rows, tokens, 1]; written by one hook for the other.
    lengths: list[torch.Tensor] = []

    def remember_lengths(module: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.clear()
        if (boundaries := kwargs.get("cu_seq_lens_q")) is not None:
            tokens = kwargs["input_ids"].shape[-1]
            # Giving output_size avoids a synchronization with the GPU.
            per_token = (
                kwargs.get("cu_seq_lens_k", boundaries).diff().repeat_interleave(boundaries.diff(), output_size=tokens)
            )
            lengths.append(per_token[None, :, None] - virtual)
        elif (mask := kwargs.get("attention_mask")) is not None:
            lengths.append(mask.sum(-1)[:, None, None] - virtual)

    def add_noise(module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        tokens, width = embedded.shape[-2:]
        length = lengths[0].clamp(min=1) if lengths else torch.tensor(tokens)
        bound = alpha * (length * width).float().rsqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * bound.to(embedded.dtype)

    model.register_forward_pre_hook(remember_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[operator]
