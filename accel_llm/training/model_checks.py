"""Checks at the start that run the model: the loss is the family's own, and no text sees another one."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from accel_llm.backend.accelerator import local_part, reshard
from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import TrainOptions
from accel_llm.model.classifier import check_scores
from accel_llm.model.loss import check_loss
from accel_llm.model.probe import check_causality, check_isolation
from accel_llm.model.text_probe import check_text_scores


def check_model(model: nn.Module, device: torch.device, dtype: torch.dtype, options: TrainOptions, move: bool) -> str:
    """Run the prepared model on small rows, and return how its loss is computed, for run.json.

    `dtype` is the dtype of the matrix products. With `move` the weights of the adapter are others within the checks,
    see `_moved`. All processes must call it.

    Raises:
        ConfigError: the loss, or the scores, are not those of the family, a token sees a later one, or a text of a batch
            another text.
    """
    together = options.packing or max(options.per_device_train_batch_size, options.per_device_eval_batch_size) > 1
    if isinstance(options, ClassifyOptions):  # an encoder sees later tokens
        with _moved(model) if move else nullcontext():
            if together:
                check_text_scores(model, device, dtype, options.max_length)
        return "scores"
    loss_path = (check_scores if options.gives_scores else check_loss)(model, device, dtype)
    with _moved(model) if move else nullcontext():
        check_causality(model, device, dtype)
        if together:
            check_isolation(model, device, dtype, bool(options.packing), options.max_length)
    return loss_path


@contextmanager
def _moved(model: nn.Module) -> Iterator[None]:
    """Within the block, move the weights of an adapter by 1% at random, those that are 0 by 0.01.

    A fresh adapter often adds nothing, so one that lets tokens see others would not be noticed. All processes move
    their copies alike. Afterwards all weights are the same to the last bit.
    """
    reshard(model)
    trained: list[Any] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Tensors, and how many of their first elements are the weight's.
    parts = [(local_part(parameter.data), parameter.numel()) for parameter in trained]
    for parameter in trained:
        # ZeRO-3 has a share of each weight beside the weight, which is empty or whole. The last shares end with padding,
        # which DeepSpeed 0.19.8 never sets: any number may stand there.
        if (share := getattr(parameter, "ds_tensor", None)) is not None:
            before = torch.distributed.get_rank(parameter.ds_process_group) * share.numel()
            parts.append((share, max(0, parameter.ds_numel - before)))
    kept = [part.to("cpu", copy=True) for part, _ in parts]
    for number, (part, own) in enumerate(parts):
        generator = torch.Generator(part.device).manual_seed(number)
        noise = torch.randn(part.shape, generator=generator, device=part.device)
        weights = part.flatten()[:own].float()
        size = float(weights.square().mean().sqrt()) if len(weights) else 0.0
        part.add_((0.01 * (size or 1.0) * noise).to(part.dtype))
    try:
        yield
    finally:
        for (part, _), before in zip(parts, kept, strict=True):
            part.copy_(before)
        reshard(model)
