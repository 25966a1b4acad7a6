"""What a run says of its memory before it reads a weight: the estimate, what to change, and what run.json keeps."""

import pytest
from accelerate import Accelerator
from support import SIZES, make_rows
from transformers import LlamaConfig

from accel_llm.config.options import TrainOptions
from accel_llm.training import memory_report
from accel_llm.training.memory_estimate import GB, estimate_memory, memory_savings
from accel_llm.training.memory_report import show_memory

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = make_rows([(0, list(range(3, 23)), list(range(3, 23))), (1, [3, 4], [3, 4])])


def test_the_estimate_is_printed_and_kept(capsys):
    options, config = TrainOptions(max_length=64), LlamaConfig(**SIZES)
    facts = show_memory(Accelerator(cpu=True), options, config, ROWS)["memory"]
    estimate = estimate_memory(options, config, 1, "cpu")
    screen = capsys.readouterr().out
    assert screen.startswith(f"memory of one process, estimated: {estimate.describe()}; it can have ")
    assert screen.count("\n") == 1  # and no advice
    assert facts["peak_memory_mb"] == estimate.total // 2**20  # on a CPU the metric counts all that is resident
    assert facts["device_mb"] > sum(facts["estimated_mb"].values())


def test_without_packing_the_longest_row_counts(capsys):
    config = LlamaConfig(**(SIZES | {"vocab_size": 4096}))
    long, short = (
        show_memory(Accelerator(cpu=True), TrainOptions(max_length=4096, packing=packing), config, ROWS)["memory"]
        for packing in (True, False)
    )
    assert long["peak_memory_mb"] > short["peak_memory_mb"]


@pytest.mark.long
def test_what_does_not_fit_gets_advice_and_goes_on(capsys, monkeypatch):
    options, config = TrainOptions(max_length=512), LlamaConfig(**SIZES)
    monkeypatch.setattr(memory_report, "_device_memory", lambda accelerator: (GB // 4, "this GPU has"))
    facts = show_memory(Accelerator(cpu=True), options, config, ROWS)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.endswith("; this GPU has 0.2 GB")
    assert second == "memory: it may not fit; looking for what saves most"
    assert third.startswith("memory: what saves most: ")
    shown = [name for name, _ in memory_savings(options, config, 1, "cpu")[: memory_report.SAVINGS_SHOWN]]
    assert shown and all(name in third for name in shown)
    assert facts["memory"]["device_mb"] == 256


def test_a_model_that_cannot_be_followed_does_not_stop_the_run(capsys):
    config = LlamaConfig(**(SIZES | {"num_key_value_heads": 3}))  # the 4 heads cannot share them
    assert show_memory(Accelerator(cpu=True), TrainOptions(max_length=64), config, ROWS) == {}
    assert capsys.readouterr().out.startswith("memory: there is no estimate for this model with method lora (")


def test_advice_that_leaves_no_room_for_virtual_tokens_is_not_given():
    options = TrainOptions(max_length=300, method="prompt", method_options={"num_virtual_tokens": 200})
    savings = memory_savings(options, LlamaConfig(**SIZES), 1, "cpu")
    assert savings and not any(name.startswith("max_length") for name, _ in savings)
