"""Answers to many prompts, some at a time: each is the answer that its prompt gets alone, whatever is asked beside it."""

from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from accel_llm.model.answers import Dialogue
from accel_llm.model.generation import cut_at_stop, pad_left
from accel_llm.model.tokenizer import pad_token_id

# Settings of a model's generation config that look at the tokens before the answer, and take padding for text
# (transformers 5.24). A repetition penalty leaves padding out.
_LOOK_BACK = ("no_repeat_ngram_size", "min_length", "bad_words_ids", "sequence_bias")

# Tokens of padding in a batch of prompts. As long a prompt takes less time than another batch of answers does.
PADDING = 2048


class PromptRow(NamedTuple):
    """The token ids of a prompt, and the number of its row, from 0 over all rows of the input."""

    number: int
    ids: list[int]


class BatchAnswer(NamedTuple):
    """An answer: its text, whether it ended by a stop token, and its tokens, the stop token included."""

    text: str
    stopped: bool
    tokens: int


class QuestionBatches:
    """Cuts questions into batches and answers them, within `limit` positions (None: no limit) for prompt and answer."""

    def __init__(self, dialogue: Dialogue, limit: int | None, size: int, seed: int):
        self.dialogue, self.limit, self.size, self.seed = dialogue, limit, size, seed
        settings: Any = dialogue.settings
        self.max_new_tokens: int = settings.max_new_tokens
        own = dialogue.model.generation_config
        self.may_pad = not any(getattr(own, name, None) for name in _LOOK_BACK) and ignores_padding(dialogue.model)

    def cut(self, questions: list[PromptRow]) -> list[list[PromptRow]]:
        """Return batches of at most `size` questions, the longest first: too little memory shows at once.

        In a batch all may have answers of `max_new_tokens`. Questions without so much room, and all if padding changes
        what the model computes, share a batch only with those of the same length. A few long ones share none with short
        ones, which would be padded to their length.
        """
        batches: list[list[PromptRow]] = []
        padding = 0  # of the last batch
        for question in sorted(questions, key=lambda question: (-len(question.ids), question.number)):
            length, last = len(question.ids), batches[-1] if batches else []
            fits = last and (
                len(last[0].ids) == length or (self.may_pad and self._room(len(last[0].ids)) == self.max_new_tokens)
            )
            if fits and len(last) < self.size and padding + len(last[0].ids) - length <= PADDING:
                last.append(question)
                padding += len(last[0].ids) - length
            else:
                batches.append([question])
                padding = 0
        return batches

    def _room(self, length: int) -> int:
        """Return how many tokens may follow a prompt."""
        return self.max_new_tokens if self.limit is None else min(self.max_new_tokens, self.limit - length)

    def answer(self, batch: list[PromptRow]) -> list[BatchAnswer]:
        """Answer the questions of one batch, see `cut`.

        With sampling, an answer depends on the seed and on the row of its question.
        """
        model, tokenizer = self.dialogue.model, self.dialogue.tokenizer
        inputs = _pad(batch, pad_token_id(tokenizer), model.device)
        width = inputs["input_ids"].shape[1]
        changes = {"max_new_tokens": self._room(width), "num_beams": 1, "num_return_sequences": 1}
        settings: Any = GenerationConfig.from_dict(self.dialogue.settings.to_dict() | changes)
        sampling = {"custom_generate": self._sampler(batch)} if settings.do_sample else {}
        output = model.generate(**inputs, generation_config=settings, **sampling)
        answers = []
        for ids in output[:, width:].tolist():
            ids, stopped = cut_at_stop(ids, settings.eos_token_id)
            answers.append(BatchAnswer(str(tokenizer.decode(ids, skip_special_tokens=True)), stopped, len(ids)))
        return answers

    def _sampler(self, batch: list[PromptRow]) -> Any:
        """Return a function in the place of transformers' `_sample`, with random numbers of each row's own.

        transformers 5.24 draws all rows of a batch from one generator, so that each depends on the others.
        """
        rows = [np.random.default_rng([self.seed, question.number]).random(self.max_new_tokens) for question in batch]
        numbers = torch.from_numpy(np.stack(rows)).to(self.dialogue.model.device)

        def sample(model: Any, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, **arguments: Any) -> Any:
            # An ensemble of prompts has several rows for each question.
            own = numbers.repeat_interleave(len(input_ids) // len(batch), 0)
            # Behind temperature, top_k and the like, which a `logits_processor` of `generate` would precede.
            processors = LogitsProcessorList([*logits_processor, OwnNumbers(own, input_ids.shape[1])])
            return model._sample(input_ids, processors, **arguments)

        return sample


class OwnNumbers(LogitsProcessor):
    """Leaves each row only the token that its next random number draws (inverse transform sampling).

    `numbers`, float64 [rows, tokens], are uniform in [0, 1); `width` is the length of the prompts.
    """

    def __init__(self, numbers: torch.Tensor, width: int):
        self.numbers, self.width = numbers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        sums = scores.double().softmax(-1).cumsum(-1)
        drawn = self.numbers[:, input_ids.shape[1] - self.width, None] * sums[:, -1:]
        chosen = torch.searchsorted(sums, drawn, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def _pad(batch: list[PromptRow], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    return pad_left([np.array(question.ids) for question in batch], pad, device)


class _Recorder(LogitsProcessor):
    """Keeps the scores of the last row at each step."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.steps.append(scores[-1].float().nan_to_num(neginf=0.0))
        return scores


def ignores_padding(model: Any) -> bool:
    """Tell whether a prompt that is padded on the left gets the scores that it gets alone, for two tokens."""
    rows = model.get_input_embeddings().weight.shape[0]
    long, short = (PromptRow(0, [k * 7 % rows for k in range(1, count)]) for count in (9, 5))
    settings = GenerationConfig(max_new_tokens=2, min_new_tokens=2, do_sample=False, num_beams=1, pad_token_id=0)
    scores = []
    for batch in ([short], [long, short]):
        recorder = _Recorder()
        processors = LogitsProcessorList([recorder])
        model.generate(**_pad(batch, 0, model.device), generation_config=settings, logits_processor=processors)
        scores.append(torch.stack(recorder.steps))
    alone, beside = scores
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    return bool((alone - beside).abs().max() <= tolerance * alone.abs().max())
