"""Flags and recipes become checked options, and every problem is one sentence that names the remedy."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from accel_llm.config.command_line import parse_options, resolved_options, shell_command
from accel_llm.config.options import OptimOptions, SftOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.config.tool_options import (
    ChatOptions,
    ExportOptions,
    ExtractOptions,
    MergeOptions,
    PredictOptions,
    ShowOptions,
)
from accel_llm.errors import ConfigError


class Sft(SftOptions):
    """Script"""


class Pretrain(PretrainOptions):
    """Script"""


class Show(Sft, ShowOptions):
    """Script"""


def sft(line: str = "", **defaults) -> Sft:
    return parse_options(Sft, line.split(), defaults)


def problems(options_class, line: str, **defaults) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_options(options_class, line.split(), defaults)
    return caught.value.problems


def recipe(folder, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return f"--config {path}"


def test_defaults_are_valid_and_documented():
    for options_class in (Sft, Pretrain, Show, MergeOptions, ExportOptions, ChatOptions, PredictOptions):
        assert all(field.description for field in options_class.model_fields.values())
    assert Sft() == sft()
    assert sft().model_fields_set == set()


def test_every_way_to_write_a_flag():
    options = sft(
        "--train_files a.json b.json --eval-files=c.json --packing false --gradient_checkpointing "
        "--use_dora true --learning-rate 2e-4 --warmup_steps=10 --init_lora_weights olora"
    )
    assert options.train_files == ["a.json", "b.json"]
    assert options.eval_files == ["c.json"]
    assert (options.packing, options.gradient_checkpointing, options.use_dora) == (None, True, True)
    assert (options.learning_rate, options.warmup_steps) == (2e-4, 10)
    assert options.init_lora_weights == "olora"


def test_a_repeated_flag_is_overruled_and_a_repeated_list_grows():
    options = sft("--seed 1 --train_files a b --seed 2 --train_files c")
    assert (options.seed, options.train_files) == (2, ["a", "b", "c"])


def test_precedence_is_class_then_script_then_recipe_then_flag(tmp_path):
    config = recipe(tmp_path, "max_length: 64\nseed: 3\nlora_r: 4\n")
    options = sft(f"{config} --seed 4", lora_r=8, max_length=128, lora_alpha=9)
    assert (options.logging_steps, options.lora_alpha, options.max_length, options.lora_r) == (10, 9, 64, 4)
    assert options.seed == 4


def test_a_recipe_is_read_as_its_author_means_it(tmp_path):
    text = (
        "learning-rate: 2e-4\ntrain_files: a.json\nreport_to: none\nlimit_rows: null\nmax_steps: 1_000\nrun_name: 7\n"
    )
    options = sft(recipe(tmp_path, text))
    assert (options.learning_rate, options.train_files, options.report_to) == (2e-4, ["a.json"], [])
    assert (options.limit_rows, options.max_steps, options.run_name) == (None, 1000, "7")
    assert sft(recipe(tmp_path, "# nothing\n")) == sft()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1,\nb: 2", "recipe.yaml, line 2, is not YAML: expected ',' or ']', but got '<stream end>'."),
        ("- a\n- b", "recipe.yaml holds a list; a recipe consists of lines `option: value`."),
        ("just words", "recipe.yaml holds a str; a recipe consists of lines `option: value`."),
        ("seed: 1\nlora_r: 8\nseed: 2", "seed: given 2 times in"),
        ("lora:\n  r: 8", "lora: no such option; did you mean lora_r?"),
        ("seed: !!python/object/apply:os.system [ls]", "line 1, is not YAML: could not determine a constructor"),
    ],
)
def test_an_unusable_recipe_gives_one_sentence(tmp_path, text, problem):
    (sentence,) = problems(Sft, recipe(tmp_path, text))
    assert problem in sentence


def test_a_recipe_that_is_missing_or_not_text(tmp_path):
    assert problems(Sft, "--config gone.yaml") == ["config: gone.yaml cannot be read: No such file or directory."]
    assert problems(Sft, f"--config {tmp_path}") == [f"config: {tmp_path} cannot be read: Is a directory."]
    (tmp_path / "binary.yaml").write_bytes(b"seed: \xff\xfe")
    (sentence,) = problems(Sft, f"--config {tmp_path / 'binary.yaml'}")
    assert "binary.yaml cannot be read: 'utf-8' codec" in sentence
    assert problems(Sft, "--config a.yaml b.yaml") == [
        "config: ['a.yaml', 'b.yaml'] is not allowed; give one YAML file."
    ]


def test_all_problems_are_reported_at_once(tmp_path):
    line = (
        "stray --lerning_rate 1 --lora_r 0 --eval_share 1 --precision fp8 --max_steps 3 --num_train_epochs 2 "
        "--report_to wandb foo --logging_steps --save_steps 1.5 --deepspeed z.json"
    )
    sentences = problems(Sft, f"{line} {recipe(tmp_path, 'pakcing: true')}")
    assert sorted(sentences) == [
        "'stray' does not belong to an option; a recipe is given as --config stray.",
        "deepspeed: 'z.json' has no meaning here; the launch YAML names it: write it as deepspeed_config_file into a "
        "copy of accelerate_configs/zero2.yaml, and start with `accelerate launch --config_file`.",
        "eval_share: '1' is not allowed; give a number of at least 0 and below 1.",
        "lerning_rate: no such option; did you mean learning_rate?",
        "logging_steps: true (or no value) is not allowed; give a whole number of at least 1.",
        "lora_r: '0' is not allowed; give a whole number of at least 1.",
        "pakcing: no such option; did you mean packing?",
        "precision: 'fp8' is not allowed; give auto, bf16, fp16 or fp32.",
        "report_to: ['wandb', 'foo'] is not allowed; give any of tensorboard, wandb, trackio, swanlab.",
        "save_steps: '1.5' is not allowed; give a whole number of at least 0, or none.",
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--seed a", "seed: 'a' is not allowed; give a whole number of at least 0 and below 4294967296."),
        ("--seed 1 2", "seed: ['1', '2'] is not allowed; give a whole number of at least 0 and below 4294967296."),
        ("--packing maybe", "packing: 'maybe' is not allowed; give per_epoch or static, or none."),
        ("--learning_rate nan", "learning_rate: 'nan' is not allowed; give a number above 0, or none."),
        ("--lora_dropout inf", "lora_dropout: 'inf' is not allowed; give a number of at least 0 and below 1."),
        ("--output_dir", "output_dir: true (or no value) is not allowed; give text."),
        ("--train_files", "train_files: true (or no value) is not allowed; give one or several texts."),
        ("--lora_target_modules q_proj(", "lora_target_modules: 'q_proj(' is neither a list of module names nor a "
         "regular expression (missing ), unterminated subpattern at position 6)."),
        ("--qqqq 1", "qqqq: no such option; --help lists all options."),
    ],
)  # fmt: skip
def test_a_wrong_value_gives_one_sentence(line, problem):
    assert problems(Sft, line) == [problem]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--method full --lora_r 4", "lora_r: only method lora or qlora uses it, but method is full; remove it."),
        ("--method full --loraplus_lr_ratio 4",
         "loraplus_lr_ratio: only method lora or qlora uses it, but method is full; remove it."),
        ("--method qlora --load_in_8bit",
         "load_in_8bit: method qlora already holds the base in 4 bits; give one of them."),
        ("--method qlora --load_in_4bit false",
         "load_in_4bit: false contradicts method qlora, which is lora in 4 bits; give method lora."),
        ("--optim sgd --adam_beta1 0.5",
         "adam_beta1: only optim adamw or adamw_8bit or paged_adamw or paged_adamw_8bit or lion uses it, but optim is sgd; "
         "remove it."),
        ("--decay_share 0.2", "decay_share: only lr_scheduler_type warmup_stable_decay uses it, "
         "but lr_scheduler_type is cosine; remove it."),
        ("--init_lora_weights orthogonal --lora_r 3",
         "lora_r: 3 is odd; init_lora_weights orthogonal needs an even rank."),
        ("--method full --offload_embeddings", "offload_embeddings: method full trains no adapter; remove it."),
        ("--method ia3 --lora_r 4", "lora_r: only method lora or qlora uses it, but method is ia3; remove it."),
        ("--method ia3 --master_weights stochastic_rounding", "master_weights: method ia3 always trains in float32; "
         "remove it, or use method full."),
        ("--warmup_steps 1.5", "warmup_steps: 1.5 is neither a whole number of steps nor a share below 1."),
        ("--lr_scheduler_type warmup_stable_decay --warmup_steps 0.3 --decay_share 0.8",
         "decay_share: 0.8 and warmup_steps 0.3 are more than all steps."),
        ("--total_batch_size 8 --gradient_accumulation_steps 2", "total_batch_size: 8 already sets the accumulation; "
         "give it or gradient_accumulation_steps, not both."),
        ("--eval_files a --eval_share 0.1", "eval_share: 0.1 cannot be combined with eval_files; give one of the two."),
        ("--train_files a --eval_steps 5",
         "eval_steps: 5 has no rows to evaluate; give eval_files or eval_share too."),
        ("--early_stopping_patience 3 --eval_steps 5", "early_stopping_patience: it needs a metric to compare evaluations "
         "by; set metric_for_best_model, for example eval/loss."),
        ("--early_stopping_patience 3 --metric_for_best_model eval/loss --eval_steps 0", "early_stopping_patience: it counts "
         "evaluations during the run, but eval_steps is 0."),
    ],
)  # fmt: skip
def test_rules_between_options(line, problem):
    assert problems(Sft, line) == [problem]


def test_rules_only_check_what_the_user_set(tmp_path):
    assert sft("--method full", lora_r=4).method == "full"
    assert sft("--method full --use_dora false").method == "full"
    assert sft("--max_steps 5", num_train_epochs=3).max_steps == 5
    text = "{method: full, lora_r: 4}"
    assert problems(Sft, recipe(tmp_path, text)) == [
        "lora_r: only method lora or qlora uses it, but method is full; remove it."
    ]


LORA_RECIPE = """
method: LoRA
lora_r: 4
lora_alpha: 8
learning_rate: 3.0e-3
method_options: {layers_to_transform: [0]}
load_in_8bit: true
num_train_epochs: 3
"""


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        ("", None),
        ("--method lora", None),
        ("--method qlora --load_in_8bit false", None),
        ("--method adalora", "learning_rate, lora_r, method_options"),
        ("--method ia3", "learning_rate, lora_alpha, lora_r, method_options"),
        ("--method full --learning_rate 1e-5", "load_in_8bit, lora_alpha, lora_r, method_options"),
        ("--method freeze", "learning_rate, load_in_8bit, lora_alpha, lora_r, method_options"),
    ],
)
def test_a_flag_for_another_method_leaves_out_what_the_recipe_sets_for_its_own(line, left_out, tmp_path, capsys):
    options = sft(f"{recipe(tmp_path, LORA_RECIPE)} {line}")
    assert options.num_train_epochs == 3 and (options.lora_r == 4) == (left_out is None)
    said = f"not taken from the recipe, whose method is lora: {left_out}\n" if left_out else ""
    assert capsys.readouterr().out == said
    if "learning_rate" in (left_out or ""):
        assert "learning_rate" not in options.model_fields_set


def test_an_adapter_on_the_command_line_has_its_own_method_and_settings(tmp_path, capsys):
    name = recipe(tmp_path, "method: lora\nlora_r: 4\nnum_train_epochs: 3")
    options = sft(f"{name} --adapter_name_or_path old")
    assert options.num_train_epochs == 3 and options.model_fields_set.isdisjoint({"method", "lora_r"})
    assert capsys.readouterr().out == "not taken from the recipe, because the adapter has its own: method, lora_r\n"
    # What the command line itself says is checked against the adapter.
    assert "method" in sft(f"{name} --adapter_name_or_path old --method lora").model_fields_set
    # The base stays in 4 bits, and the rate of a method is not for another one.
    in_4_bits = sft(f"{recipe(tmp_path, 'method: qlora')} --adapter_name_or_path old")
    assert in_4_bits.in_4_bits and "method" not in in_4_bits.model_fields_set
    name = recipe(tmp_path, "method: ia3\nlearning_rate: 0.1")
    rated = sft(f"{name} --adapter_name_or_path old")
    assert "learning_rate" not in rated.model_fields_set
    full = recipe(tmp_path, "method: full")
    assert problems(Sft, f"{full} --adapter_name_or_path old") == [
        "adapter_name_or_path: method full trains no adapter; remove it."
    ]


def test_modules_to_save_of_a_recipe_are_for_methods_that_have_a_place_for_them(tmp_path, capsys):
    name = recipe(tmp_path, "modules_to_save: lm_head")
    assert sft(f"{name} --method prompt").modules_to_save == []
    assert "whose method is lora: modules_to_save" in capsys.readouterr().out
    assert sft(f"{name} --method ia3").modules_to_save == ["lm_head"]


def test_what_a_recipe_is_for_follows_the_default_of_the_script_and_a_wrong_method_is_a_sentence(tmp_path, capsys):
    # pretrain.py trains all weights unless the user says otherwise.
    line = f"--config_name c {recipe(tmp_path, 'learning_rate: 1.0e-3')} --method"
    assert parse_options(Pretrain, f"{line} full".split(), {"method": "full"}).learning_rate == 1e-3
    assert parse_options(Pretrain, f"{line} freeze".split(), {"method": "full"}).learning_rate != 1e-3
    assert "whose method is full: learning_rate" in capsys.readouterr().out
    assert problems(Pretrain, f"{line} lora ia3") == ["method: ['lora', 'ia3'] is not allowed; give text."]
    # An adapter to go on with is never dropped.
    name = recipe(tmp_path, "adapter_name_or_path: old")
    assert problems(Sft, f"{name} --method full") == ["adapter_name_or_path: method full trains no adapter; remove it."]


def test_defaults_that_depend_on_another_option_are_resolved():
    assert sft().learning_rate == 2e-4
    assert sft("--method full").learning_rate == 2e-5
    assert OptimOptions().learning_rate == 2e-5
    assert (sft().adam_beta2, sft("--optim lion").adam_beta2) == (0.999, 0.99)
    assert sft("--lr_scheduler_type warmup_stable_decay").min_lr_rate == 0
    options = sft("--optim lion --adam_beta2 0.95 --learning_rate 1 --method full")
    assert (options.adam_beta2, options.learning_rate) == (0.95, 1)
    assert "learning_rate" not in sft().model_fields_set


@pytest.mark.parametrize(
    ("value", "target"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj v_proj", ["q_proj", "v_proj"]),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_target_modules_are_names_or_a_pattern(value, target):
    assert sft(f"--lora_target_modules {value}").lora_target_modules == target


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lora_B=1e-3", "embed_tokens=5e-5"], {"lora_B": 1e-3, "embed_tokens": 5e-5}),
        (["{lora_B: 5e-5}"], {"lora_B": 5e-5}),  # YAML itself reads this as a text
        (["none"], {}),
        (["lora_B=-1"], "-1 is not a learning rate; give a number above 0 for 'lora_B'."),
        (["lora_B=fast"], "'fast' is not a learning rate; give a number above 0 for 'lora_B'."),
        (["lora_B=inf"], "'inf' is not a learning rate; give a number above 0 for 'lora_B'."),
        (["(=1"], "'(' is not a regular expression (missing ), unterminated subpattern at position 0)."),
    ],
)
def test_rates_by_pattern_are_pairs(words, expected):
    line = ["--learning_rate_patterns", *words]
    if isinstance(expected, dict):
        assert parse_options(Sft, line).learning_rate_patterns == expected
        return
    with pytest.raises(ConfigError) as caught:
        parse_options(Sft, line)
    assert caught.value.problems == [f"learning_rate_patterns: {expected}"]


RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
ORIGIN = (
    "--config_name config --tokenizer_name tokenizer --torch_dtype bfloat16 --train_files a.jsonl b.jsonl "
    "--block_size 2048 --preprocessing_num_workers 10 --per_device_train_batch_size 16 "
    "--gradient_accumulation_steps 4 --do_train --output_dir out --evaluation_strategy no --learning_rate 1e-4 "
    "--num_train_epochs 1 --warmup_steps 200 --logging_strategy steps --logging_steps 5 --save_strategy steps "
    "--save_steps 100 --save_total_limit 1 --seed 12 --bf16 --gradient_checkpointing --report_to wandb "
    "--resume_from_checkpoint out/checkpoints/step-00000100"
)


def test_the_options_of_the_script_that_the_project_grew_from():
    options = parse_options(Pretrain, ORIGIN.split(), {"method": "full"})
    assert {name: value for name, value in resolved_options(options).items() if name in options.model_fields_set} == {
        "config_name": "config",
        "tokenizer_name": "tokenizer",
        "precision": "bf16",
        "train_files": ["a.jsonl", "b.jsonl"],
        "max_length": 2048,
        "preprocessing_num_workers": 10,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 4,
        "output_dir": "out",
        "learning_rate": 1e-4,
        "num_train_epochs": 1.0,
        "warmup_steps": 200.0,
        "logging_steps": 5,
        "save_steps": 100,
        "save_total_limit": 1,
        "seed": 12,
        "gradient_checkpointing": True,
        "report_to": ["wandb"],
        "resume_from_checkpoint": "out/checkpoints/step-00000100",
    }
    assert problems(Pretrain, f"{ORIGIN} --deepspeed ds_config_zero2.json --logging_dir logs") == [
        "deepspeed: 'ds_config_zero2.json' has no meaning here; the launch YAML names it: write it as "
        "deepspeed_config_file into a copy of accelerate_configs/zero2.yaml, and start with `accelerate launch --config_file`.",
        "logging_dir: 'logs' has no meaning here; metrics.jsonl in output_dir has the metrics; "
        "report_to names trackers that get them too.",
    ]
    assert problems(Pretrain, f"{ORIGIN} --model_name_or_path model")[0].startswith("config_name: both of config_name")
    assert problems(Pretrain, "")[0].startswith("config_name: neither of config_name")
    assert problems(Pretrain, "--config_name c --train_on all") == [
        "train_on: only conversations have turns, but pretraining trains every token; remove it."
    ]


@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--config_name config", "config_name", "config"),
        ("--tokenizer_name tokenizer", "tokenizer_name", "tokenizer"),
        ("--model_name_or_path model", "model_name_or_path", "model"),
        ("--torch_dtype bfloat16", "precision", "bf16"),
        ("--torch_dtype auto", "precision", "auto"),
        ("--train_files a.jsonl b.jsonl", "train_files", ["a.jsonl", "b.jsonl"]),
        ("--block_size 2048", "max_length", 2048),
        ("--preprocessing_num_workers 10", "preprocessing_num_workers", 10),
        ("--per_device_train_batch_size 16", "per_device_train_batch_size", 16),
        ("--gradient_accumulation_steps 4", "gradient_accumulation_steps", 4),
        ("--do_train", "dry_run", False),
        ("--output_dir out", "output_dir", "out"),
        ("--evaluation_strategy no", "eval_share", 0.0),
        ("--learning_rate 1e-4", "learning_rate", 1e-4),
        ("--num_train_epochs 1", "num_train_epochs", 1.0),
        ("--warmup_steps 200", "warmup_steps", 200.0),
        ("--logging_strategy steps", "logging_steps", 10),
        ("--logging_steps 5", "logging_steps", 5),
        ("--save_strategy steps --save_steps 100", "save_steps", 100),
        ("--save_total_limit 1", "save_total_limit", 1),
        ("--seed 12", "seed", 12),
        ("--bf16", "precision", "bf16"),
        ("--gradient_checkpointing", "gradient_checkpointing", True),
        ("--report_to wandb", "report_to", ["wandb"]),
        (
            "--resume_from_checkpoint out/checkpoints/step-00000100",
            "resume_from_checkpoint",
            "out/checkpoints/step-00000100",
        ),
        (
            "--logging_dir logs",
            None,
            "metrics.jsonl in output_dir has the metrics; report_to names trackers that get them too.",
        ),
        ("--deepspeed ds.json", None, "and start with `accelerate launch --config_file`."),
    ],
)
def test_each_option_of_that_script_works_or_is_answered(typed, name, value):
    """A name of None: the answer says what to use here."""
    source = "" if "config_name" in typed or "model_name" in typed else "--config_name c "
    if name is None:
        (problem,) = problems(Pretrain, source + typed)
        assert problem.startswith(f"{typed.split()[0][2:]}: '{typed.split()[1]}' has no meaning here; ")
        assert problem.endswith(value)
        return
    options = parse_options(Pretrain, (source + typed).split(), {"method": "full"})
    assert getattr(options, name) == value


def test_the_recipe_reproduces_the_setting_of_that_script():
    recipe = parse_options(Pretrain, ["--config", str(RECIPES / "qwen2.5_pretrain.yaml")], {"method": "full"})
    script = parse_options(Pretrain, ORIGIN.split(), {"method": "full"})
    # Its model and scheduler stand in its YAML and JSON; the files, the tracker and the workers are the reader's own.
    reader = {"config_name", "tokenizer_name", "train_files", "output_dir", "report_to", "resume_from_checkpoint"}
    reader |= {"preprocessing_num_workers", "lr_scheduler_type"}
    for name in Pretrain.model_fields:
        assert name in reader or getattr(recipe, name) == getattr(script, name), name
    assert recipe.config_name == recipe.tokenizer_name == "Qwen/Qwen2.5-1.5B"
    assert recipe.lr_scheduler_type == "constant_with_warmup"  # WarmupLR of DeepSpeed


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("--bf16", "precision", "bf16"),
        ("--bf16 true", "precision", "bf16"),
        ("--bf16 False", "precision", "auto"),
        ("--fp16", "precision", "fp16"),
        ("--dtype float32", "precision", "fp32"),
        ("--torch_dtype auto --bf16", "precision", "bf16"),
        ("--mixed_precision no", "precision", "fp32"),
        ("--quantization_bit 4", "load_in_4bit", True),
        ("--finetuning_type freeze", "method", "freeze"),
        ("--finetuning_type full", "method", "full"),
        ("--model_max_length 99", "max_length", 99),
        ("--lora_target q_proj,v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--data_path a --data_path b", "train_files", ["a", "b"]),
        ("--warmup_ratio 0.1", "warmup_steps", 0.1),
        ("--optim adamw_torch_fused", "optim", "adamw"),
        ("--resume_from_checkpoint", "resume_from_checkpoint", "auto"),
        ("--resume_from_checkpoint False", "resume_from_checkpoint", "none"),
        ("--chat_template none", "chat_template", None),
    ],
)
def test_names_of_other_trainers(line, name, value):
    assert getattr(sft(line), name) == value


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("--bf16 maybe", "bf16: 'maybe' has no meaning here; give true or false, or use precision: auto, bf16, fp16 or "
         "fp32."),
        ("--eval_strategy epoch", "eval_strategy: 'epoch' has no meaning here; eval_files or eval_share turns evaluation "
         "on; eval_steps sets how often it runs."),
        ("--fsdp full_shard", "fsdp: 'full_shard' has no meaning here; start with `accelerate launch "
         "--config_file accelerate_configs/fsdp2.yaml`."),
        ("--bf16 --fp16", "fp16: true (or no value) contradicts another value of precision; give precision once."),
        ("--torch_dtype int8", "torch_dtype (here precision): 'int8' is not allowed; give auto, bf16, fp16 or fp32."),
    ],
)  # fmt: skip
def test_names_of_other_trainers_without_an_option_here(line, problem):
    assert problems(Sft, line) == [problem]


def test_a_flag_overrules_the_recipe_under_any_name(tmp_path):
    config = recipe(tmp_path, "precision: fp32\nevaluation_strategy: no\nbf16: false\n")
    assert sft(f"{config} --bf16").precision == "bf16"


def test_a_script_takes_only_its_own_options():
    options = parse_options(MergeOptions, ["--adapter", "a", "--output_dir", "b", "--dtype", "float32"])
    assert (options.adapter, options.dtype, options.verify) == (["a"], "float32", "modules")
    assert problems(MergeOptions, "--verify maybe --bf16") == [
        "bf16: no such option; --help lists all options.",
        "adapter: it is required; give one or several texts.",
        "output_dir: it is required; give text.",
        "verify: 'maybe' is not allowed; give modules, logits, served or none.",
    ]
    assert parse_options(ChatOptions, ["--model", "m", "--prompt=--hello there"]).prompt == "--hello there"


REQUIRED = {
    MergeOptions: ["adapter", "output_dir"],
    ExtractOptions: ["model", "base", "output_dir"],
    ExportOptions: ["model", "output_dir"],
    ChatOptions: ["model"],
}


@pytest.mark.parametrize(("script", "name"), [(script, name) for script, names in REQUIRED.items() for name in names])
@pytest.mark.parametrize(
    "value",
    [None, "true", "''", "{a: b}", "[a, b]", "[[a]]", "null", "[]", '"a\\0b"', "2020-01-01", "[{a: b}]"],
)
def test_a_wrong_value_of_a_required_option_is_one_sentence(tmp_path, script, name, value):
    """pydantic's own error named the class and a web page, under a traceback."""
    others = [word for other in REQUIRED[script] if other != name for word in (f"--{other}", "x")]
    config = recipe(tmp_path, "" if value is None else f"{name}: {value}\n").split()
    if name == "adapter" and value == "[a, b]":
        return  # several adapters are combined
    with pytest.raises(ConfigError) as caught:
        parse_options(script, [*others, *config])
    (sentence,) = caught.value.problems
    assert sentence.startswith(f"{name}: ") and sentence.endswith(".")
    assert "pydantic" not in sentence and "\n" not in sentence


