"""Memory that runs out: one sentence, exit code 2, run.json says why, and nothing is half-written."""

import ast
import importlib.util
import itertools
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import LIMIT, Cell, error_lines, find_incomplete, launch
from support import ROOT, saved_steps

from accel_llm.errors import ConfigError
from accel_llm.system.out_of_memory import PLACES, STEP_PLACES, memory_failure
from accel_llm.training.memory_estimate import MemoryEstimate

CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.50 GiB of which 0.12 GiB is free."
)


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as error:
        call()
    return error.value


@pytest.fixture
def little_memory() -> Any:
    """Within the test, the process may map 600 MiB more than it has."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (600 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit it")
def test_what_the_libraries_raise_on_the_host_is_recognized(little_memory, tmp_path):
    file = tmp_path / "large"
    with file.open("wb") as handle:
        handle.truncate(3 << 30)
    calls = {
        "torch": (lambda: torch.empty(1 << 30), "4.00 GB"),
        "numpy": (lambda: np.empty(1 << 30), "8.00 GB"),
        "python": (lambda: bytes(1 << 31), None),
        "a mapped file": (lambda: torch.from_file(str(file), size=1 << 29), None),
    }
    for name, (call, size) in calls.items():
        sentence = memory_failure(raised(call))
        assert sentence and sentence.startswith("Out of memory on the host"), name
        assert ("more were needed" in sentence) == (size is not None), name
        assert size is None or f", where {size} more were needed; the machine has " in sentence
        assert "may take" in sentence and "(ulimit)" in sentence


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (torch.OutOfMemoryError(CUDA), "the device, where 2.50 GB more were needed"),
        (RuntimeError("CUDA error: out of memory"), "the device or the host"),  # pinned memory, a context
        (RuntimeError("NCCL error: Cuda failure 2 'out of memory'"), "the device"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "the device"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 2147483648 bytes."), "the host"),
        (RuntimeError("std::bad_alloc"), "the host"),
        (OSError(12, "Cannot allocate memory"), "the host"),
    ],
)
def test_other_texts_of_libraries_are_recognized(error, where):
    assert str(memory_failure(error)).startswith(f"Out of memory on {where}")


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    for error in (
        RuntimeError("out of resource: shared memory, Required: 163840, Hardware limit: 101376"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ConfigError("model_name_or_path: out of memory is a folder."),
        OSError(28, "No space left on device"),
        KeyError("memory"),
    ):
        assert memory_failure(error) is None


def test_a_lack_of_memory_behind_another_error_is_found():
    def misread() -> None:
        try:
            raise torch.OutOfMemoryError(CUDA)
        except RuntimeError:
            raise ConfigError("model_name_or_path: it cannot be loaded.") from None

    assert str(memory_failure(raised(misread))).startswith("Out of memory on the device")


def test_its_tensors_are_given_free():
    tensors = []

    def fail() -> None:
        held = torch.zeros(10)
        tensors.append(held.untyped_storage()._weak_ref())
        raise MemoryError

    error = raised(fail)
    assert memory_failure(error)
    assert torch.UntypedStorage._expired(tensors[0])


def test_the_functions_that_say_where_a_run_is_exist():
    names = {
        f"{'script' if path.parent.name == 'launch' else path.stem}.{node.name}"
        for path in [*(ROOT / "accel_llm").rglob("*.py"), ROOT / "launch" / "sft.py", *LIBRARIES]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert {*PLACES, *STEP_PLACES} <= names


LIBRARIES = [
    Path(str(importlib.util.find_spec(name).origin))  # type: ignore[union-attr]
    for name in ("accelerate.accelerator", "accelerate.optimizer", "deepspeed.runtime.engine")
]


# Where it happens: the function that fails, which call of it (or the first one in step 2), and what the sentence says.
PLANTED = {
    "loading": ("accel_llm.training.setup.load_model", 1, "while the model was loaded"),
    "weights": ("accel_llm.model.placement.release_pages", 3, "while the weights of base_model.model.model."),
    "checks": ("accel_llm.training.model_checks.check_loss", 1, "in the checks at the start"),
    "forward": ("accel_llm.model.loss.forward_arguments", "step 2", "in the forward pass of step 2"),
    "backward": ("torch.Tensor.backward", "step 2", "in the backward pass of step 2"),
    "optimizer": ("torch.optim.AdamW.step", "step 2", "in the optimizer's step 2"),
    "checkpoint": ("accel_llm.checkpoint.checkpoints.generator_states", 2, "while the checkpoint of step 2 was saved"),
    "export": ("accel_llm.training.export.gather_weights", 1, "in the export"),
    "last evaluation": (
        "accel_llm.training.evaluation.next_token_loss",
        1,
        "in the last evaluation (the trained model ",
    ),
}
STEPS_SAVED = {"forward": [1], "backward": [1], "optimizer": [1], "checkpoint": [1], "export": [2, 3]}


TERMS = {"weights": 2 << 30, "peak": 1 << 29}
SAVINGS = [("a: true", 3 << 29), ("b: 1", 1 << 29), ("c: 2", 1 << 20), ("d: 3", 1 << 20)]  # of which three are named


def give_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not compute the estimate, which takes seconds."""
    monkeypatch.setattr("accel_llm.training.memory_advice.estimate_memory", lambda *_: MemoryEstimate(TERMS))
    monkeypatch.setattr("accel_llm.training.memory_advice.memory_savings", lambda *_: SAVINGS)


