"""The state of fp16's loss scalers goes through JSON and comes back."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from accel_llm.checkpoint.shares import loss_scale_state, set_loss_scale_state


def deepspeed_run(scaler: Any) -> tuple[Any, Any]:
    """Return what a run under DeepSpeed has in place of an accelerator and an optimizer."""
    return SimpleNamespace(scaler=None), SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def new_scaler() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=2**16,
        scale_window=4,
        min_scale=1,
        delayed_shift=2,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=True,
        dtype=torch.half,
    )


def test_deepspeeds_loss_scaler_goes_on_where_it_was_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # it asks for the rank that prints
    original = new_scaler()
    for overflow in (False, True, True, False, False):
        original.update_scale(overflow)
    state = json.loads(json.dumps(loss_scale_state(*deepspeed_run(original))))
    assert state["cur_scale"] == 2**15 and state["cur_iter"] == 5

    resumed = new_scaler()
    set_loss_scale_state(*deepspeed_run(resumed), state)
    assert vars(resumed) == vars(original) and resumed.dtype == torch.half
    for overflow in (False, False, True, False, False, False, False, False):
        original.update_scale(overflow)
        resumed.update_scale(overflow)
        assert vars(resumed) == vars(original)


@pytest.mark.parametrize("scaler", [LossScaler(scale=128.0), None], ids=["static", "none"])
def test_a_scale_that_never_changes_needs_nothing_else(scaler: Any) -> None:
    run = deepspeed_run(scaler)
    state = json.loads(json.dumps(loss_scale_state(*run)))
    set_loss_scale_state(*run, state)
    assert state == ({} if scaler is None else {"cur_scale": 128.0, "dynamic": False})


def test_torchs_loss_scaler_goes_on_where_it_was_saved() -> None:
    original, resumed = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (2.0**10, 2.0**16))
    state = json.loads(json.dumps(loss_scale_state(SimpleNamespace(scaler=original), None)))
    set_loss_scale_state(SimpleNamespace(scaler=resumed), None, state)
    assert resumed.state_dict() == original.state_dict() and resumed.get_scale() == 2.0**10