def test_wrong_values_of_required_options_are_reported_with_all_others():
    assert problems(MergeOptions, "--adapter --output_dir a b --scale x --vrify none") == [
        "vrify: no such option; did you mean verify?",
        "adapter: true (or no value) is not allowed; give one or several texts.",
        "output_dir: ['a', 'b'] is not allowed; give text.",
        "scale: 'x' is not allowed; give a number.",
    ]
    assert problems(ChatOptions, "--model= --temperature -1") == [
        "model: '' is not allowed; give text.",
        "temperature: '-1' is not allowed; give a number of at least 0, or none.",
    ]


def test_no_rule_speaks_of_the_default_of_a_wrong_option():
    assert problems(Pretrain, "--config_name= ") == ["config_name: '' is not allowed; give text, or none."]
    assert problems(Sft, "--init_lora_weights orthogonal --lora_r 0") == [
        "lora_r: '0' is not allowed; give a whole number of at least 1."
    ]


ODD_NAMES = ["out", "my run", "it's", 'a"b', "$HOME", "`x`", "-dash", "--model", "日本 [x]#1", "a\nb", "~", "a\\b", "*"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_printed_command_means_the_same_in_a_shell(name, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "the scripts" / "sft.py")])
    words = shlex.split(shell_command("chat.py", model=name))
    assert words[:2] == [
        "python",
        "launch/chat.py",
    ]  # there is no chat.py beside the script: this is a program of another
    model = parse_options(ChatOptions, words[2:]).model
    assert Path(model) == Path(name).absolute().relative_to(Path.cwd()) and not model.startswith("-")
    # A shell gives the same words.
    command = shell_command("chat.py", model=name).replace("python", "printf '%s\\0'", 1)
    printed = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
    assert printed.split("\0")[:-1] == words[1:]