def plant(monkeypatch: pytest.MonkeyPatch, name: str, when: int | str) -> None:
    """Let one call of a function run out of memory."""
    owner_name, _, last = name.rpartition(".")
    try:
        owner: Any = importlib.import_module(owner_name)
    except ModuleNotFoundError:
        module, _, attribute = owner_name.rpartition(".")
        owner = getattr(importlib.import_module(module), attribute)
    honest, calls = getattr(owner, last), itertools.count(1)

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        frames = itertools.takewhile(bool, accumulate_frames())
        steps = {frame.f_locals.get("step") for frame in frames if frame.f_code.co_name == "train"}
        if (2 in steps) if when == "step 2" else (next(calls) == when):
            raise torch.OutOfMemoryError(CUDA)
        return honest(*arguments, **keywords)

    monkeypatch.setattr(owner, last, wrapper)


def accumulate_frames() -> Any:
    frame = sys._getframe(1)
    while frame:
        yield frame
        frame = frame.f_back


def sft_words(tiny: Path, chats: Path, out: Path) -> tuple[object, ...]:
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--eval_files", chats, "--max_length", 128)
    return (*words, "--max_steps", 3, "--save_steps", 1, "--output_dir", out)


@pytest.mark.parametrize("place", PLANTED)
def test_the_sentence_says_where_and_what_helps_and_nothing_is_half_written(
    place, script, tiny, chats, tmp_path, monkeypatch
):
    name, when, where = PLANTED[place]
    plant(monkeypatch, name, when)
    give_advice(monkeypatch)
    out = tmp_path / "out"
    error = raised(lambda: script("sft", *sft_words(tiny, chats, out)))
    sentence = memory_failure(error)
    assert sentence and sentence.startswith(f"Out of memory on the device {where}")
    assert sentence.count("\n") == 0 and sentence.endswith("from its last whole checkpoint, if there is one.")
    if place == "last evaluation":
        assert f"complete in {out / 'adapter'})" in sentence
        assert "lower max_length, which is 128" in sentence
    else:
        assert "; estimated were weights 2.00 GB + peak 0.50 GB = 2.50 GB; " in sentence
        assert "; what saves most: a: true (1.50 GB), b: 1 (0.50 GB), c: 2 (1.0 MB); with such a change " in sentence
    if place in ("loading", "weights", "checks"):
        assert not out.exists()
        return
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert run["status"] == "failed" and run["error"] == sentence
    assert saved_steps(out) == STEPS_SAVED.get(place, [2, 3]) and find_incomplete(out) == []

    if place not in ("optimizer", "checkpoint"):  # one is enough for those that end like it
        return
    # The same command continues from the last checkpoint.
    monkeypatch.undo()
    script("sft", *sft_words(tiny, chats, out))
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["status"] == "done"


