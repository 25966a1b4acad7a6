"""Answers of several prompts together: in each step they see the same tokens, and their mean chooses the next one."""

from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from accel_llm.errors import ConfigError


class MeanOfMembers(LogitsProcessor):
    """Gives each group of `members` rows the logarithm of the mean of their next-token probabilities."""

    def __init__(self, members: int):
        self.members = members

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        mean = scores.float().softmax(-1).unflatten(0, (-1, self.members)).mean(1)
        return mean.log().repeat_interleave(self.members, 0).to(scores.dtype)


class OneRow:
    """Passes the tokens of the first row on to a streamer, which takes one row only."""

    def __init__(self, streamer: Any):
        self.streamer = streamer

    def put(self, tokens: torch.Tensor) -> None:
        """Pass the first row of the prompts [rows, L], or the first of the next tokens [rows], on."""
        self.streamer.put(tokens[:1])

    def end(self) -> None:
        """Tell the streamer that the answer is complete."""
        self.streamer.end()


def answering_together(members: int, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of `generate` for rows of which each group of `members` has one answer, the most probable.

    Lester et al. 2021 (arXiv 2104.08691, section 6) let the prompts vote by whole answers, which have few values there;
    for free text the mean of the probabilities decides about each token.

    Raises:
        ConfigError: the answer is to be drawn at random, which each row would do by itself.
    """
    if getattr(kwargs.get("generation_config"), "do_sample", False) or kwargs.get("do_sample"):
        raise ConfigError("temperature: the prompts of an ensemble choose the most probable token; set it to 0.")
    streamer = {"streamer": OneRow(kwargs["streamer"])} if kwargs.get("streamer") else {}
    processors = LogitsProcessorList([MeanOfMembers(members), *kwargs.get("logits_processor", [])])
    return kwargs | streamer | {"logits_processor": processors}
