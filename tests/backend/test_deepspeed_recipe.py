"""The optimizer and the scheduler of a DeepSpeed JSON, such as other trainers read, become options of the run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from accel_llm.backend.deepspeed_recipe import take_optimizer_and_schedule
from accel_llm.backend.zero import build_deepspeed_plugin
from accel_llm.config.command_line import parse_options
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.demo.skills import demo_documents
from accel_llm.errors import ConfigError

# The file of the course that the project grew from (ds_config_zero2.json), value by value.
ZERO2: dict[str, Any] = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": "auto"},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 100,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`launched(optimizer=..., scheduler=...)` lets this process read a JSON with other blocks; a block may be None."""

    def write(**blocks: Any) -> Path:
        settings = {key: value for key, value in (ZERO2 | blocks).items() if value is not None}
        path = tmp_path / "ds_config_zero2.json"
        path.write_text(json.dumps(settings), encoding="utf-8")
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
        return path

    return write


def options(line: str = "") -> PretrainOptions:
    return parse_options(PretrainOptions, f"--config_name c {line}".split(), {"method": "full"})


def refused(line: str = "") -> list[str]:
    with pytest.raises(ConfigError) as error:
        take_optimizer_and_schedule(options(line))
    return error.value.problems


def test_the_file_of_the_course_is_taken_and_its_automatic_values_are_the_recipes(launched, capsys) -> None:
    launched()
    before = options("--learning_rate 1e-4 --warmup_steps 200 --gradient_accumulation_steps 4 --bf16")
    taken = take_optimizer_and_schedule(before)
    assert taken == before.model_copy(update={"optim": "adamw", "lr_scheduler_type": "constant_with_warmup"})
    assert taken.model_fields_set == before.model_fields_set | {"optim", "lr_scheduler_type"}
    assert capsys.readouterr().out.splitlines() == [
        "taken from the DeepSpeed configuration: lr_scheduler_type=constant_with_warmup, optim=adamw",
        "scheduler: the warmup is linear; DeepSpeed's own default is logarithmic",
    ]
    settings = build_deepspeed_plugin(taken, 4, "bf16", cpu=False).deepspeed_config
    assert "optimizer" not in settings and "scheduler" not in settings
    assert settings["gradient_accumulation_steps"] == 4 and settings["gradient_clipping"] == taken.max_grad_norm
    assert settings["train_micro_batch_size_per_gpu"] == taken.per_device_train_batch_size
    zero = settings["zero_optimization"]
    assert zero == ZERO2["zero_optimization"] and isinstance(zero["reduce_bucket_size"], int)


def test_values_in_the_file_become_options(launched) -> None:
    parameters = {"lr": 3e-5, "betas": [0.9, 0.95], "eps": 1e-7, "weight_decay": 0.1}
    warmup = {"warmup_max_lr": 3e-5, "warmup_num_steps": 50, "warmup_type": "linear", "total_num_steps": 900}
    launched(optimizer={"type": "Adam", "params": parameters}, scheduler={"type": "WarmupDecayLR", "params": warmup})
    taken = take_optimizer_and_schedule(options("--learning_rate 3e-5"))  # the same value is no contradiction
    assert (taken.optim, taken.learning_rate, taken.adam_beta1, taken.adam_beta2) == ("adamw", 3e-5, 0.9, 0.95)
    assert (taken.adam_epsilon, taken.weight_decay, taken.max_steps) == (1e-7, 0.1, 900)
    assert (taken.lr_scheduler_type, taken.warmup_steps) == ("linear", 50)
    launched(optimizer=None, scheduler={"type": "WarmupCosineLR"})
    taken = take_optimizer_and_schedule(options())
    assert (taken.lr_scheduler_type, taken.min_lr_rate) == ("cosine_with_min_lr", 0.0001)


def test_a_file_without_these_blocks_changes_nothing(launched) -> None:
    launched(optimizer=None, scheduler=None)
    before = options()
    assert take_optimizer_and_schedule(before) is before


@pytest.mark.parametrize("words", ["--lr_scheduler_type cosine", "--config RECIPE"])
def test_a_recipe_or_a_flag_that_says_otherwise_is_an_error_with_both_values(words, launched, tmp_path) -> None:
    (tmp_path / "recipe.yaml").write_text("lr_scheduler_type: cosine\n", encoding="utf-8")
    launched()
    assert refused(words.replace("RECIPE", str(tmp_path / "recipe.yaml"))) == [
        "scheduler.type: the DeepSpeed configuration says 'constant_with_warmup', but lr_scheduler_type is 'cosine' in the "
        'recipe or on the command line; remove one of them, or write "auto" in the configuration.'
    ]


