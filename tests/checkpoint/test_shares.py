"""What is not trained changes its backend with a run; the state of fp16's loss scalers goes through JSON."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from support import equal_tensors, tiny_model

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.fixed_parts import fixed_parts
from accel_llm.checkpoint.pieces import PieceReader
from accel_llm.checkpoint.shares import fixed_tensors, load_fixed_tensors, loss_scale_state, set_loss_scale_state
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model
from accel_llm.model.placement import materialize_weights
from accel_llm.system.tensors import write_tensors


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


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, for FRoD's sparse matrix
@pytest.mark.parametrize("method", ["vera", pytest.param("frod", marks=pytest.mark.long)])
def test_parts_that_are_not_trained_get_the_dtype_of_another_backend(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """ddp holds them in float32, zero2 in bf16; and a run goes on with those that it began with."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    main = SimpleNamespace(unwrap_model=lambda model: model, print=print)

    def model_under(backend: str) -> Any:
        for module in ("accel_llm.model.placement", "accel_llm.adapters.attach"):
            monkeypatch.setattr(f"{module}.strategy", lambda: backend)
        options = TrainOptions(
            model_name_or_path=str(tmp_path / "base"), method=method, precision="bf16", packing=False
        )
        model = attach_adapter(load_model(options), options)
        materialize_weights(model, list(model.modules()), torch.bfloat16, torch.device("cpu"), backend == "ddp")
        return model

    def saved_by(model: Any, name: str) -> PieceReader:
        write_tensors(tmp_path / name, fixed_tensors(main, model))
        return PieceReader(tmp_path, [tmp_path / name], {}, [])

    ddp, zero2 = model_under("ddp"), model_under("zero2")
    parts = fixed_parts(ddp)
    for part in parts.values():
        part.add_(1)  # another machine has computed them
    expected = {name: part.clone() for name, part in parts.items()}
    load_fixed_tensors(main, zero2, saved_by(ddp, "ddp"))
    rounded = {name: part.bfloat16() if part.is_floating_point() else part for name, part in expected.items()}
    assert torch.bfloat16 in {part.dtype for part in rounded.values()}
    assert equal_tensors(fixed_parts(zero2), rounded)
    load_fixed_tensors(main, ddp, saved_by(zero2, "zero2"))
    assert equal_tensors(fixed_parts(ddp), {name: part.to(expected[name]) for name, part in rounded.items()})

    # A checkpoint of a time when they were not saved, and one that is not whole.
    write_tensors(tmp_path / "none", {"w|weight|0": torch.ones(3)})
    load_fixed_tensors(main, zero2, PieceReader(tmp_path, [tmp_path / "none"], {}, []))
    assert equal_tensors(fixed_parts(zero2), rounded)
    assert f"such as {min(parts)}; they were computed anew" in capsys.readouterr().out
    first, *_ = fixed_tensors(main, zero2).items()
    write_tensors(tmp_path / "one", dict([first]))
    with pytest.raises(ConfigError, match="holds 0 of"):
        load_fixed_tensors(main, zero2, PieceReader(tmp_path, [tmp_path / "one"], {}, []))
