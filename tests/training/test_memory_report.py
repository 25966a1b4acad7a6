"""What a run says of its memory before it reads a weight: the estimate, what to change, and what run.json keeps."""

import pytest
from accelerate import Accelerator
from support import SIZES, make_rows
from transformers import LlamaConfig

from accel_llm.config.options import TrainOptions
from accel_llm.training import memory_report
from accel_llm.training.memory_estimate import GB, MemoryEstimate, estimate_memory, memory_savings
from accel_llm.training.memory_report import RunMemory, find_memory, memory_problem

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROWS = make_rows([(0, list(range(3, 23)), list(range(3, 23))), (1, [3, 4], [3, 4])])


def test_the_estimate_is_said_and_kept():
    options, config = TrainOptions(max_length=64), LlamaConfig(**SIZES)
    memory = find_memory(Accelerator(cpu=True), options, config, ROWS)
    estimate = estimate_memory(options, config, 1, "cpu")
    assert memory.describe().startswith(f"{estimate.describe()}; no GPU here, the host has ")
    assert memory.describe_host() == ""  # it is the same memory
    assert memory_problem(Accelerator(cpu=True), options, config, ROWS, memory) == ""
    facts = memory.facts()["memory"]
    assert facts["peak_memory_mb"] == estimate.total // 2**20  # on a CPU the metric counts all that is resident
    assert facts["device_mb"] > sum(facts["estimated_mb"].values())


def test_without_packing_the_longest_row_counts():
    config = LlamaConfig(**(SIZES | {"vocab_size": 4096}))
    long, short = (
        find_memory(Accelerator(cpu=True), TrainOptions(max_length=4096, packing=packing), config, ROWS).tensors
        for packing in (True, False)
    )
    assert long > short


@pytest.mark.long
def test_what_does_not_fit_gets_advice_and_goes_on(monkeypatch):
    options, config = TrainOptions(max_length=512), LlamaConfig(**SIZES)
    monkeypatch.setattr(memory_report, "_device_memory", lambda accelerator: (GB // 4, "this GPU has"))
    memory = find_memory(Accelerator(cpu=True), options, config, ROWS)
    assert memory.describe().endswith("; this GPU has 0.2 GB")
    sentence = memory_problem(Accelerator(cpu=True), options, config, ROWS, memory)
    assert sentence.startswith("memory: it may not fit; what saves most: ")
    shown = [name for name, _ in memory_savings(options, config, 1, "cpu")[: memory_report.SAVINGS_SHOWN]]
    assert shown and all(name in sentence for name in shown)
    assert memory.facts()["memory"]["device_mb"] == 256


def test_a_model_that_cannot_be_followed_does_not_stop_the_run():
    config = LlamaConfig(**(SIZES | {"num_key_value_heads": 3}))  # the 4 heads cannot share them
    memory = find_memory(Accelerator(cpu=True), TrainOptions(max_length=64), config, ROWS)
    assert memory.facts() == {} and memory.describe().startswith("no estimate: method lora on this model cannot be ")


def test_the_memory_of_the_host_is_said_where_a_gpu_leaves_something_there():
    terms = {"weights": 6 * GB, "Python": GB}
    there = RunMemory(GB, "this GPU has", MemoryEstimate({"weights": 0}, host=terms))
    assert there.describe_host().startswith("7.0 GB = 6.0 weights + 1.0 Python; the host has ")
    assert RunMemory(GB, "this GPU has", MemoryEstimate({"weights": 0}, host={"Python": GB})).describe_host() == ""


def test_advice_that_leaves_no_room_for_virtual_tokens_is_not_given():
    options = TrainOptions(max_length=300, method="prompt", method_options={"num_virtual_tokens": 200})
    savings = memory_savings(options, LlamaConfig(**SIZES), 1, "cpu")
    assert savings and not any(name.startswith("max_length") for name, _ in savings)
