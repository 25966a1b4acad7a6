"""Mean loss and exact match on held-out rows. Each row counts once, with any number of processes."""

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
from accel_llm.system.signals import Preempted, signal_requests
from accel_llm.training.loop import to_device
from accel_llm.training.start import Start

LOWER_IS_BETTER = {"eval/loss"}  # with all other metrics higher is better
MAX_SAMPLES_KEPT = 20
EXTRA_TOKENS = 8  # an answer may be this much longer than the longest one in the data


class Evaluation:
    """Evaluates held-out rows when it is due during a run. Without such rows it does nothing."""

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
        # Results of the last complete evaluation, and its step.
        self.samples: list[dict[str, Any]] = []  # generated answers, for run.json
        self.metrics: dict[str, float] = {}
        self.step: int | None = None
        self.cut_short = False  # the last evaluation was interrupted because the run shall stop

    def at_start(self, model: Any, meter: Meter, start: Start) -> None:
        """Evaluate before the first step if `eval_on_start` is set, or if a stopped run left an evaluation unfinished.

        Raises:
            Preempted: the run was asked to stop during this evaluation.
        """
        if start.evaluate or (self.options.eval_on_start and start.step == 0):
            self.run(model, meter, start.step)
        if self.cut_short:
            raise Preempted(signal_requests.stop or signal.SIGTERM, start.step)

    def when_due(self, model: Any, meter: Meter, step: int) -> None:
        """Evaluate every `eval_steps` and after the last step."""
        every = self.options.eval_steps
        if step == meter.plan.total_steps or (every and step % every == 0):
            self.run(model, meter, step)

    def run(self, model: Any, meter: Meter, step: int) -> None:
        """Evaluate now, and write the metrics as those of `step`.

        If the run is asked to stop meanwhile, nothing is written and `cut_short` is set.
        """
        if self.rows is None:
            return
        try:
            with meter.pause_clock():
                metrics = mean_loss(self.accelerator, model, self.rows, self.options, pad_token_id(self.tokenizer))
                if questions := select_questions(self.rows, self.options.eval_generate):
                    size = self.options.per_device_eval_batch_size
                    scores, answers = exact_match(
                        self.accelerator, model, self.tokenizer, questions, size, self.stop_ids
                    )
                    metrics |= scores
                    self.samples = [asdict(answer) for answer in answers[:MAX_SAMPLES_KEPT]]
        except EvaluationInterrupted:
            self.cut_short = True
            return
        self.metrics, self.step = metrics, step
        meter.write(step, metrics)


def find_new_best(
    metric: str | None, evaluation: Evaluation, step: int, best: tuple[int, float] | None
) -> tuple[int, float] | None:
    """Return (step, value) if the evaluation of `step` is better by `metric` than `best`, the best so far; else None.

    A value that is not finite is never better.
    """
    if metric is None or evaluation.step != step:
        return None
    value = evaluation.metrics[metric]
    sign = 1 if metric in LOWER_IS_BETTER else -1
    if not math.isfinite(value) or (best is not None and sign * value >= sign * best[1]):
        return None
    return step, value


class EvaluationInterrupted(Exception):
    """The run was asked to stop in the middle of an evaluation."""


def _check_stop(accelerator: Accelerator) -> None:
    """Raise EvaluationInterrupted on all processes if one of them was asked to stop."""
    if agree_on_requests(accelerator)[0]:
        raise EvaluationInterrupted


@dataclass(frozen=True)
class GeneratedAnswer:
    """A generated answer beside the one in the data. Both include their end-of-turn token if they have one."""

    prompt: str
    expected: str
    generated: str

    @property
    def right(self) -> bool:
        return self.generated == self.expected


