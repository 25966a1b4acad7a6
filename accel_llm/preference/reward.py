"""The loss of a reward model: its reward of the chosen answer of a pair should be higher than that of the rejected one."""

from typing import Any

import torch
import torch.nn.functional as F

from accel_llm.config.preference_options import RewardOptions
from accel_llm.data.batches import Batch
from accel_llm.model.classifier import answer_scores
from accel_llm.model.encoders import balance_of_scores
from accel_llm.preference.objective import measured_sums


def reward_losses(
    chosen: torch.Tensor, rejected: torch.Tensor, margins: torch.Tensor | float, center: float
) -> torch.Tensor:
    """Return -log sigmoid(chosen - rejected - margin) + center * (chosen + rejected)^2 for the rewards of pairs, all [n].

    The model of Bradley and Terry, as in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, section 3.5); the margin is
    that of Llama 2 (arXiv 2307.09288, section 3.2.2), the second term that of Eisenstein et al. 2023 (arXiv 2312.09244,
    section 2): a pair alone does not say where rewards have their zero.
    """
    return -F.logsigmoid(chosen - rejected - margins) + center * (chosen + rejected).square()


def reward_loss(model: Any, batch: Batch, options: RewardOptions) -> torch.Tensor:
    """Return the sum of the losses of the pairs of a batch, float32 [], and measure its rewards, see objective.py."""
    scores = answer_scores(model, batch)
    rewards = scores[:, 0].double()
    # Pair i has the answers 2i, the chosen one, and 2i + 1.
    chosen, rejected = rewards[0::2], rewards[1::2]
    losses = reward_losses(chosen, rejected, batch.get("margins", 0.0), options.center_rewards_coefficient)
    batch["measured"] = measured_sums(
        {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).double(),
        }
    )
    return (losses.sum() + balance_of_scores(scores, batch["total_weight"])).float()
