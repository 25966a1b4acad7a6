"""The losses of a batch of answers: sums over its units, so that a step's loss is a mean however the step is cut.

Each loss also writes what it measured to `batch["measured"]`: for each metric a float64 tensor [2], the sum of the
values and their number, both without gradient.
"""

from typing import Any

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus, sum_over_processes
from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.data.batches import Batch, start_copy, to_device
from accel_llm.model.evaluating import evaluating
from accel_llm.model.log_probabilities import AnswerScores, answer_log_probabilities
from accel_llm.preference.losses import (
    PairScores,
    answer_weights,
    bco_losses,
    kto_losses,
    pair_losses,
    pair_rewards,
)


def preference_loss(model: Any, batch: Batch, options: DpoOptions) -> torch.Tensor:
    """Return the sum of the losses of the pairs of a batch, float32 []; see preference/losses.py."""
    answers = answer_log_probabilities(model, batch, squares=options.use_weighting)
    tokens = _token_counts(answers, batch)
    reference = batch["reference"] if options.needs_reference else torch.zeros_like(answers.sums)
    # Pair i has the answers 2i, the chosen one, and 2i + 1.
    scores = PairScores(*(values[side::2] for values in (answers.sums, reference, tokens) for side in (0, 1)))
    weights = None
    if answers.log_squares is not None:
        weights = answer_weights(answers.tokens, answers.log_squares, batch["answer_numbers"], tokens)
        weights = weights[0::2] * weights[1::2]
    losses = pair_losses(scores, options, weights)

    chosen, rejected = pair_rewards(scores, options)
    batch["measured"] = measured_sums(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "logps/chosen": scores.chosen,
            "logps/rejected": scores.rejected,
        }
    )
    return _total(losses, answers, batch)


def kto_loss(model: Any, batch: Batch, options: KtoOptions) -> torch.Tensor:
    """Return the sum of the losses of the answers of a batch, float32 []; `kto_targets` has put `z0` into the batch."""
    answers = answer_log_probabilities(model, batch)
    ratios, desirable, z0 = answers.sums - batch["reference"], batch["labels_of_answers"], batch["z0"]
    function = kto_losses if options.loss_type == "kto" else bco_losses
    losses = function(ratios, desirable, z0, options)

    rewards, wanted = options.beta * ratios, desirable.double()
    batch["measured"] = measured_sums(
        {"rewards/chosen": rewards, "logps/chosen": answers.sums}, wanted
    ) | measured_sums({"rewards/rejected": rewards, "logps/rejected": answers.sums}, 1 - wanted)
    batch["measured"] |= measured_sums({"kl" if options.loss_type == "kto" else "delta": z0 + 0 * ratios})
    return _total(losses, answers, batch)


def kto_loss_of_one(model: Any, batch: Batch, accelerator: Accelerator, options: KtoOptions) -> torch.Tensor:
    """Return `kto_loss` of a batch that is a whole step, float32 []. All processes must call it."""
    kto_targets(accelerator, model, [batch], options)
    return kto_loss(model, batch, options)


def kto_targets(accelerator: Accelerator, model: Any, micro_batches: list[Batch], options: KtoOptions) -> float:
    """Return the number of answers in an optimizer step, over all processes, and put `z0` into each of its batches.

    `z0` is a float64 [] on the device, see `shared_value`. It costs a pass of the policy without gradient over the step,
    in evaluation mode, and one all-reduce. It stands in the place of `total_targets` (training/loop.py).
    """
    targets = sum_on_cpus(accelerator, [sum(batch["total_weight"] for batch in micro_batches)])[0]
    if not targets:
        return 0.0
    with evaluating(model):
        sums = torch.stack([sums_for_value(model, batch, options) for batch in micro_batches]).sum(0)
    value = shared_value(sum_over_processes(accelerator, sums), options)
    for batch in micro_batches:
        batch["z0"] = value
    return targets


def sums_for_value(model: Any, batch: Batch, options: KtoOptions) -> torch.Tensor:
    """Return the sums of a batch that `shared_value` needs, float64 [4]; they add up over batches and processes.

    For KTO: the sum of r = log pi - log ref over `batch["mismatched"]`, a batch with an answer of another row to each
    prompt, and their number. For BCO: the sum of beta r of desirable answers, their number, and the same of undesirable
    ones.
    """
    if options.loss_type == "kto":
        other = to_device(batch["mismatched"], batch["input_ids"].device)
        ratios = answer_log_probabilities(model, other).sums - other["reference"]
        return torch.stack([ratios.sum(), ratios.new_full((), len(ratios)), *ratios.new_zeros(2)])
    rewards = options.beta * (answer_log_probabilities(model, batch).sums - batch["reference"])
    desirable = batch["labels_of_answers"].double()
    parts = [(rewards * chosen).sum() for chosen in (desirable, 1 - desirable)]
    return torch.stack([parts[0], desirable.sum(), parts[1], (1 - desirable).sum()])


def shared_value(sums: torch.Tensor, options: KtoOptions) -> torch.Tensor:
    """Return z0 of KTO or delta of BCO from the sums of a whole step, float64 [], without gradient.

    z0 = max(0, mean of r over mismatched pairs), an estimate of the policy's KL divergence from the reference
    (Ethayarajh et al. 2024, arXiv 2402.01306, section 4; there over a micro-batch). delta is the middle between the mean
    rewards of both classes (Jung et al. 2024, arXiv 2404.04656; there a moving average); in a step with one class only
    it is the mean of that class.
    """
    means = sums[0::2] / sums[1::2].clamp(min=1)
    if options.loss_type == "kto":
        return means[0].clamp(min=0)
    present = (sums[1::2] > 0).double()
    return (means * present).sum() / present.sum().clamp(min=1)


def _token_counts(answers: AnswerScores, batch: Batch) -> torch.Tensor:
    """Return the number of tokens of each answer, float64 [answers], on the device of the scores."""
    counts = torch.tensor(batch["answer_lengths"], dtype=torch.float64)
    return start_copy(counts, answers.sums.device)


def measured_sums(values: dict[str, torch.Tensor], weights: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the sum and the number of the values of each metric; `weights` are 1 for those that count and 0 for others."""
    results = {}
    for name, numbers in values.items():
        numbers = numbers.detach().double()
        counted = torch.ones_like(numbers) if weights is None else weights
        results[name] = torch.stack([(numbers * counted).sum(), counted.sum()])
    return results


def _total(losses: torch.Tensor, answers: AnswerScores, batch: Batch) -> torch.Tensor:
    """Sum up the losses of the units; each has the batch's loss of unbalanced experts as one more term, if there is one."""
    total = losses.sum().float()
    return total if answers.balance is None else total + answers.balance * batch["total_weight"]
