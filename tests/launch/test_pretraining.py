"""Real launches of pretrain.py with two processes: growing steps, the guard, Muon; the same numbers as in one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import ROOT, checkpoint_path, equal_tensors, metrics, weights

pytestmark = pytest.mark.long
STEPS = 6
# Rows of the steps are 1, 3, 4, 5, 7 and 8: with two processes 1 to 4 of 4 micro-batches, some of them half empty.
OPTIONS = ("--max_length", "64", "--tokens_per_step", "512", "--batch_warmup_steps", "5", "--max_steps", str(STEPS))
OPTIONS += ("--learning_rate", "3e-3", "--warmup_steps", "2", "--logging_steps", "1", "--preflight", "false")


def launch(strategy: str, *words: str) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["accelerate", "launch", "--config_file", f"accelerate_configs/{strategy}.yaml", "launch/pretrain.py"]
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *words], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=600
    )


@pytest.fixture(scope="module")
def words(make_model, tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("pretraining")
    make_model(folder / "model")
    lines = [json.dumps({"text": f"Number {k} is followed by {k + 1}, and {k * k} is its square."}) for k in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    names = ("--model_name_or_path", str(folder / "model"), "--train_files", str(folder / "texts.jsonl"))
    return (*names, "--cache_dir", str(folder / "cache"), *OPTIONS)


def train(strategy: str, output: Path, *words: str) -> Path:
    done = launch(strategy, *words, "--output_dir", str(output))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return output


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> dict[str, Path]:
    """The runs of one process, by optimizer."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: train("cpu", folder / name, *words, "--optim", name) for name in ("adamw", "muon")}


def compare(folder: Path, other: Path, rel: float) -> None:
    lines, expected = metrics(folder), metrics(other)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, right in zip(lines, expected, strict=True):
        assert line.keys() == right.keys() and line["supervised_tokens"] == right["supervised_tokens"]
        for name in ("loss", "grad_norm", "update_ratio", "learning_rate"):
            assert line[name] == pytest.approx(right[name], rel=rel), (line["step"], name)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_steps_that_grow_are_the_same_under_every_strategy(strategy, words, alone, tmp_path):
    guard = () if strategy.startswith("zero") else ("--spike_threshold", "6")
    compare(train(strategy, tmp_path / "run", *words, *guard), alone["adamw"], 1e-5)


def test_muon_under_fsdp2_is_that_of_one_process_and_resumes_to_the_bit(words, alone, tmp_path):
    more = ("--optim", "muon", "--save_steps", "3", "--save_total_limit", "3")
    run = train("fsdp2", tmp_path / "run", *words, *more)
    # torch orthogonalizes in bfloat16, and DTensors add in another order.
    compare(run, alone["muon"], 2e-3)
    assert abs(metrics(run)[-1]["loss"] / metrics(alone["adamw"])[-1]["loss"] - 1) > 1e-2
    start = ("--resume_from_checkpoint", str(checkpoint_path(run, 3)))
    resumed = train("fsdp2", tmp_path / "resumed", *words, *more, *start)
    assert equal_tensors(weights(resumed), weights(run))
    # A run in another folder counts its own tokens only.
    after, expected = ([{**line, "supervised_tokens": 0} for line in metrics(folder)] for folder in (resumed, run))
    assert after == expected[3:]
    ends = [load_file(checkpoint_path(folder, STEPS) / "rank-00001.safetensors") for folder in (run, resumed)]
    assert equal_tensors(*ends)


@pytest.mark.parametrize(
    "option, sentence",
    [
        (("--optim", "muon"), "optim: muon cannot run here: DeepSpeed hands it flat pieces of the weights and it needs "
         "matrices; give adamw, lion, sgd."),
        (("--spike_threshold", "6"), "spike_threshold: under zero2 DeepSpeed steps inside the backward pass, before "
         "anybody knows the norm of the gradient, so no spike can be skipped; remove it, or use ddp.yaml or fsdp2.yaml."),
    ],
)  # fmt: skip
def test_what_cannot_be_under_zero_is_refused_with_the_reason(option, sentence, words, tmp_path):
    done = launch("zero2", *words, *option, "--output_dir", str(tmp_path / "run"))
    assert done.returncode != 0 and sentence in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "run").exists()
