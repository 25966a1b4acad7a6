"""A run that was stopped and resumed is bit-equal to one that was not; what a checkpoint and an output folder may be."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from accel_llm import checkpoint
from accel_llm.errors import ConfigError

STEPS, STOP = 6, 3


class Stopped(BaseException):
    """The end of a process, as far as one process can bring it about."""


@pytest.fixture
def train(script, tiny, chats) -> Callable[..., Path]:
    def run(folder: Path, *more: object) -> Path:
        common = ("--max_steps", STEPS, "--logging_steps", 1, "--save_steps", STOP, "--learning_rate", 1e-2)
        files = ("--model_name_or_path", tiny, "--train_files", chats, "--output_dir", folder)
        script("sft", *files, *common, "--max_length", 128, *more)
        return folder

    return run


@pytest.fixture
def interrupt(monkeypatch) -> Callable[[int], None]:
    """`interrupt(3)`: the next run ends after step 3, what was due at it done."""

    def after(last: int) -> None:
        when_due = checkpoint.when_due

        def stop(accelerator, model, optimizer, scheduler, meter, options, step):
            when_due(accelerator, model, optimizer, scheduler, meter, options, step)
            if step == last:
                monkeypatch.setattr(checkpoint, "when_due", when_due)
                raise Stopped("the power went")

        monkeypatch.setattr(checkpoint, "when_due", stop)

    return after


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def metrics(folder: Path) -> list[dict]:
    """What training computed, without what the clock and the memory said."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "peak_memory_mb")} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("adapter/adapter_model.safetensors"), *folder.glob("model/model.safetensors")]
    return load_file(path)


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


LORA = ("--method", "lora", "--lora_dropout", 0.1)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(LORA, id="lora-dropout-adamw"),
        pytest.param(("--method", "full", "--neftune_noise_alpha", 5), id="full-neftune-adamw"),
        pytest.param((*LORA, "--optim", "adamw_8bit", "--lora_r", 64), id="lora-adamw_8bit"),
        pytest.param((*LORA, "--optim", "adafactor", "--gradient_checkpointing"), id="lora-adafactor-checkpointing"),
    ],
)
def test_a_stopped_and_resumed_run_is_bit_equal_to_one_never_stopped(train, interrupt, tmp_path, options):
    whole = train(tmp_path / "whole", *options)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", *options)
    state = json.loads((tmp_path / "parts" / "run.json").read_text(encoding="utf-8"))
    assert state["status"] == "failed" and steps(tmp_path / "parts") == [f"step-{STOP:08d}"]
    assert len(metrics(tmp_path / "parts")) == STOP

    parts = train(tmp_path / "parts", *options)
    assert json.loads((parts / "run.json").read_text(encoding="utf-8"))["status"] == "done"
    assert [line["step"] for line in metrics(parts)] == list(range(1, STEPS + 1))
    assert metrics(parts) == metrics(whole)
    assert equal(weights(parts), weights(whole))
    for name in ("weights.safetensors", "optimizer.safetensors", "rng-00000.safetensors"):
        last = Path("checkpoints") / f"step-{STEPS:08d}" / name
        assert equal(load_file(parts / last), load_file(whole / last))
    moments = load_file(parts / "checkpoints" / f"step-{STEPS:08d}" / "optimizer.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in moments.values()) == ("adamw_8bit" in options)


def test_without_its_randomness_a_resumed_run_is_another_one(train, interrupt, tmp_path, monkeypatch):
    """The test above sees dropout: a resume that forgets the generators ends elsewhere."""
    whole = train(tmp_path / "whole", *LORA)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "parts", *LORA)
    monkeypatch.setattr(checkpoint, "_load_randomness", lambda path, device: None)
    assert not equal(weights(train(tmp_path / "parts", *LORA)), weights(whole))


def test_randomness_comes_back_exactly(tmp_path):
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    # An odd number of normal draws leaves one in the pocket of the generator.
    np.random.standard_normal(3), random.gauss(0, 1), torch.randn(3)
    checkpoint._save_randomness(tmp_path / "rng.safetensors", torch.device("cpu"))

    def draw() -> list[float]:
        drawn = [*torch.randn(5).tolist(), *torch.rand(5).tolist(), *np.random.standard_normal(5).tolist()]
        return [*drawn, *np.random.rand(5).tolist(), *(random.gauss(0, 1) for _ in range(3)), random.random()]

    expected = draw()
    assert draw() != expected
    checkpoint._load_randomness(tmp_path / "rng.safetensors", torch.device("cpu"))
    assert draw() == expected


@pytest.fixture(scope="module")
def sealed(tmp_path_factory) -> Path:
    """Two sealed folders, step 3 and step 6."""
    folder = tmp_path_factory.mktemp("sealed")
    for step in (3, 6):
        path = folder / f"step-{step:08d}"
        (path / "zero").mkdir(parents=True)
        (path / "state.json").write_text(json.dumps({"step": step, "options": {}}), encoding="utf-8")
        (path / "weights.safetensors").write_bytes(bytes(range(256)) * 4)
        (path / "zero" / "part.pt").write_bytes(b"partition")
        checkpoint._seal(path)
    return folder


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:5] + bytes([data[5] ^ 1]) + data[6:])


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json", "zero/part.pt"])
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_named_and_an_older_checkpoint_taken(sealed, tmp_path, capsys, name, how):
    folder = shutil.copytree(sealed, tmp_path / "checkpoints")
    newest = folder / "step-00000006"
    assert checkpoint.newest(folder) == newest and capsys.readouterr().out == ""
    spoil(newest / name, how)
    problem = f"lacks {name}" if how == "missing" else f"has a damaged {name}"
    assert checkpoint.broken(newest) == problem
    assert checkpoint.newest(folder) == folder / "step-00000003"
    assert capsys.readouterr().out == f"checkpoint {newest} {problem}; taking an older one\n"


