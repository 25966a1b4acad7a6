"""Gradients over several micro-batches: their sums, and the memory that they take; and what an optimizer on the CPU gets."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import ROOT

from accel_llm.backend.accelerator import use_all_cores
from accel_llm.backend.zero import build_deepspeed_plugin, fit_buckets
from accel_llm.config.options import TrainOptions

# The largest error that 32 micro-batches in bfloat16 may have, and the bytes that two processes hold for each trained
# parameter in the middle of them. A whole tensor in float32 counts 4, and half of it 2.
ERROR, REST = 6.5e-3, 1.3  # of the rest, batches are the largest part, as the model has 22,816 parameters
HELD = {
    "ddp": 4 + 4,  # weights, gradients
    "fsdp2": 2 + 2,  # half of the weights, half of the gradients: not whole ones, as with `no_sync`
    "zero1": 2 + 2 + 4 + 4,  # weights in bfloat16, half of the float32 weights, gradients, one bucket
    "zero2": 2 + 2 + 2,
    "zero3": 1 + 2 + 2 + 4 + 2,  # the last: small weights stay whole
}


@pytest.mark.long
@pytest.mark.parametrize("strategy", HELD)
def test_32_uneven_micro_batches_in_bf16_are_as_exact_on_every_backend(strategy: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{strategy}.yaml", "--num_processes", "2"]
    command += ["--main_process_port", "0", "tests/proofs/accumulation.py", str(tmp_path / "result.json")]
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert not ended.returncode, ended.stderr[-4000:]
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["error"] < ERROR
    assert result["bytes"] < HELD[strategy] + REST


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_sums_and_sends_gradients_in_float32(stage: int, deepspeed_file) -> None:
    deepspeed_file({"zero_optimization": {"stage": stage}})
    settings = build_deepspeed_plugin(TrainOptions(), 2, "fp16", cpu=True).deepspeed_config
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "fp32"


def test_a_dtype_of_messages_in_the_deepspeed_file_stays(deepspeed_file) -> None:
    deepspeed_file({"zero_optimization": {"stage": 2}, "communication_data_type": "bf16"})
    settings = build_deepspeed_plugin(TrainOptions(), 2, "bf16", cpu=True).deepspeed_config
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"} and settings["communication_data_type"] == "bf16"


@pytest.fixture
def deepspeed_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def write(settings: dict) -> None:
        (tmp_path / "zero.json").write_text(json.dumps(settings))
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))

    return write


@pytest.mark.parametrize(
    ("configured", "expected"),
    [({}, 14), ({"reduce_bucket_size": 2e8}, 14), ({"reduce_bucket_size": 10}, 10), ({"reduce_bucket_size": "auto"}, "auto")],
)  # fmt: skip
def test_a_bucket_is_no_larger_than_what_is_trained(configured: dict, expected: int | str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 2, bias=False))
    model[0].weight.requires_grad_(False)
    trained: list = [
        model[1].weight,
        SimpleNamespace(ds_numel=8, numel=lambda: 0),
    ]  # under ZeRO-3 a parameter is an empty vector
    settings = {"zero_optimization": configured | {"allgather_bucket_size": 2e8}}
    fit_buckets(settings, SimpleNamespace(param_groups=[{"params": trained[:1]}, {"params": trained[1:]}]))  # type: ignore[arg-type]
    assert settings["zero_optimization"] == {"reduce_bucket_size": expected, "allgather_bucket_size": 2e8}


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}, 2),  # what the launchers set
        ({"LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}, 1),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}, 3),  # what a person sets
    ],
)
def test_an_optimizer_on_the_cpu_gets_the_cores_of_the_machine(environment, expected, four_cores, monkeypatch) -> None:
    torch.set_num_threads(3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    use_all_cores()
    assert torch.get_num_threads() == expected