def test_a_printed_command_finds_its_script_from_where_the_user_stands(monkeypatch, tmp_path):
    (tmp_path / "the scripts").mkdir()
    (tmp_path / "the scripts" / "merge.py").touch()
    monkeypatch.chdir(tmp_path)
    for place in ("the scripts", str(tmp_path / "the scripts")):
        monkeypatch.setattr(sys, "argv", [f"{place}/sft.py"])
        words = shlex.split(shell_command("merge.py", adapter="a b", output_dir=Path("c")))
        assert words == ["python", f"{place}/merge.py", "--adapter", "a b", "--output_dir", "c"]


def test_show_data_has_a_json_flag():
    assert parse_options(Show, ["--json"]).json_lines
    assert not parse_options(Show, []).json_lines
    assert resolved_options(parse_options(Show, ["--json"]))["json"] is True
    assert problems(Show, "--jsn") == ["jsn: no such option; did you mean json?"]


def test_help_shows_groups_descriptions_and_the_scripts_defaults(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(Sft, ["--help"], {"max_length": 77})
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Model: --model_name_or_path" in text
    assert "a whole number of at least 2 (default: 77)" in text
    assert text.index("Model:") < text.index("Data:") < text.index("Method:") < text.index("Run:")
    assert all(f"--{name} " in text for name in Sft.model_fields)


def test_the_resolved_config_is_json_that_parses_to_itself(tmp_path):
    options = sft("--method full --train_files a b --bf16 --optim lion")
    values = json.loads(json.dumps(resolved_options(options)))
    assert values["learning_rate"] == 2e-5 and values["precision"] == "bf16"
    assert Sft.model_validate(values) == options


def test_options_cannot_be_changed_after_parsing():
    with pytest.raises(ValidationError):
        sft().seed = 3
