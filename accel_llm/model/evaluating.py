"""A block in which a model is evaluated."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, the model is in evaluation mode and no gradients are kept."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()
