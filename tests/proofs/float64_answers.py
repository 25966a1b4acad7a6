"""What preference.py is compared with: each answer alone by plain transformers in float64, and the papers' formulas.

No batch and no loss of this project is used. Only the partners of KTO's mismatched answers, which are drawn at random,
are those of preference/mismatched.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

import float64
import numpy as np
import torch
from transformers import AutoModelForCausalLM

BETA, SIMPO_BETA, SIMPO_GAMMA, DESIRABLE, UNDESIRABLE = 0.1, 2.0, 0.5, 1.3, 0.7
IPO_WEIGHT, APO_WEIGHT, SFT_WEIGHT, SMOOTHING = 0.01, 0.5, 0.2, 0.1


class Answer(NamedTuple):
    """The tokens of a prompt with an answer, and the places of the answer's trained tokens, which are at its end."""

    ids: list[int]
    places: list[int]


class Score(NamedTuple):
    """What the formulas read of an answer y: log pi(y|x), that of the reference, |y|, and WPO's weight."""

    policy: torch.Tensor
    reference: torch.Tensor
    tokens: int
    weight: torch.Tensor

    @property
    def ratio(self) -> torch.Tensor:
        return self.policy - self.reference

    @property
    def mean(self) -> torch.Tensor:
        return self.policy / self.tokens


