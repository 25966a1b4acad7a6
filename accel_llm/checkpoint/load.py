"""Loads a checkpoint into a model, an optimizer and a schedule that are set up: all of a run's state, or the weights."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from accel_llm.checkpoint.files import check_parameter_names, open_checkpoint
from accel_llm.checkpoint.randomness import set_generator_states
from accel_llm.checkpoint.resume import read_rank_state
from accel_llm.checkpoint.shares import (
    fill_weights,
    load_fixed_tensors,
    load_shares,
    local_shares,
    refresh_model_weights,
    set_loss_scale_state,
)
from accel_llm.training.start import Start


def load_run_state(
    accelerator: Accelerator, model: Any, optimizer: Any, scheduler: Any, start: Start, seed: int
) -> None:
    """Load the checkpoint that a run continues, if there is one; all processes must call it.

    Raises:
        ConfigError: the checkpoint lacks a tensor or has one of another model.
    """
    if (folder := start.folder) is None:
        return
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    # Weights and optimizer state, into the tensors that this backend has.
    reader = open_checkpoint(folder)
    shares = local_shares(accelerator, model, optimizer)
    check_parameter_names(folder, shares, reader)
    load_shares(shares, optimizer, reader)
    load_fixed_tensors(accelerator, model, reader)
    refresh_model_weights(optimizer)
    # Everything else: learning rate, loss scale and random generators.
    set_rates(scheduler, state["step"])
    set_loss_scale_state(accelerator, optimizer, state["scale"])
    if start.same_processes:
        local = read_rank_state(folder, accelerator.process_index)
        set_generator_states(local["randomness"], accelerator.device)
    else:  # another number of processes cannot use the saved generators
        set_seed(hash((seed, start.step)) % 2**31, device_specific=True)


def set_rates(scheduler: Any, step: int) -> None:
    """Set the learning rates of a step. They depend only on the options and the step, so they are not saved."""
    scheduler.last_epoch = step
    rates = [rate * rule(step) for rate, rule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    # The scheduler reports these as the current rates.
    scheduler._last_lr = rates


def load_trained_weights(accelerator: Accelerator, model: Any, optimizer: Any, folder: Path) -> None:
    """Load only the weights of the checkpoint `folder`: there is no further step that would need the optimizer."""
    reader = open_checkpoint(folder)
    for share in local_shares(accelerator, model, optimizer):
        fill_weights(share, reader)
    refresh_model_weights(optimizer)
