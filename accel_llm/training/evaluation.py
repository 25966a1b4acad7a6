"""Mean loss and exact match on held-out rows. Each row counts once, with any number of processes."""

import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import GenerationConfig, PreTrainedTokenizerFast

from accel_llm.backend.accelerator import unwrap_model
from accel_llm.backend.collectives import agree_on_requests, sum_on_cpus
from accel_llm.backend.strategy import strategy
from accel_llm.chat.span_tokenizer import decode_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.data.batches import collate, to_device
from accel_llm.data.packing import pack
from accel_llm.data.rows import Rows
from accel_llm.data.source_names import add_sources, evaluated_sources
from accel_llm.model.attention import stock_attention, unwrap_causal_lm
from accel_llm.model.evaluating import evaluating
from accel_llm.model.generation import cut_at_stop, pad_left, without_own_settings
from accel_llm.model.loss import next_token_loss
from accel_llm.model.positions import positions_for_tokens
from accel_llm.model.token_bytes import bits_per_byte, label_bytes, token_bytes
from accel_llm.model.tokenizer import pad_token_id
from accel_llm.report.metrics import Meter
from accel_llm.report.summary import show_answers, show_continued_texts
from accel_llm.report.trackers import describe_error
from accel_llm.system.progress import tracked
from accel_llm.system.signals import Preempted, signal_requests
from accel_llm.training.start import Start
from accel_llm.training.text_samples import SHARDED, continue_texts, samples_are_due

PromptAndAnswer = tuple[np.ndarray, np.ndarray]  # ids of the prompt and of the answer
Measure = Callable[[Accelerator, Any, Rows, TrainOptions, int], dict[str, float]]  # as `mean_loss`
MAX_SAMPLES_KEPT = 20
SAMPLES_SHOWN = 2
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
        measure: Measure | None = None,
    ):
        """`measure` returns the metrics of the rows; without it they are those of `mean_loss`."""
        self.accelerator, self.tokenizer, self.options = accelerator, tokenizer, options
        self.rows, self.stop_ids, self.measure = rows, stop_ids, measure or mean_loss
        # Results of the last complete evaluation, and its step.
        self.samples: list[dict[str, Any]] = []  # generated answers, for run.json
        self.metrics: dict[str, float] = {}
        self.step: int | None = None
        self.cut_short = False  # the last evaluation was interrupted because the run shall stop
        self.text_sizes = _text_sizes(tokenizer, rows, options)

    def at_start(self, model: Any, meter: Meter, start: Start) -> None:
        """Evaluate before the first step if `eval_on_start` is set, or if a stopped run left an evaluation unfinished.

        Raises:
            Preempted: the run was asked to stop during this evaluation.
        """
        if start.evaluate or (self.options.eval_on_start and start.step == 0):
            meter.drop_evaluation(start.step)
            self.run(model, meter, start.step)
            self._write_samples(model, meter, start.step)
        if self.cut_short:
            raise Preempted(signal_requests.stop or signal.SIGTERM, start.step)

    def when_due(self, model: Any, meter: Meter, step: int) -> None:
        """Evaluate every `eval_steps`, and continue texts every `sample_steps`, but not after the last step.

        `at_end` does that. One of a single process that fails is a problem of the run, which goes on.
        """
        every = self.options.eval_steps
        if step == meter.plan.total_steps:
            return
        try:
            if every and step % every == 0:
                self.run(model, meter, step)
            if samples_are_due(self.options, step):
                self._write_samples(model, meter, step)
        except Exception as error:
            if self.accelerator.num_processes > 1:  # the others may wait for this one
                raise
            meter.record.add_problem(f"The evaluation after step {step} failed ({describe_error(error)}).")

    def at_end(self, model: Any, meter: Meter, exported: Path, step: int) -> None:
        """Evaluate after `step`, the last one, unless it was evaluated when it was due. The model is already `exported`.

        Raises:
            RuntimeError: the evaluation failed.
        """
        if self.step == step:  # its evaluation is the reason why the run stops early
            return
        try:
            meter.drop_evaluation(step)
            self.run(model, meter, step)
            self._write_samples(model, meter, step)
        except Exception as error:
            raise RuntimeError(
                f"The evaluation after the last step failed ({describe_error(error)}). The trained model is complete in "
                f"{exported}; the same command evaluates it again."
            ) from error

    def run(self, model: Any, meter: Meter, step: int) -> None:
        """Evaluate now, and write the metrics as those of `step`.

        If the run is asked to stop meanwhile, nothing is written and `cut_short` is set.
        """
        if self.rows is None:
            return
        try:
            with meter.pause_clock():
                metrics = self.measure(self.accelerator, model, self.rows, self.options, pad_token_id(self.tokenizer))
                for name, (targets, size) in self.text_sizes.items():
                    metrics[f"eval/bits_per_byte{name}"] = bits_per_byte(metrics[f"eval/loss{name}"], targets, size)
                if questions := select_questions(self.rows, self.options.eval_generate):
                    size = questions_in_batch(questions, self.options)
                    scores, answers = exact_match(
                        self.accelerator, model, self.tokenizer, questions, size, self.stop_ids
                    )
                    metrics |= scores
                    self.samples = [asdict(answer) for answer in answers[:MAX_SAMPLES_KEPT]]
        except EvaluationInterrupted:
            self.cut_short = True
            return
        self.metrics, self.step = metrics, step
        meter.write(step, metrics, self.samples)
        if self.accelerator.is_main_process and step < meter.plan.total_steps:  # the end of the run shows the last ones
            show_answers(self.samples, SAMPLES_SHOWN)

    def _write_samples(self, model: Any, meter: Meter, step: int) -> None:
        """Continue the texts of `sample_text`, show them, and keep them for report.html as those of `step`."""
        if self.cut_short or not getattr(self.options, "sample_text", None):
            return
        with meter.pause_clock():
            texts = continue_texts(self.accelerator, model, self.tokenizer, self.options, self.stop_ids)
            answers = self.samples if self.step == step else []
            meter.keep(step, [*texts, *answers])
        if self.accelerator.is_main_process:
            show_continued_texts(texts, step)


