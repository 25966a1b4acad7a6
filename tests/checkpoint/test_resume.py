"""The start of a run: which output folders are accepted, and whether a checkpoint belongs to the run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import Stopped, checkpoint_path, equal_tensors, metrics, run_json, saved_steps, weights

from accel_llm.checkpoint.resume import (
    FIXED_OPTIONS,
    HARMLESS_OPTIONS,
    LOCATION_OPTIONS,
    RUN_FILES,
    remove_obsolete_files,
)
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.training.start import Start

STOP = 3
Train = Callable[..., Path]


@pytest.fixture
def half_run(train, interrupt, tmp_path) -> Path:
    """The folder of a run that ended after its third step of six."""
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--lora_r", 4)
    return tmp_path / "run"


def test_finished_runs_and_other_files_in_output_dir_are_refused(train, tmp_path):
    run = train(tmp_path / "run", "--max_steps", 1)
    before = (run / "run.json").read_bytes()
    with pytest.raises(ConfigError) as error:
        train(run)
    assert str(error.value) == (
        f"output_dir: {run} holds a finished run; name another folder, or set overwrite_output_dir to start anew."
    )
    with pytest.raises(ConfigError, match="holds a finished run"):
        train(run, "--resume_from_checkpoint", checkpoint_path(run, 1))
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
    with pytest.raises(ConfigError, match=r"thesis.txt is a file; name another folder\.$"):
        train(foreign / "thesis.txt")


def test_hidden_files_of_a_killed_process_do_not_stop_a_run(train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.77.partial").write_text("{", encoding="utf-8")
    run = train(tmp_path / "run", "--max_steps", 1)
    assert run_json(run)["status"] == "done" and not list(run.glob(".*"))


def test_overwriting_removes_only_files_of_a_run_and_only_when_the_new_run_is_ready(train, tmp_path):
    run = train(tmp_path / "run", "--max_steps", 2, "--save_steps", 1, "--method", "lora")
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="the model has no 'nope'"):
        train(run, "--overwrite_output_dir", "--lora_target_modules", "nope")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    train(run, "--overwrite_output_dir", "--max_steps", 1, "--method", "full")
    assert saved_steps(run) == [1] and not (run / "adapter").exists() and (run / "model").is_dir()
    assert (run / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [line["step"] for line in metrics(run)] == [1]


@pytest.mark.long
def test_an_interrupted_run_without_a_checkpoint_starts_anew(train, interrupt, tmp_path):
    interrupt(2)
    with pytest.raises(Stopped):
        train(tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
    run, whole = train(tmp_path / "run"), train(tmp_path / "whole")
    assert metrics(run) == metrics(whole) and equal_tensors(weights(run), weights(whole))


def test_a_run_with_damaged_checkpoints_only_is_not_started_anew_without_a_word(train, interrupt, tmp_path):
    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 2)
    for step in (2, 4):
        (checkpoint_path(tmp_path / "run", step) / "state.json").unlink()
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "run", "--save_steps", 2)
    assert str(error.value) == (
        f"resume_from_checkpoint: auto: none of the checkpoints in {tmp_path / 'run' / 'checkpoints'} is intact; repair one, "
        "or set resume_from_checkpoint: none to start anew."
    )
    assert saved_steps(tmp_path / "run") == [2, 4] and len(metrics(tmp_path / "run")) == 4
    train(tmp_path / "run", "--resume_from_checkpoint", "none", "--max_steps", 1)
    assert saved_steps(tmp_path / "run") == [1]


def test_a_process_killed_while_it_removes_old_files_leaves_run_json(tmp_path, monkeypatch):
    for name in RUN_FILES:
        (tmp_path / name).write_text("{}", encoding="utf-8")
    unlink, removed = Path.unlink, []

    def dying(path: Path, missing_ok: bool = False) -> None:
        if len(removed) == len(RUN_FILES) - 1:
            raise Stopped("the power went")
        removed.append(path.name)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(Stopped):
        remove_obsolete_files(Start(output_dir=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.long
def test_resume_from_a_named_checkpoint_from_none_and_from_nothing(train, interrupt, tmp_path):
    whole = train(tmp_path / "whole", "--save_steps", 2, "--save_total_limit", 9)
    checkpoint = checkpoint_path(whole, 2)
    other = train(tmp_path / "other", "--resume_from_checkpoint", checkpoint)
    assert [line["step"] for line in metrics(other)] == [3, 4, 5, 6]
    assert equal_tensors(weights(other), weights(whole)) and checkpoint.is_dir()

    interrupt(4)
    with pytest.raises(Stopped):
        train(tmp_path / "run", "--save_steps", 2)
    with pytest.raises(ConfigError, match=r"run holds checkpoints of another run than .*step-00000002; name another"):
        train(tmp_path / "run", "--resume_from_checkpoint", checkpoint)
    assert saved_steps(tmp_path / "run") == [2, 4]
    train(tmp_path / "run", "--resume_from_checkpoint", "none", "--max_steps", 1)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1] and saved_steps(tmp_path / "run") == [1]

    missing = tmp_path / "nowhere"
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "new", "--resume_from_checkpoint", missing)
    assert str(error.value) == f"resume_from_checkpoint: {missing} does not exist."
    with pytest.raises(ConfigError, match=r"whole is not a whole checkpoint \(no manifest\.json\)\.$"):
        train(tmp_path / "new", "--resume_from_checkpoint", whole)
    assert not (tmp_path / "new").exists()


def test_settings_that_change_the_run_are_listed_and_refused_unless_allowed(train, half_run, tmp_path):
    saved = checkpoint_path(half_run, STOP)
    with pytest.raises(ConfigError) as error:
        train(half_run, "--lora_r", 8, "--optim", "sgd", "--seed", 7, "--learning_rate", 1e-3, "--logging_steps", 2)
    anew, allow = "or resume_from_checkpoint: none.", "give the same, allow it by allow_changed:"
    assert sorted(error.value.problems) == [
        f"learning_rate: {saved} was saved with 0.01, this run has 0.001; {allow} learning_rate, {anew}",
        f"lora_r: {saved} was saved with 4, this run has 8; give the same, {anew}",
        f"optim: {saved} was saved with 'adamw', this run has 'sgd'; give the same, {anew}",
        f"seed: {saved} was saved with 42, this run has 7; {allow} seed, {anew}",
    ]
    words = ("--lora_r", 4, "--learning_rate", 1e-3, "--max_steps", 4)
    with pytest.raises(ConfigError, match=r"^max_steps: .* was saved with 6, this run has 4"):
        train(half_run, *words, "--allow_changed", "learning_rate")
    with pytest.raises(ConfigError, match=r"lora_r: .* was saved with 4, this run has 8; give the same, or resume"):
        train(half_run, "--lora_r", 8, "--allow_changed", "lora_r")
    assert saved_steps(half_run) == [STOP]
    train(half_run, *words, "--allow_changed", "learning_rate", "max_steps")
    assert metrics(half_run)[-1]["step"] == 4 and metrics(half_run)[-1]["learning_rate"] < 1e-3


def test_harmless_settings_pass_and_change_nothing(train, half_run, tmp_path):
    harmless = ("--logging_steps", 2, "--save_steps", 2, "--save_total_limit", 1, "--run_name", "again")
    run = train(half_run, "--lora_r", 4, *harmless, "--preprocessing_num_workers", 2, "--per_device_eval_batch_size", 3)
    assert equal_tensors(weights(run), weights(train(tmp_path / "whole", "--lora_r", 4)))


def test_every_option_is_harmless_or_compared():
    assert PretrainOptions.model_fields.keys() | {"overfit"} >= HARMLESS_OPTIONS
    assert not HARMLESS_OPTIONS & (set(FIXED_OPTIONS) | LOCATION_OPTIONS.keys())


def test_the_rows_of_a_step_may_be_split_differently_but_their_number_must_be_equal(train, half_run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^total_batch_size: .* was saved with 1, this run has 2; give the same, allow"
    ):
        train(half_run, "--lora_r", 4, "--per_device_train_batch_size", 2)
    run = train(half_run, "--lora_r", 4, "--total_batch_size", 2, "--allow_changed", "total_batch_size")
    assert metrics(run)[-1]["epoch"] > metrics(run)[2]["epoch"]
    assert json.loads((checkpoint_path(run, 6) / "state.json").read_text())["rows"] == 3 + 3 * 2


def test_the_same_model_and_data_may_be_moved_but_not_replaced(train, half_run, tmp_path, tiny, chats, make_model):
    model = shutil.copytree(tiny, tmp_path / "moved")
    rows = shutil.copy(chats, tmp_path / "rows.jsonl")
    words = ("--lora_r", 4, "--model_name_or_path", model)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(chats.read_text().splitlines(keepends=True)[1:]), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^train_files: .* was saved with .*chats.jsonl.*this run has .*other.jsonl"):
        train(half_run, *words, "--train_files", other)
    wider = make_model(tmp_path / "wider", hidden_size=64)
    with pytest.raises(ConfigError, match=r"^model_name_or_path: .* was saved with .*tiny.*this run has .*wider"):
        train(half_run, "--lora_r", 4, "--model_name_or_path", wider)
    with pytest.raises(ConfigError, match=r"holds other weights than this run trains|holds .* elements of"):
        train(half_run, "--lora_r", 4, "--model_name_or_path", wider, "--allow_changed", "model_name_or_path")
    run = train(half_run, *words, "--train_files", rows)
    assert equal_tensors(weights(run), weights(train(tmp_path / "whole", "--lora_r", 4)))


def test_rows_and_weights_that_changed_at_the_same_path_are_noticed(train, interrupt, tmp_path, tiny, chats):
    model = shutil.copytree(tiny, tmp_path / "model")
    rows = Path(shutil.copy(chats, tmp_path / "rows.jsonl"))
    words = ("--model_name_or_path", model, "--train_files", rows)
    interrupt(STOP)
    with pytest.raises(Stopped):
        train(tmp_path / "run", *words)
    rows.write_text("".join(chats.read_text().splitlines(keepends=True)[1:]), encoding="utf-8")
    path = model / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["model.norm.weight"][3] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError) as error:
        train(tmp_path / "run", *words)
    assert [problem.split(": ")[0] for problem in sorted(error.value.problems)] == ["model_name_or_path", "train_files"]
    assert "was saved with the rows " in str(error.value) and "the model with the fingerprint " in str(error.value)


def test_a_fingerprint_depends_on_the_content_only(tmp_path, tiny):
    copy = shutil.copytree(tiny, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "_name_or_path": "x"}))
    assert model_fingerprint(str(copy)) == model_fingerprint(str(tiny))
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert model_fingerprint(str(copy)) != model_fingerprint(str(tiny))


@pytest.mark.parametrize("again", ["--overwrite_output_dir", "--resume_from_checkpoint=none"])
def test_what_a_run_reads_is_not_removed_as_the_files_of_an_earlier_run(train, chats, tmp_path, again):
    """Its export as the next model or adapter, or rows that somebody put there: all would be gone before step 1."""
    run = train(tmp_path / "run", "--method", "full", "--max_steps", 1)
    (run / "logs").mkdir()
    shutil.copy(chats, run / "logs" / "chats.jsonl")
    (run / "run.json").write_text(json.dumps(run_json(run) | {"status": "failed"}))
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    (tmp_path / "link").symlink_to(run / "model")
    for words, name, place in (
        (("--model_name_or_path", run / "model"), "model_name_or_path", run / "model"),
        (("--model_name_or_path", tmp_path / "link"), "model_name_or_path", tmp_path / "link"),
        (("--tokenizer_name", run / "model"), "tokenizer_name", run / "model"),
        (("--train_files", run / "logs" / "chats.jsonl"), "train_files", run / "logs" / "chats.jsonl"),
    ):
        with pytest.raises(ConfigError) as error:
            train(run, again, *words)
        assert str(error.value) == (
            f"{name}: {place} is a part of the earlier run in {run}, which this run replaces; move it, or name another "
            "output_dir."
        )
    assert sorted(path.relative_to(run) for path in run.rglob("*") if path.name[0] != ".") == before
    (tmp_path / "link").unlink()
    (run / "model").rename(tmp_path / "model")
    train(run, again, "--model_name_or_path", tmp_path / "model", "--max_steps", 1)
    assert run_json(run)["status"] == "done"
