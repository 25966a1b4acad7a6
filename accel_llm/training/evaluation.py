"""Mean loss and exact match on held-out rows; each row counts once, whatever the number of processes."""

import math
import signal
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedTokenizerFast

from accel_llm.backend.accelerator import unwrap_model
from accel_llm.backend.collectives import agree_on_requests, sum_over_processes
from accel_llm.backend.strategy import strategy
from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate, count_targets, total_weight
from accel_llm.data.packing import pack
from accel_llm.data.rows import Rows
from accel_llm.model.attention import stock_attention
from accel_llm.model.generation import cut_at_stop, pad_left
from accel_llm.model.loss import next_token_loss
from accel_llm.model.tokenizer import pad_token_id
from accel_llm.report.metrics import Meter
from accel_llm.system.signals import Preempted, requested
from accel_llm.training.loop import to_device
from accel_llm.training.start import Start

LOWER_IS_BETTER = {"eval/loss"}


KEPT_SAMPLES = 20
Ids = tuple[np.ndarray, np.ndarray]


class Evaluation:
    """What is measured on held-out rows during a run, and when; nothing where there are none."""

    def __init__(
        self,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerFast,
        rows: Rows | None,
        options: TrainOptions,
        stop_ids: list[int],
    ):
        self.accelerator, self.tokenizer, self.options = accelerator, tokenizer, options
        self.rows, self.stop_ids = rows, stop_ids
        self.samples: list[dict[str, Any]] = []

        self.metrics: dict[str, float] = {}  # of the last evaluation
        self.step: int | None = None  # that it was of
        self.cut_short = False  # it was left when the run was asked to stop

    def at_start(self, model: Any, meter: Meter, start: Start) -> None:
        """What is asked for before the first step, or was cut short when the run was stopped."""
        if start.evaluate or (self.options.eval_on_start and start.step == 0):
            self.run(model, meter, start.step)
        if self.cut_short:
            raise Preempted(requested.stop or signal.SIGTERM, start.step)

    def when_due(self, model: Any, meter: Meter, step: int) -> None:
        every = self.options.eval_steps
        if step == meter.plan.total_steps or (every and step % every == 0):
            self.run(model, meter, step)

    def run(self, model: Any, meter: Meter, step: int) -> None:
        if self.rows is None:
            return
        try:
            with meter.pause_clock():
                metrics = mean_loss(self.accelerator, model, self.rows, self.options, pad_token_id(self.tokenizer))
                if asked := questions(self.rows, self.options.eval_generate):
                    size = self.options.per_device_eval_batch_size
                    scores, answers = exact_match(self.accelerator, model, self.tokenizer, asked, size, self.stop_ids)
                    metrics |= scores
                    self.samples = [asdict(answer) for answer in answers[:KEPT_SAMPLES]]
        except CutShort:
            self.cut_short = True
            return
        self.metrics, self.step = metrics, step
        meter.write(step, metrics)


class CutShort(Exception):
    """The run was asked to stop in the middle of an evaluation."""


def _go_on(accelerator: Accelerator) -> None:
    if agree_on_requests(accelerator)[0]:
        raise CutShort


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated answer beside the one in the data; both end with the end-of-turn token if they ended at all."""

    prompt: str
    expected: str
    generated: str

    @property
    def right(self) -> bool:
        return self.generated == self.expected


def mean_loss(
    accelerator: Accelerator, model: Any, rows: Rows, options: TrainOptions, pad_token_id: int
) -> dict[str, float]:
    """Mean next-token loss over every labelled token of `rows`, weighted as they are, and its exponential."""
    order, offsets = (
        pack(rows.lengths, options.max_length) if options.packing else (np.arange(len(rows)), np.arange(len(rows) + 1))
    )
    size, world = options.per_device_eval_batch_size, accelerator.num_processes
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    model.eval()
    with torch.no_grad():
        # Every process makes the same number of forward passes: under sharding each one is a collective.
        for first in range(0, len(offsets) - 1, size * world):
            _go_on(accelerator)
            mine = range(first + accelerator.process_index * size, first + (accelerator.process_index + 1) * size)
            chosen = [int(k) for b in mine if b < len(offsets) - 1 for k in order[offsets[b] : offsets[b + 1]]]
            batch = collate(rows, chosen, bool(options.packing), pad_token_id)
            batch = to_device(batch, accelerator.device)
            sums[0] += next_token_loss(model, batch)
            sums[1] += total_weight(batch)
            sums[2] += count_targets(batch["labels"])
    model.train()
    total, weight, count = sum_over_processes(accelerator, sums).tolist()
    loss = total / (weight or 1)
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/supervised_tokens": int(count)}


def questions(rows: Rows, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt ids, answer ids) of the last trained turn of the first `count` rows that have a prompt before it."""
    found = []
    for ids, labels in (rows[k] for k in range(len(rows))):
        if len(found) == count:
            break
        trained = np.flatnonzero(labels != IGNORED)
        if len(trained) == 0:
            continue
        gaps = np.flatnonzero(np.diff(trained) > 1)
        first, last = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1])
        if first > 0:
            found.append((ids[:first], ids[first : last + 1]))
    return found


def exact_match(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    asked: list[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    stop_ids: list[int],
) -> tuple[dict[str, float], list[GeneratedAnswer]]:
    """Answer each question greedily; the share of answers equal to the data's to the last token, end of turn included.

    Also `eval/stop_rate`, the share of answers that ended by themselves. The answers returned are this process's own.
    """
    share = asked[accelerator.process_index :: accelerator.num_processes]
    longest = max(len(answer) for _, answer in asked)
    settings = GenerationConfig(
        max_new_tokens=longest + 8, do_sample=False, eos_token_id=stop_ids, pad_token_id=tokenizer.pad_token_id
    )
    inner = unwrap_model(accelerator, model)
    per_process = -(-len(asked) // accelerator.num_processes)
    answers: list[GeneratedAnswer] = []
    stopped = 0
    inner.eval()
    # `generate` is not a wrapped forward: without autocast float32 adapter parts would meet bf16 activations.
    with torch.no_grad(), accelerator.autocast(), stock_attention(inner):
        for first in range(0, per_process, batch_size):
            _go_on(accelerator)
            # A process with fewer questions repeats one, so that all make the same number of calls.
            batch = share[first : first + batch_size] or asked[:1]
            inputs = pad_left([prompt for prompt, _ in batch], pad_token_id(tokenizer), accelerator.device)
            output = inner.generate(**inputs, generation_config=settings, synced_gpus=strategy() in ("zero3", "fsdp2"))
            for (prompt, expected), made in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                if first < len(share):
                    made, ended = cut_at_stop(made, stop_ids)
                    stopped += ended
                    answers.append(
                        GeneratedAnswer(*(decode_tokens(tokenizer, ids) for ids in (prompt, expected, made)))
                    )
    inner.train()
    right = sum(answer.right for answer in answers)
    totals = torch.tensor([right, stopped, len(answers)], dtype=torch.float64, device=accelerator.device)
    right, stopped, count = sum_over_processes(accelerator, totals).tolist()
    return {"eval/exact_match": right / count, "eval/stop_rate": stopped / count}, answers