def read(model: Any, answer: Answer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log pi(y|x), and WPO's weight: exp of the mean over the tokens of log p - log sum_v p_v^2."""
    log_p = model(input_ids=torch.tensor([answer.ids])).logits[0].log_softmax(-1)
    before = [place - 1 for place in answer.places]
    tokens = log_p[before, [answer.ids[place] for place in answer.places]]
    squares = (2 * log_p[before]).logsumexp(-1)
    return tokens.sum(), (tokens - squares).mean().exp().detach()


def scores(model: Any, reference: Any, answers: list[Answer]) -> list[Score]:
    """Score answers; without a `reference` it is the policy itself, as it is now."""
    results = []
    for answer in answers:
        policy, weight = read(model, answer)
        with torch.no_grad():
            other = read(reference, answer)[0] if reference is not None else policy.detach()
        results.append(Score(policy, other, len(answer.places), weight))
    return results


def log_odds(mean: torch.Tensor) -> torch.Tensor:
    return mean - (1 - mean.exp()).log()


def pair_loss(name: str, chosen: Score, rejected: Score) -> torch.Tensor:
    """Return the loss of one pair. The sources of the formulas are named in accel_llm/preference/losses.py."""
    s, margin = torch.sigmoid, chosen.ratio - rejected.ratio
    dpo = -s(BETA * margin).log()
    if name == "sigmoid":
        return dpo
    if name == "wpo":  # with the label smoothing of cDPO
        smoothed = (1 - SMOOTHING) * dpo - SMOOTHING * s(-BETA * margin).log()
        return chosen.weight * rejected.weight * smoothed
    if name == "simpo":
        return -s(SIMPO_BETA * (chosen.mean - rejected.mean) - SIMPO_GAMMA).log()
    if name == "orpo":
        return -chosen.mean - BETA * s(log_odds(chosen.mean) - log_odds(rejected.mean)).log()
    assert name == "sum"
    ipo = (margin - 1 / (2 * BETA)) ** 2
    apo = -s(BETA * chosen.ratio) + s(BETA * rejected.ratio)
    return dpo + IPO_WEIGHT * ipo + APO_WEIGHT * apo - SFT_WEIGHT * chosen.mean


def loss_of_pairs(name: str, answers: list[Score]) -> tuple[torch.Tensor, float]:
    """Return the mean loss of pairs (chosen, rejected, chosen, ...), and their mean reward margin."""
    pairs = list(zip(answers[0::2], answers[1::2], strict=True))
    loss = torch.stack([pair_loss(name, *pair) for pair in pairs]).mean()
    beta, kind = (SIMPO_BETA, "mean") if name == "simpo" else (BETA, "mean" if name == "orpo" else "ratio")
    margins = [beta * float(getattr(one, kind) - getattr(other, kind)) for one, other in pairs]
    return loss, float(np.mean(margins))


def loss_of_single(
    name: str, answers: list[Score], mismatched: list[Score], labels: list[bool]
) -> tuple[torch.Tensor, float]:
    """Return the mean loss of answers with labels, and z0 of KTO or delta of BCO, which are those of all of them."""
    rewards = [
        [BETA * float(a.ratio) for a, label in zip(answers, labels, strict=True) if label is which]
        for which in (True, False)
    ]
    if name == "kto":
        value = max(0.0, float(np.mean([float(a.ratio) for a in mismatched])))
    else:
        value = float(np.mean([np.mean(each) for each in rewards]))
    losses = []
    for answer, label in zip(answers, labels, strict=True):
        weight, sign = (DESIRABLE, 1) if label else (UNDESIRABLE, -1)
        if name == "kto":
            losses.append(weight * (1 - torch.sigmoid(sign * BETA * (answer.ratio - value))))
        else:
            losses.append(-weight * torch.sigmoid(sign * (BETA * answer.ratio - value)).log())
    return torch.stack(losses).mean(), value


def partners(answers: list[Answer], seed: int) -> list[int]:
    """Return for each answer of a file which one KTO puts beside its prompt."""
    from accel_llm.chat.targets import IGNORED
    from accel_llm.data.rows import Rows
    from accel_llm.preference.mismatched import mismatch

    prompts = [answer.ids[: answer.places[0]] for answer in answers]
    ids = np.concatenate([[*prompt, 0] for prompt in prompts])
    labels = np.concatenate([[IGNORED] * len(prompt) + [0] for prompt in prompts])
    offsets = np.cumsum([0, *(len(prompt) + 1 for prompt in prompts)])
    nothing = np.zeros(len(answers), np.int32)
    rows = Rows(ids, labels, offsets, np.arange(len(answers)), nothing, nothing, None, ())
    return mismatch(rows, seed, len(ids)).partners.tolist()


def mismatch_answers(answers: list[Answer], seed: int, max_length: int) -> list[Answer]:
    """Return each prompt with the answer of its partner, cut to `max_length` tokens."""
    results = []
    for answer, other in zip(answers, (answers[k] for k in partners(answers, seed)), strict=True):
        prompt, end = answer.ids[: answer.places[0]], other.ids[other.places[0] :]
        places = [place - other.places[0] + len(prompt) for place in other.places]
        results.append(Answer([*prompt, *end][:max_length], [place for place in places if place < max_length]))
    return results


def steps(
    work: Path,
    method: str,
    objectives: list[tuple[str, bool]],
    parts: dict[str, list[Answer]],
    labels: dict[str, list[bool]],
    seed: int,
    max_length: int,
) -> dict[str, np.ndarray]:
    """Return a step of each objective (its name, and whether another model is the reference) over all answers.

    `parts` are the answers to `train` and to `eval`; with `labels` they are single ones. The numbers of an objective:
    `loss`, `evaluation` (the loss of the others before the step), `value` (margin, z0 or delta of those), and the
    gradient of each trained tensor. `start` are the tensors.
    """
    model = float64.load(work, method)
    other: Any = AutoModelForCausalLM.from_pretrained(work / "reference").double()
    trained, numbers = float64.trained(model), {}
    for another in sorted({another for _, another in objectives}):
        reference = other if another else None
        scored, beside = {}, {}
        for part, answers in parts.items():
            scored[part] = scores(model, reference, answers)
            if labels:
                with torch.no_grad():
                    beside[part] = scores(model, reference, mismatch_answers(answers, seed, max_length))
        for name in [name for name, which in objectives if which is another]:
            results = {
                part: loss_of_single(name, scored[part], beside[part], labels[part])
                if labels
                else loss_of_pairs(name, scored[part])
                for part in parts
            }
            key, loss = f"{name}{'_other' * another}", results["train"][0]
            gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
            evaluation, value = results["eval"]
            numbers |= {f"{key} loss": loss, f"{key} evaluation": evaluation, f"{key} value": torch.tensor(value)}
            numbers |= {f"{key} gradient {n}": g for n, g in zip(trained, gradients, strict=True)}
    numbers |= {f"start {name}": parameter for name, parameter in trained.items()}
    return {name: np.array(tensor.detach()) for name, tensor in numbers.items()}
