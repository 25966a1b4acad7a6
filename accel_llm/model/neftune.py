"""Noise on the input embeddings while training."""

import torch
from torch import nn


def neftune(model: nn.Module, alpha: float | None) -> None:
    """Adds noise to the input embeddings while training: uniform in +-alpha / sqrt(L d) (NEFTune, arXiv 2310.05914).

    L is the length of the token's own document, so alpha means the same packed and padded; d is the width. It is
    read from what `model`'s forward is called with (`cu_seq_lens_q` of a packed batch, else `attention_mask`), so
    `model` is the outermost one that is prepared, PEFT's included. The noise comes from the device's global
    generator: ranks must be seeded apart for it to differ.
    """
    if not alpha:
        return
    lengths: list[torch.Tensor] = []

    def remember_lengths(module: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.clear()
        if (boundaries := kwargs.get("cu_seq_lens_q")) is not None:
            documents = boundaries.diff()
            tokens = kwargs["input_ids"].shape[-1]
            lengths.append(documents.repeat_interleave(documents, output_size=tokens)[None, :, None])
        elif (mask := kwargs.get("attention_mask")) is not None:
            lengths.append(mask.sum(-1)[:, None, None])

    def add_noise(module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        tokens, width = embedded.shape[-2:]
        length = lengths[0].clamp(min=1) if lengths else torch.tensor(tokens)
        bound = alpha * (length * width).float().rsqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * bound.to(embedded.dtype)

    model.register_forward_pre_hook(remember_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[operator]