def test_an_evaluation_that_runs_out_is_a_problem_of_a_run_that_goes_on(script, tiny, chats, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plant(monkeypatch, "accel_llm.training.evaluation.next_token_loss", 2)
    give_advice(monkeypatch)
    words = (*sft_words(tiny, chats, out), "--eval_steps", 1, "--per_device_eval_batch_size", 24)
    with pytest.raises(ConfigError, match="something beside the training failed"):
        script("sft", *words)
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    (problem,) = run["problems"]
    assert problem.startswith(
        "The evaluation after step 2 failed (Out of memory on the device in the evaluation after "
    )
    assert problem.endswith("; lower per_device_eval_batch_size, which is 24).")
    assert run["status"] == "done" and (out / "adapter" / "adapter_model.safetensors").is_file()


# Leaves 64 MiB to map from the first call of a function on.
LIMITED = """
import importlib, resource, runpy, sys

module, name = importlib.import_module(sys.argv[1]), sys.argv[2]
honest = getattr(module, name)

def limited(*arguments):
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (64 << 20),) * 2)
    return honest(*arguments)

setattr(module, name, limited)
del sys.argv[1:3]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def long_chats(folder: Path) -> Path:
    """Write three conversations of about 14,000 tokens."""
    path = folder / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": "a b " * 2000}, {"role": "assistant", "content": "c d " * 2000}]}
    path.write_text(f"{json.dumps(chat)}\n" * 3, encoding="utf-8")
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit it")
@pytest.mark.long
@pytest.mark.parametrize(
    "first_call, preflight, where",
    [
        # The step before the first would have mapped the memory already.
        ("accel_llm.training.loop undo_averaging", False, "in the (forward|backward) pass of step 1"),
        ("accel_llm.checkpoint.rehearsal longest_rows", True, "in a try of the longest rows before the first step"),
    ],
    ids=["in a step", "in the rehearsal"],
)
def test_a_step_that_needs_more_than_there_is(first_call, preflight, where, make_model, tmp_path):
    sizes = {"max_position_embeddings": 16384, "hidden_size": 64, "intermediate_size": 256}
    model, out = make_model(tmp_path / "model", **sizes), tmp_path / "out"
    words = (
        "--model_name_or_path",
        model,
        "--train_files",
        long_chats(tmp_path),
        "--max_length",
        16384,
        "--max_steps",
        3,
    )
    words += ("--output_dir", out, "--cache_dir", tmp_path / "cache", "--method", "full")
    words += ("--preflight", preflight)
    command = [sys.executable, "-c", LIMITED, *first_call.split(), "launch/sft.py", *map(str, words)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 2, ended.stderr[-3000:]
    (line,) = ended.stderr.splitlines()[-1:]
    assert re.match(rf"error: Out of memory on the host {where}, where [\d.]+ MB ", line)
    for part in (
        "; the machine has ",
        " (ulimit); estimated were weights ",
        "; what saves most: gradient_checkpointing",
    ):
        assert part in line
    assert "Traceback" not in ended.stderr
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (run["status"], f"error: {run['error']}") == ("failed", line)
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == ["report.html", "run.json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_that_is_too_small(script, make_model, tmp_path):
    sizes = {"max_position_embeddings": 16384, "hidden_size": 64, "intermediate_size": 256}
    model, out = make_model(tmp_path / "model", **sizes), tmp_path / "out"
    words = ("--model_name_or_path", model, "--train_files", long_chats(tmp_path), "--max_length", 16384)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (64 << 20)) / total)
    try:
        error = raised(lambda: script("sft", *words, "--method", "full", "--max_steps", 1, "--output_dir", out))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    sentence = str(memory_failure(error))
    assert re.match(
        r"Out of memory on the device (in|while) .*, where [\d.]+ [KM]B more were needed; cuda:0 has ", sentence
    )
    assert re.search(
        r" of which this process may take, .* are free, and this process holds .* of it in tensors;", sentence
    )
    assert "; what saves most: gradient_checkpointing: true" in sentence


@pytest.mark.long
def test_one_rank_that_runs_out_ends_the_job_with_one_sentence(tmp_path):
    outcome = launch(Cell("ddp", 1, "backward", "memory"), tmp_path)
    assert outcome.code != 0 and outcome.seconds is not None and outcome.seconds < LIMIT
    first, second = error_lines(outcome.screen)  # at once, and below the launcher's lines
    assert first == second == outcome.screen.rstrip().splitlines()[-1]
    assert first.startswith("error (rank 1): Out of memory on the device in step 2; estimated were weights ")
    run = outcome.run
    assert run and (run["status"], run["failed_rank"], f"error (rank 1): {run['error']}") == ("failed", 1, first)
    assert outcome.incomplete == [] and outcome.alive == []
    assert "Traceback" not in outcome.screen.split(first)[0]