def test_every_problem_is_named(launched) -> None:
    launched(
        optimizer={"type": "AdamW", "params": {"lr": 1e-3, "adam_w_mode": False, "colour": 1}},
        scheduler={"type": "WarmupLR", "params": {"warmup_max_lr": 2e-3, "warmup_type": "log", "warmup_min_lr": 1e-6}},
    )
    problems = refused("--learning_rate 1e-4")
    assert [problem.partition(":")[0] for problem in problems] == [
        "optimizer.params.adam_w_mode",
        "optimizer.params.colour",
        "scheduler.params.warmup_type",
        "scheduler.params.warmup_min_lr",
        "scheduler.params.warmup_max_lr",
        "optimizer.params.lr",
    ]
    assert "says 0.002, but optimizer.params.lr there says 0.001; correct one." in problems[4]
    assert "says 0.001, but learning_rate is 0.0001 in the recipe" in problems[5]
    launched(optimizer={"type": "OneBitAdam"}, scheduler={"type": "OneCycle"})
    assert [problem.partition(", which")[0] for problem in refused()] == [
        "optimizer.type: the DeepSpeed configuration says 'OneBitAdam'",
        "scheduler.type: the DeepSpeed configuration says 'OneCycle'",
    ]
    launched(optimizer={"type": "AdamW", "params": {"lr": -1}})
    assert refused()[0].startswith(
        "optimizer.params.lr: the DeepSpeed configuration says -1, which learning_rate does not"
    )


def test_rules_between_options_hold_for_what_the_file_sets(launched) -> None:
    launched()
    assert refused("--min_lr_rate 0.2 --lr_scheduler_type cosine_with_min_lr")[0].startswith("scheduler.type: ")
    launched(optimizer={"type": "SGD"}, scheduler=None)
    assert refused("--adam_beta1 0.8") == [
        "adam_beta1: only optim adamw or adamw_8bit or paged_adamw or paged_adamw_8bit or lion uses it, but optim is sgd; "
        "remove it."
    ]


def test_without_deepspeed_no_file_is_read(monkeypatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "missing.json")
    before = options()
    assert take_optimizer_and_schedule(before) is before


@pytest.mark.long
def test_the_commands_of_the_course_start_here(tmp_path) -> None:
    """Its JSON, in a launch YAML, and its options, on two processes; of `--deepspeed` the YAML takes the place."""
    (tmp_path / "ds_config_zero2.json").write_text(json.dumps(ZERO2), encoding="utf-8")
    text = (ROOT / "accelerate_configs" / "zero2.yaml").read_text(encoding="utf-8")
    yaml = text.replace("accelerate_configs/zero2.json", str(tmp_path / "ds_config_zero2.json"))
    (tmp_path / "zero2.yaml").write_text(yaml, encoding="utf-8")
    texts = [json.dumps({"text": page}) for page in demo_documents(0, 60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts), encoding="utf-8")
    base, output = ROOT / "accel_llm" / "demo_base", tmp_path / "out"
    line = (
        f"--config_name {base} --tokenizer_name {base} --torch_dtype bfloat16 --train_files {tmp_path}/texts.jsonl "
        "--block_size 128 --preprocessing_num_workers 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 "
        f"--do_train --output_dir {output} --evaluation_strategy no --learning_rate 1e-4 --num_train_epochs 1 "
        "--warmup_steps 2 --logging_strategy steps --logging_steps 1 --save_strategy steps --save_steps 2 "
        "--save_total_limit 1 --seed 12 --bf16 --gradient_checkpointing --max_steps 4"
    )
    program = str(Path(sys.executable).with_name("accelerate"))
    command = [program, "launch", "--config_file", str(tmp_path / "zero2.yaml"), "--num_processes", "2"]
    process = subprocess.run(
        [*command, "launch/pretrain.py", *line.split()],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    assert process.stdout.count("taken from the DeepSpeed configuration: ") == 1
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    force = run["accelerate"]
    assert run["status"] == "done" and force["strategy"] == "zero2" and force["num_processes"] == 2
    assert force["precision"] == "bf16" and force["accumulation"] == 4
    assert force["deepspeed"]["zero_optimization"]["stage"] == 2 and force["deepspeed"]["gradient_clipping"] == 1.0
    lines = [json.loads(text) for text in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    # Two steps of warmup, then constant: WarmupLR.
    rates = [entry["learning_rate"] for entry in lines if "learning_rate" in entry]
    assert rates == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4, 1e-4])