def _text_sizes(
    tokenizer: PreTrainedTokenizerFast, rows: Rows | None, options: TrainOptions
) -> dict[str, tuple[int, int]]:
    """Return how many tokens of plain text the labels of `rows` are, and how many bytes: of all under "", and "/NAME".

    Each source has a NAME if there are several. Nothing is returned if the bytes are not known exactly.
    """
    if rows is None or rows.weights is not None or not isinstance(options, PretrainOptions):
        return {}
    known = token_bytes(tokenizer)
    sizes = known and label_bytes(rows, known)
    if sizes is None or not sizes.sum():
        return {}
    targets = np.add.reduceat(np.asarray(rows.labels) != IGNORED, rows.offsets[:-1], dtype=np.int64)
    names, sources = evaluated_sources(rows, options.train_files, options.eval_files)
    found = {"": (int(targets.sum()), int(sizes.sum()))}
    for number, name in enumerate(names if len(names) > 1 else []):
        of_source = sources == number
        if sizes[of_source].any():
            found[f"/{name}"] = int(targets[of_source].sum()), int(sizes[of_source].sum())
    return found


class EvaluationInterrupted(Exception):
    """The run was asked to stop in the middle of an evaluation."""


def check_stop(accelerator: Accelerator) -> None:
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

    If the rows are of several sources, both are there for each of them too, as `eval/loss/NAME`. The sums are float64
    and taken over all processes, so batch size and number of processes do not change the loss.
    """
    names, sources = evaluated_sources(rows, options.train_files, options.eval_files)
    of_sources = torch.zeros(len(names), 2, dtype=torch.float64, device=accelerator.device)  # sums of loss and weight
    # Packed row `b` holds the documents `order[offsets[b] : offsets[b + 1]]`; without packing it holds one.
    virtual, single = options.virtual_tokens, (np.arange(len(rows)), np.arange(len(rows) + 1))
    order, offsets = pack(rows.lengths + virtual, options.max_length) if options.packing else single
    count, size, world = len(offsets) - 1, options.per_device_eval_batch_size, accelerator.num_processes
    total, weight, targets = torch.zeros((), dtype=torch.float64, device=accelerator.device), 0.0, 0
    with evaluating(model):
        # Sharded weights are gathered in each forward pass, so every process must make the same number of passes. A
        # process that has no rows left gets a batch without labels.
        for first in tracked(range(0, count, size * world), "evaluate"):
            check_stop(accelerator)
            start = first + accelerator.process_index * size
            packed_rows = range(start, min(start + size, count))
            documents = [int(k) for b in packed_rows for k in order[offsets[b] : offsets[b + 1]]]
            batch = collate(rows, documents, bool(options.packing), pad_token_id, virtual)
            if options.prompt_ensemble > 1:  # the prompts take turns
                batch["prompt_numbers"] = torch.tensor([k % options.prompt_ensemble for k in documents] or [0])
            if len(names) > 1:
                add_sources(batch, sources[documents].tolist(), names)
            batch = to_device(batch, accelerator.device)
            total += next_token_loss(model, batch)
            if len(names) > 1:
                of_sources += torch.stack(list(batch["measured"].values()))
            weight, targets = weight + batch["total_weight"], targets + batch["num_targets"]
    # The host waits for the device only here.
    on_device = torch.cat([total[None], of_sources.flatten()]).tolist()
    summed, *of_each, weight, targets = sum_on_cpus(accelerator, [*on_device, weight, targets])
    losses = {"": summed / (weight or 1)}
    if len(names) > 1:  # a source of which no row is held out has no loss
        parts = zip(names, of_each[::2], of_each[1::2], strict=True)
        losses |= {f"/{name}": part / weight_of_it for name, part, weight_of_it in parts if weight_of_it}
    metrics = {f"eval/loss{name}": loss for name, loss in losses.items()}
    # exp overflows a float64 above 709.
    metrics |= {f"eval/perplexity{name}": math.exp(min(loss, 700.0)) for name, loss in losses.items()}
    return metrics | {"eval/supervised_tokens": int(targets)}


def select_questions(rows: Rows, count: int) -> list[PromptAndAnswer]:
    """Return the last trained turn of the first `count` rows with a prompt before it, as (prompt ids, answer ids).

    Of answers that are compared only chosen or desirable ones are taken.
    """
    questions = []
    wanted = np.arange(len(rows)) if rows.label is None else np.flatnonzero(rows.label)
    for ids, labels in (rows[k] for k in (wanted if rows.shared is None else wanted[::2]).tolist()):
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


def questions_in_batch(questions: list[PromptAndAnswer], options: TrainOptions) -> int:
    """Return how many of `questions` to answer at once: `per_device_eval_batch_size`.

    A packed row holds several documents. So with packing it is as many as have, padded and answered, no more tokens
    than that number of rows.
    """
    rows = options.per_device_eval_batch_size
    longest = options.virtual_tokens + max(len(prompt) for prompt, _ in questions) + _new_tokens(questions)
    return max(rows, rows * options.max_length // longest) if options.packing else rows


def _new_tokens(questions: list[PromptAndAnswer]) -> int:
    """Return the number of tokens to generate at most: a little more than the longest answer has."""
    return max(len(answer) for _, answer in questions) + EXTRA_TOKENS


def exact_match(
    accelerator: Accelerator,
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[PromptAndAnswer],
    batch_size: int,
    stop_ids: list[int],
) -> tuple[dict[str, float], list[GeneratedAnswer]]:
    """Answer each of `questions` (prompt ids, answer ids) greedily and compare the answers with those of the data.

    Returns:
        `eval/exact_match`, the share of answers equal to the data's in every token, end of turn included, and
        `eval/stop_rate`, the share of answers that ended by a stop token, both over all processes; and the answers of
        this process.
    """
    inner = unwrap_model(accelerator, model)
    causal_lm, pad = unwrap_causal_lm(inner), pad_token_id(tokenizer)
    limit = positions_for_tokens(causal_lm)
    answers: list[GeneratedAnswer] = []
    stopped = 0
    batches = [*_question_batches(accelerator, questions, batch_size, limit)]
    # Autocast, because `generate` bypasses the forward that `prepare` wraps: without it the float32 parts of an adapter
    # would meet bf16 activations. Packed attention cannot generate, so the model's own takes its place.
    with evaluating(inner), accelerator.autocast(), stock_attention(inner), without_own_settings(causal_lm):
        for batch, own, max_new_tokens in tracked(batches, "generate"):
            check_stop(accelerator)
            inputs = pad_left([prompt for prompt, _ in batch], pad, accelerator.device)
            settings = GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop_ids, pad_token_id=pad
            )
            output = inner.generate(**inputs, generation_config=settings, synced_gpus=strategy() in SHARDED)
            generated = output[:own, inputs["input_ids"].shape[1] :].tolist()
            for (prompt, expected), token_ids in zip(batch, generated, strict=False):
                token_ids, ended = cut_at_stop(token_ids, stop_ids)
                stopped += ended
                texts = (decode_tokens(tokenizer, ids) for ids in (prompt, expected, token_ids))
                answers.append(GeneratedAnswer(*texts))
    right = sum(answer.right for answer in answers)
    right, stopped, count = sum_on_cpus(accelerator, [right, stopped, len(answers)])
    return {"eval/exact_match": right / count, "eval/stop_rate": stopped / count}, answers


def _question_batches(
    accelerator: Accelerator, questions: list[PromptAndAnswer], batch_size: int, limit: int | None
) -> Iterator[tuple[list[PromptAndAnswer], int, int]]:
    """Yield batches of questions, how many of a batch count for this process, and how many tokens to generate.

    All processes get the same number of batches; one that has no questions left repeats a question, which does not
    count. A prompt to which the longest answer would pass the model's `limit` of positions is a batch of its own, with
    the tokens that are left: its own answer fits, and no answer depends on the other questions.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    tokens = _new_tokens(questions)
    is_long = [limit is not None and len(prompt) + tokens > limit for prompt, _ in questions]
    short = [question for question, long in zip(questions, is_long, strict=True) if not long]
    long = [question for question, long in zip(questions, is_long, strict=True) if long]
    for first in range(0, len(short), batch_size * world):
        batch = short[first + rank : first + batch_size * world : world]
        yield batch or short[:1], len(batch), tokens
    # Where weights are sharded, a process that is done runs on until all are, to positions beyond the limit. So there
    # all ask the same question.
    together = strategy() in SHARDED
    for first in range(0, len(long), 1 if together else world):
        place = first if together else first + rank
        question = long[min(place, len(long) - 1)]
        yield [question], int(place < len(long) and place % world == rank), (limit or 0) - len(question[0])
