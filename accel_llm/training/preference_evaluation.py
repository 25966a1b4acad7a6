"""Loss, rewards and margins of held-out answers. Each pair, or answer, counts once, with any number of processes."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from accel_llm.backend.collectives import sum_on_cpus, sum_over_processes
from accel_llm.config.preference_options import KtoOptions
from accel_llm.data.answers import Pairs
from accel_llm.data.batches import Batch, to_device
from accel_llm.data.rows import Rows
from accel_llm.data.stream import Collate, evaluation_batches
from accel_llm.model.evaluating import evaluating
from accel_llm.preference.objective import kto_loss, preference_loss, shared_value, sums_for_value
from accel_llm.preference.reward import reward_loss
from accel_llm.report.metrics import measured_means
from accel_llm.training.evaluation import check_stop


def preference_metrics(
    units: Rows | Pairs,
    collate: Collate,
    accelerator: Accelerator,
    model: Any,
    rows: Rows,
    options: Any,
    pad_token_id: int,
) -> dict[str, float]:
    """Return the mean loss of the pairs, or answers, `units` of `rows`, and what the loss measures beside.

    The sums are float64 and taken over all processes. For single answers z0 (or delta) is that of all of them together,
    so neither batch size nor number of processes changes a value.
    """

    def batches() -> Iterator[Batch]:
        rank, world = accelerator.process_index, accelerator.num_processes
        for batch in evaluation_batches(units, options, rank, world, pad_token_id, collate):
            check_stop(accelerator)
            yield to_device(batch, accelerator.device)

    totals: list[torch.Tensor] = []
    names: list[str] = []
    with evaluating(model):
        loss_of: Any = partial(reward_loss if options.gives_scores else preference_loss, options=options)
        value = None
        if isinstance(options, KtoOptions):
            loss_of = partial(kto_loss, options=options)
            sums = torch.stack([sums_for_value(model, batch, options) for batch in batches()]).sum(0)
            value = shared_value(sum_over_processes(accelerator, sums), options)
        for batch in batches():
            if value is not None:
                batch["z0"] = value
            loss = loss_of(model, batch)
            measured = batch["measured"]
            own = torch.stack([loss.double(), loss.new_full((), batch["total_weight"], dtype=torch.float64)])
            totals.append(torch.stack([own, *measured.values()]))
            names = list(measured)
    # The host waits for the device only here.
    summed, weight, *sums = sum_on_cpus(accelerator, torch.stack(totals).sum(0).flatten().tolist())
    means = measured_means(names, sums)
    return {"eval/loss": summed / (weight or 1)} | {f"eval/{name}": mean for name, mean in means.items()}
