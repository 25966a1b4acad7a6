"""A run whose warmup is as long as the whole run crashed.

The right rates are a straight line that would reach the peak one step after the last, from the definition of a warmup;
and the person hears that the peak is never reached.
"""

import pytest
import torch

from accel_llm.config.options import SftOptions
from accel_llm.data.stream import TrainingPlan
from accel_llm.report.plan_text import plan_warnings
from accel_llm.training.schedule import build_schedule


@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "cosine_with_min_lr", "warmup_stable_decay", "constant_with_warmup"]
)
@pytest.mark.parametrize("warmup", [4, 40])
def test_a_warmup_as_long_as_the_run_is_a_line_and_is_said(kind, warmup):
    options = SftOptions(lr_scheduler_type=kind, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    factor = build_schedule(optimizer, options, 4).lr_lambdas[0]
    assert [factor(step) for step in range(4)] == pytest.approx([(step + 1) / (warmup + 1) for step in range(4)])
    (sentence,) = plan_warnings(options, TrainingPlan(100, 1, None, 4))
    assert f"reaches {4 / (warmup + 1):.1%} of its peak, at the last step" in sentence