def test_without_a_whole_manifest_a_folder_is_no_checkpoint(sealed, tmp_path):
    folder = shutil.copytree(sealed, tmp_path / "checkpoints")
    (folder / "step-00000006" / "manifest.json").unlink()
    assert checkpoint.broken(folder / "step-00000006") == "is not a whole checkpoint (no manifest.json)"
    spoil(folder / "step-00000003" / "manifest.json", "truncated")
    assert checkpoint.broken(folder / "step-00000003") == "has a damaged manifest.json"
    assert checkpoint.newest(folder) is None
    assert checkpoint.broken(folder / "step-00000009") == "does not exist"


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    folder = train(tmp_path / "two", "--save_steps", 1)
    assert steps(folder) == ["step-00000005", "step-00000006"]
    folder = train(tmp_path / "one", "--save_steps", 4, "--save_total_limit", 1)
    assert steps(folder) == ["step-00000006"]


def test_a_damaged_newer_checkpoint_does_not_outlive_the_ones_to_come(train, interrupt, tmp_path):
    """Rotation goes by step: were it left in place, it would push the good ones out."""
    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 2)
    spoil(tmp_path / "run" / "checkpoints" / "step-00000004" / "weights.safetensors", "truncated")
    interrupt(3)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 1, "--save_total_limit", 1)
    assert steps(tmp_path / "run") == ["step-00000003"]
    assert checkpoint.broken(tmp_path / "run" / "checkpoints" / "step-00000003") is None


def test_what_an_output_folder_may_be_used_for(train, tmp_path, tiny):
    run = train(tmp_path / "run", "--max_steps", 1)
    before = (run / "run.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(run)
    assert str(error.value) == (
        f"output_dir: {run} holds a finished run; name another folder, or set overwrite_output_dir to start anew."
    )
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(run, "--resume_from_checkpoint", run / "checkpoints" / "step-00000001")
    assert (run / "run.json").read_bytes() == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work", encoding="utf-8")
    for content in (None, "{broken", "[]", "{}"):
        if content is not None:
            (foreign / "run.json").write_text(content, encoding="utf-8")
        with pytest.raises(ConfigError) as error:
            train(foreign)
        assert str(error.value) == (
            f"output_dir: {foreign} holds files that are not a run of this project; name another folder, or set "
            "overwrite_output_dir."
        )
    with pytest.raises(ConfigError, match=r"thesis.txt is a file; name a folder\.$"):
        train(foreign / "thesis.txt")


def test_overwriting_removes_what_is_ours_alone_and_only_once_the_new_run_stands(train, tmp_path):
    run = train(tmp_path / "run", "--max_steps", 2, "--save_steps", 1, "--method", "lora")
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="the model has no 'nope'"):
        train(run, "--overwrite_output_dir", "--lora_target_modules", "nope")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    train(run, "--overwrite_output_dir", "--max_steps", 1, "--method", "full")
    assert steps(run) == ["step-00000001"] and not (run / "adapter").exists() and (run / "model").is_dir()
    assert (run / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [line["step"] for line in metrics(run)] == [1]


def test_an_interrupted_run_without_a_checkpoint_starts_anew(train, interrupt, tmp_path):
    interrupt(2)
    with pytest.raises(Stopped):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    run, whole = train(tmp_path / "run"), train(tmp_path / "whole")
    assert metrics(run) == metrics(whole) and equal(weights(run), weights(whole))


def test_resume_from_a_named_checkpoint_from_none_and_from_nothing(train, interrupt, tmp_path):
    whole = train(tmp_path / "whole", "--save_steps", 2, "--save_total_limit", 9)
    named = whole / "checkpoints" / "step-00000002"
    other = train(tmp_path / "other", "--resume_from_checkpoint", named)
    assert [line["step"] for line in metrics(other)] == [3, 4, 5, 6]
    assert equal(weights(other), weights(whole)) and named.is_dir()

    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 2)
    train(tmp_path / "run", "--resume_from_checkpoint", "none", "--max_steps", 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1] and steps(tmp_path / "run") == ["step-00000001"]

    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "new", "--resume_from_checkpoint", missing)
    assert str(error.value) == f"resume_from_checkpoint: {missing} does not exist."
    with pytest.raises(ConfigError, match=r"whole is not a whole checkpoint \(no manifest\.json\)\.$"):
        train(tmp_path / "new", "--resume_from_checkpoint", whole)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_of_other_settings_is_refused_by_name(train, interrupt, tmp_path, make_model):
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--lora_r", 4)
    saved = tmp_path / "run" / "checkpoints" / "step-00000003"
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "run", "--lora_r", 8, "--optim", "sgd")
    advice = "give the same, or resume_from_checkpoint: none."
    assert error.value.problems == [
        f"optim: {saved} was saved with adamw, this run has sgd; {advice}",
        f"lora_r: {saved} was saved with 4, this run has 8; {advice}",
    ]
    wider = make_model(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ConfigError, match="holds other weights than this run trains; the method or model differs"):
        train(tmp_path / "run", "--lora_r", 4, "--model_name_or_path", wider)
    assert steps(tmp_path / "run") == ["step-00000003"]
