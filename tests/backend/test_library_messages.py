"""A library's warning about wrong numbers ends the run, chatter is hidden, and anything else is shown once."""

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import ROOT, run_json

from accel_llm.backend import library_messages
from accel_llm.backend.library_messages import CHATTER, WRONG_NUMBERS, quiet_libraries
from accel_llm.errors import ConfigError
from accel_llm.training import loop

FALLBACK = "ns::product: an autograd kernel was not registered to the Autograd key(s) but we are trying to backprop."
PLANTED = f"""
import sys, warnings
sys.path.insert(0, {str(ROOT / "launch")!r})
import sft
from accel_llm.system.exit import run_script
from accel_llm.training import loop

honest = loop.total_targets

def total_targets(*arguments):
    warnings.warn({FALLBACK!r})
    return honest(*arguments)

loop.total_targets = total_targets
run_script(sft.main)
"""


@pytest.fixture(autouse=True)
def as_in_a_script(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Python's own filters instead of pytest's, and nothing shown yet."""
    monkeypatch.setattr(library_messages, "_shown", set())
    with warnings.catch_warnings():
        warnings.resetwarnings()
        quiet_libraries()
        yield


# The beginnings of real messages: torch 2.13, transformers 5.24, PEFT 0.21, bitsandbytes 0.50.
@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("torch", FALLBACK),
        ("torch", "None of the inputs have requires_grad=True. Gradients will be None"),
        ("torch", "An in-place op on this view can cause backward to fail or produce wrong gradients."),
        (
            "transformers",
            "Some weights of X were not initialized from the model checkpoint\nand are newly initialized: w",
        ),
        (
            "transformers",
            "LlamaModel does not expose input embeddings. Gradients cannot flow back to the token embeddings",
        ),
        ("transformers", "This checkpoint seem corrupted. The tied weights mapping for this model specifies to tie"),
        ("peft", "Found missing adapter keys while loading the checkpoint: ['lora_A']."),
        ("peft", "The following rank_pattern keys did not match any targeted module and were ignored: ['q']."),
        ("bitsandbytes", "FP4 quantization state not initialized. Please call .cuda() or .to(device) on the layer."),
        ("other", "Mismatched dtypes of weight (float32) and input (bfloat16)"),
    ],
)
@pytest.mark.parametrize("channel", ["warnings", "logging"])
def test_a_warning_about_wrong_numbers_is_an_error(library: str, message: str, channel: str) -> None:
    with pytest.raises(ConfigError) as error:
        if channel == "warnings":
            warnings.warn(message, stacklevel=1)
        else:
            logging.getLogger(f"{library}.some.module").warning(message)
    (sentence,) = error.value.problems
    assert message.split()[0] in sentence and sentence.endswith("because its numbers could be wrong).")
    assert channel == "warnings" or sentence.startswith(f"{library}: ")


def test_torch_itself_warns_of_an_operator_without_a_gradient() -> None:
    with torch.library._scoped_library("accel_llm_test", "FRAGMENT") as library:
        library.define("product(Tensor x) -> Tensor")
        library.impl("product", lambda x: x * 2, "CPU")
        output = torch.ops.accel_llm_test.product(torch.ones(2, requires_grad=True))
        with pytest.raises(ConfigError, match=r"accel_llm_test::product: an autograd kernel was not registered"):
            output.sum().backward()


@pytest.mark.parametrize("message", [
    "MatMul8bitLt: inputs will be cast from torch.float32 to float16 during quantization",
    "**** You are using ZeRO with an untested optimizer, proceed with caution *****",
    "LlamaForCausalLM LOAD REPORT from: m\nKey | Status |\nw | MISSING |\nthose params were newly initialized",
])  # fmt: skip
def test_chatter_is_hidden(message: str, capsys: pytest.CaptureFixture[str]) -> None:
    warnings.warn(message, stacklevel=1)
    logging.getLogger("transformers.models").warning(message)
    assert capsys.readouterr() == ("", "")


def test_anything_else_is_shown_once_and_as_one_line(capsys, monkeypatch) -> None:
    for _ in range(2):
        logging.getLogger("peft.tuners").warning("Already unmerged.\n  Nothing to do.")
        warnings.warn("Paged optimizers are not supported on CPU.", stacklevel=1)
    monkeypatch.setenv("RANK", "1")
    logging.getLogger("datasets").error("only the main process shows this")
    assert capsys.readouterr().err.splitlines() == [
        "peft warns: Already unmerged. Nothing to do.",
        "test_library_messages warns: Paged optimizers are not supported on CPU.",
    ]


def test_the_list_of_hidden_messages_is_short_and_has_reasons() -> None:
    assert len(CHATTER) <= 16 and all(len(reason.split()) >= 4 for reason in CHATTER.values())
    assert not set(CHATTER) & set(WRONG_NUMBERS)


def test_a_planted_warning_ends_a_run_in_this_process(script, tiny, chats, tmp_path, monkeypatch) -> None:
    honest = loop.total_targets

    def planted(*arguments):
        logging.getLogger("peft.tuners").warning("Found missing adapter keys while loading: ['a']")
        return honest(*arguments)

    monkeypatch.setattr(loop, "total_targets", planted)
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", 1)
    with pytest.raises(ConfigError, match="peft: Found missing adapter keys"):
        script("sft", *words, "--output_dir", tmp_path / "out")
    assert run_json(tmp_path / "out")["status"] == "failed"


@pytest.mark.long
def test_a_planted_warning_ends_a_launched_run(tiny: Path, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(PLANTED)
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", "128", "--max_steps", "1"]
    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--config_file", "accelerate_configs/ddp.yaml"]
    ended = subprocess.run(
        [*launch, "--num_processes", "2", tmp_path / "planted.py", *words, "--output_dir", tmp_path / "out"],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "error: planted: ns::product: an autograd kernel was not registered" in ended.stderr
    assert "exitcode  : 2" in ended.stderr and run_json(tmp_path / "out")["status"] == "failed"
