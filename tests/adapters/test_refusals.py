"""Methods that cannot run under a launch YAML: one sentence before the model loads. backends.py shows the failures."""

import subprocess
import sys
from collections.abc import Callable

import pytest
from support import ROOT

from accel_llm.adapters import refusals
from accel_llm.adapters.methods import peft_methods
from accel_llm.adapters.refusals import REFUSALS, backend_problems
from accel_llm.config.options import MethodOptions

CELLS = [(refusal, strategy) for refusal in REFUSALS for strategy in refusal.strategies]


@pytest.fixture
def under(monkeypatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setattr(refusals, "strategy", lambda: name)


@pytest.mark.parametrize(("refusal", "strategy"), CELLS, ids=[f"{r.method}-{s}" for r, s in CELLS])
def test_one_sentence_names_the_method_the_reason_and_what_works(refusal, strategy, under):
    under(strategy)
    options = MethodOptions(method=refusal.method, load_in_4bit=refusal.only_in_4_bits)
    (sentence,) = backend_problems(options)
    assert sentence.startswith(f"method: {refusal.method} cannot run under {strategy}: ") and sentence.endswith(".")
    assert refusal.reason in sentence and refusal.remedy in sentence
    under("ddp")
    assert not backend_problems(options)


def test_in_16_bits_only_those_are_refused_that_fail_there(under):
    under("fsdp2")
    assert not backend_problems(MethodOptions(method="shira"))


def test_only_exceptions_are_listed(under):
    assert {refusal.method for refusal in REFUSALS} <= set(peft_methods())
    for strategy in ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2"):
        under(strategy)
        assert not backend_problems(MethodOptions(method="a_method_of_a_newer_peft"))


@pytest.mark.long
def test_each_failure_is_still_there_without_its_refusal(tmp_path):
    """Also a control of the shards: a weight that all layers share must not be sharded with one of them."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        ROOT / "tests" / "proofs" / "backends.py",
        "--controls",
        "--work",
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.long
def test_methods_on_backends(tmp_path):
    """One method of each family where its kind of weight is hard: shared by layers, scales alone, prompts, rotations."""
    cells = (
        "vblora-fsdp2-fp32,tinylora-zero3-fp32,ia3-zero3-4-bit,prompt-fsdp2-fp32,oft-zero2-bf16,unilora-float64-fp32"
    )
    cells += ",vera-fsdp2-bf16,deft-zero2-bf16"  # matrices of its own in another dtype; products in float32 on purpose
    cells += ",supertuning-zero3-bf16"  # an odd number of weights: the last share ends with memory that nothing sets
    command = [sys.executable, "-W", "ignore", ROOT / "tests" / "proofs" / "backends.py", "--only", cells]
    done = subprocess.run([*command, "--work", tmp_path], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