def mean_loss(
    accelerator: Accelerator, model: Any, rows: Rows, options: TrainOptions, pad_token_id: int
) -> dict[str, float]:
    """Return the mean next-token loss over all labeled tokens of `rows`, by their weights, and its exponential.

    The sums are float64 and taken over all processes, so batch size and number of processes do not change the loss.
    """
    # Packed row `b` holds the documents `order[offsets[b] : offsets[b + 1]]`; without packing it holds one.
    order, offsets = (
        pack(rows.lengths, options.max_length) if options.packing else (np.arange(len(rows)), np.arange(len(rows) + 1))
    )
    count, size, world = len(offsets) - 1, options.per_device_eval_batch_size, accelerator.num_processes
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)
    model.eval()
    with torch.no_grad():
        # Sharded weights are gathered in each forward pass, so every process must make the same number of passes. A
        # process that has no rows left gets a batch without labels.
        for first in range(0, count, size * world):
            _check_stop(accelerator)
            start = first + accelerator.process_index * size
            packed_rows = range(start, min(start + size, count))
            documents = [int(k) for b in packed_rows for k in order[offsets[b] : offsets[b + 1]]]
            batch = collate(rows, documents, bool(options.packing), pad_token_id)
            batch = to_device(batch, accelerator.device)
            sums[0] += next_token_loss(model, batch)
            sums[1] += total_weight(batch)
            sums[2] += count_targets(batch["labels"])
    model.train()
    total, weight, targets = sum_over_processes(accelerator, sums).tolist()
    loss = total / (weight or 1)
    # exp overflows a float64 above 709.
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700.0)), "eval/supervised_tokens": int(targets)}


def select_questions(rows: Rows, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the last trained turn of the first `count` rows with a prompt before it, as (prompt ids, answer ids)."""
    questions = []
    for ids, labels in (rows[k] for k in range(len(rows))):
        if len(questions) == count:
            break
        trained = np.flatnonzero(labels != IGNORED)
        if len(trained) == 0:
            continue
        # The last turn begins behind the last gap between trained positions.
        gaps = np.flatnonzero(np.diff(trained) > 1)
        first, last = int(trained[gaps[-1] + 1] if len(gaps) else trained[0]), int(trained[-1])
        if first > 0:
            questions.append((ids[:first], ids[first : last + 1]))
    return questions


def exact_match(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    stop_ids: list[int],
) -> tuple[dict[str, float], list[GeneratedAnswer]]:
    """Answer each of `questions` (prompt ids, answer ids) greedily and compare the answers with those of the data.

    Returns:
        `eval/exact_match`, the share of answers equal to the data's in every token, end of turn included, and
        `eval/stop_rate`, the share of answers that ended by a stop token, both over all processes; and the answers of
        this process.
    """
    own_questions = questions[accelerator.process_index :: accelerator.num_processes]
    per_process = -(-len(questions) // accelerator.num_processes)
    longest = max(len(answer) for _, answer in questions)
    settings = GenerationConfig(
        max_new_tokens=longest + EXTRA_TOKENS,
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    inner = unwrap_model(accelerator, model)
    answers: list[GeneratedAnswer] = []
    stopped = 0
    inner.eval()
    # Autocast, because `generate` bypasses the forward that `prepare` wraps: without it the float32 parts of an adapter
    # would meet bf16 activations. Packed attention cannot generate, so the model's own takes its place.
    with torch.no_grad(), accelerator.autocast(), stock_attention(inner):
        for first in range(0, per_process, batch_size):
            _check_stop(accelerator)
            # A process that has no questions left repeats one, so that all make the same number of calls.
            batch = own_questions[first : first + batch_size] or questions[:1]
            inputs = pad_left([prompt for prompt, _ in batch], pad_token_id(tokenizer), accelerator.device)
            output = inner.generate(**inputs, generation_config=settings, synced_gpus=strategy() in ("zero3", "fsdp2"))
            generated = output[:, inputs["input_ids"].shape[1] :].tolist()
            for (prompt, expected), token_ids in zip(batch, generated, strict=True):
                if first < len(own_questions):
                    token_ids, ended = cut_at_stop(token_ids, stop_ids)
                    stopped += ended
                    texts = (decode_tokens(tokenizer, ids) for ids in (prompt, expected, token_ids))
                    answers.append(GeneratedAnswer(*texts))
    inner.train()
    right = sum(answer.right for answer in answers)
    totals = torch.tensor([right, stopped, len(answers)], dtype=torch.float64, device=accelerator.device)
    right, stopped, count = sum_over_processes(accelerator, totals).tolist()
    return {"eval/exact_match": right / count, "eval/stop_rate": stopped / count}, answers
