"""The settings of a launch are checked against the recipe: number of processes, launch YAML, DeepSpeed's settings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from support import ROOT

from accel_llm.backend import launch_settings
from accel_llm.backend.deepspeed_keys import deepspeed_problems
from accel_llm.backend.launch_settings import launch_problems, recorded_environment
from accel_llm.backend.zero import build_deepspeed_plugin, deepspeed_settings
from accel_llm.config.options import TrainOptions


def test_more_cpu_processes_than_allowed(sft_errors, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert sft_errors()[0].startswith("num_processes: 9 processes without a GPU, but at most 8 are allowed; ")


def test_a_launch_yaml_that_contradicts_the_recipe(sft_errors, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert sft_errors("--precision", "fp32") == [
        "mixed_precision: `accelerate launch` says bf16, but precision is fp32 here; remove it from its YAML or flags, or set "
        "precision: bf16 in the recipe."
    ]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_ACTIVATION_CHECKPOINTING", "true")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    fields = [sentence.split(":")[0] for sentence in sft_errors()]
    assert fields == ["fsdp_activation_checkpointing", "fsdp_auto_wrap_policy"]


def test_a_deepspeed_configuration_that_contradicts_the_recipe(sft_errors, monkeypatch, tmp_path):
    settings = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5}
    settings |= {"train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    sentences = {sentence.split(":")[0]: sentence for sentence in sft_errors()}
    fields = {"gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu", "bf16"}
    assert sentences.keys() == fields
    assert sentences["gradient_clipping"].endswith(
        'says 0.5; set it to "auto" there and use max_grad_norm in the recipe.'
    )


def test_a_zero_stage_that_shards_nothing_is_refused(sft_errors, monkeypatch, tmp_path):
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": 0}}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    assert sft_errors() == ["zero_optimization.stage: 0 shards nothing; use ddp.yaml, or set stage 1, 2 or 3."]


def test_launcher_values_fill_gaps_of_an_inline_deepspeed_config(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,zero_stage,gradient_accumulation_steps")
    assert deepspeed_settings()["gradient_accumulation_steps"] == "auto"
    assert build_deepspeed_plugin(TrainOptions(), 2, "fp32", cpu=True).gradient_accumulation_steps == 2
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert deepspeed_settings()["gradient_accumulation_steps"] == 4


YAMLS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))


def launcher_environment(path: Path, *flags: str) -> dict[str, str]:
    """Return the environment that `accelerate launch` itself makes for its processes from a YAML and flags."""
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), *flags, "train.py"])
    )
    arguments.deepspeed_fields_from_accelerate_config = ""
    if arguments.use_deepspeed:
        return prepare_deepspeed_cmd_env(arguments)[1]
    if arguments.use_fsdp or arguments.multi_gpu:
        return prepare_multi_gpu_env(arguments)
    return prepare_simple_launcher_cmd_env(arguments)[1]


@pytest.fixture
def problems_of(monkeypatch):
    def problems(path: Path, *flags: str) -> list[str]:
        for name, value in launcher_environment(path, "--main_process_port", "0", *flags).items():
            monkeypatch.setenv(name, value)
        return launch_problems()

    return problems


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_what_the_launcher_makes_of_our_files_is_in_force_or_harmless(problems_of, path):
    assert problems_of(path) == []


def test_every_variable_of_the_launcher_and_of_accelerate_is_in_a_table():
    """Accelerate's own source says which variables there are; a new one must not be ignored without a word."""
    folder = Path(accelerate.__file__).parent
    sources = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py") if "test_utils" not in path.parts]
    names = {name for text in sources for name in re.findall(r'"((?:ACCELERATE|FSDP)_[A-Z0-9_]+)"', text)}
    # Accelerate puts some names together: a prefix, and what follows.
    dataclasses = (folder / "utils" / "dataclasses.py").read_text(encoding="utf-8")
    (plugin,) = re.findall(r"class FullyShardedDataParallelPlugin.*?\nclass ", dataclasses, re.DOTALL)
    names |= {f"FSDP_{rest}" for rest in re.findall(r'env_prefix \+ "([A-Z0-9_]+)"', plugin)}
    launched = {*launcher_environment(ROOT / "accelerate_configs" / "fsdp2.yaml", "--main_process_port", "0")} - {
        *os.environ
    }
    names |= {name for name in launched if name.startswith(launch_settings.LAUNCHER_PREFIXES)}
    known = launch_settings.IN_FORCE | launch_settings.HARMLESS | launch_settings.FIXED.keys()
    unknown = {name for name in names if name not in known and not name.startswith(launch_settings.DETAILS)}
    assert {name for name in unknown if not name.endswith("_")} == set()  # the others are prefixes
    assert len(names) > 40


@pytest.mark.parametrize(
    ("yaml_file", "flags", "sentence"),
    [
        ("fsdp2", ("--use_parallelism_config", "--parallelism_config_cp_size", "2", "--use_fsdp", "--fsdp_version", "2"),
         "parallelism_config: true is not supported here: tensor, context and sequence parallelism are not supported"),
        ("fsdp2", ("--fsdp_sharding_strategy", "HYBRID_SHARD"), "fsdp_sharding_strategy: HYBRID_SHARD is not supported"),
        ("fsdp2", ("--fsdp_activation_checkpointing", "true"), "fsdp_activation_checkpointing: true is not supported"),
        ("cpu", ("--dynamo_backend", "inductor", "--dynamo_use_fullgraph"), "dynamo_use_fullgraph: True is not supported"),
    ],
)  # fmt: skip
def test_what_cannot_be_in_force_is_refused(problems_of, yaml_file, flags, sentence):
    (problem,) = problems_of(ROOT / "accelerate_configs" / f"{yaml_file}.yaml", *flags)
    assert problem.startswith(sentence) and problem.endswith(".")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ACCELERATE_DYNAMO_BACKENDS", "inductor", "unknown, so nothing would follow from it; did you mean "
         "ACCELERATE_DYNAMO_BACKEND?"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "megatron_lm_config: true is not supported here: Megatron-LM"),
        ("ACCELERATE_TORCH_DEVICE", "cpu", "torch_device: cpu is not supported here"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8", "use gradient_accumulation_steps in the recipe."),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.3", "use max_grad_norm in the recipe."),
    ],
)  # fmt: skip
def test_variables_set_by_hand_are_checked_too(monkeypatch, name, value, sentence):
    monkeypatch.setenv(name, value)
    (problem,) = launch_problems()
    assert sentence in problem


def test_settings_that_need_a_gpu_are_refused_on_a_cpu(sft_errors, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert sft_errors("--precision", "fp16") == [
        "precision: fp16 needs a GPU, because nothing scales the loss on a CPU; use fp32 or bf16."
    ]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert sft_errors() == [
        "mixed_precision: `accelerate launch` says fp16, but precision is fp32 here; remove it from its YAML or flags."
    ]
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    (problem,) = sft_errors()
    assert problem.startswith("fsdp_offload_params: true needs a GPU")


def test_keys_that_the_launcher_drops_are_named():
    arguments = launch_command_parser().parse_args(["train.py"])
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text(encoding="utf-8"))
    assert launch_settings._dropped_keys(settings, arguments) == []
    settings["fsdp_config"] |= {"fsdp_reshard_afer_forward": False}
    settings["deepspeed_config"] = {"zero_stage": 2}
    settings["dynamo_config"] = {"backend": "INDUCTOR", "dynamo_mod": "default"}
    settings["use_cpu"] = True
    assert launch_settings._dropped_keys(settings, arguments) == [
        "fsdp_config.fsdp_reshard_afer_forward: `accelerate launch` does not know this key and ignores it; did you mean "
        "fsdp_reshard_after_forward?",
        "deepspeed_config: it has no effect with distributed_type: FSDP; remove it, or set distributed_type: DEEPSPEED.",
        "dynamo_config.dynamo_mod: `accelerate launch` does not know this key and ignores it; did you mean dynamo_mode?",
        "use_cpu: `accelerate launch` ignores it with distributed_type: FSDP; hide the GPUs with CUDA_VISIBLE_DEVICES=-1.",
    ]


def test_a_compiler_that_the_launcher_does_not_pass_on_is_named(monkeypatch):
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND", raising=False)
    arguments = launch_command_parser().parse_args(["train.py"])
    settings = yaml.safe_load((ROOT / "accelerate_configs" / "zero2.yaml").read_text(encoding="utf-8"))
    (problem,) = launch_settings._dropped_keys(settings | {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, arguments)
    assert problem.endswith("set the environment variable ACCELERATE_DYNAMO_BACKEND=inductor instead.")


@pytest.mark.parametrize("path", sorted((ROOT / "accelerate_configs").glob("*.json")), ids=lambda path: path.stem)
def test_our_deepspeed_files_have_no_key_without_effect(path):
    assert deepspeed_problems(json.loads(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("settings", "sentences"),
    [
        ({"gradient_clippping": 1.0}, ["gradient_clippping: this key of the DeepSpeed configuration is not supported, so "
          "nothing would follow from it; did you mean gradient_clipping?"]),
        ({"prescale_gradients": True}, ["prescale_gradients: the DeepSpeed configuration says True, but only False is "
          "supported: gradients are averaged after the sum, as by the other backends."]),
        ({"activation_checkpointing": {}}, ["activation_checkpointing: this block of the DeepSpeed configuration has no "
          "effect here; remove it and use gradient_checkpointing in the recipe."]),
        ({"bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}}, ["bf16.bf16_master_weights_and_grads: the "
          "DeepSpeed configuration sets it, but the recipe decides how weights are kept and stepped; remove it and use "
          "master_weights."]),
        ({"bf16": {"enabled": "auto", "check_grad_overflow": False}}, ["bf16.check_grad_overflow: the DeepSpeed "
          "configuration says False, but only True is supported: a step whose gradient is not finite must change nothing."]),
        ({"zero_optimization": {"stage": 3, "stage3_param_persistance_threshold": 0}}, ["zero_optimization."
          "stage3_param_persistance_threshold: is unknown to DeepSpeed; did you mean "
          "stage3_param_persistence_threshold?"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["zero_optimization.offload_param: only "
          "ZeRO-3 shards parameters; set stage 3, or remove it."]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["zero_optimization.offload_param."
          "device: 'nvme' is not supported; give none or cpu."]),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ["zero_optimization.zero_quantized_weights: "
          "the DeepSpeed configuration says True, but only False is supported: it rounds the weights; load_in_4bit "
          "quantizes the base of an adapter."]),
    ],
)  # fmt: skip
def test_keys_of_a_deepspeed_file_that_are_not_in_force(settings, sentences):
    assert deepspeed_problems({"zero_optimization": {"stage": 2}} | settings) == sentences


def test_fields_of_the_yaml_beside_a_deepspeed_file_are_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "zero2.json")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "cpu")
    (problem,) = deepspeed_problems({"zero_optimization": {"stage": 2}})
    assert problem.startswith("offload_optimizer_device: cpu in the launch YAML has no effect beside ")


def test_the_record_has_what_libraries_read_and_no_secret(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("HOMEWORK", "x")
    recorded = recorded_environment()
    assert recorded["NCCL_P2P_DISABLE"] == "1" and not {"HF_TOKEN", "HOMEWORK"} & recorded.keys()


SHOW = """
import sys
sys.path.insert(0, {root!r})
from accel_llm.backend.launch_settings import launch_problems, launch_yaml
print("problems:", launch_problems())
print("yaml:", launch_yaml())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the launcher's command line is read from /proc")
@pytest.mark.long
def test_a_launch_with_several_processes_that_starts_one_says_so(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(SHOW.format(root=str(ROOT)), encoding="utf-8")
    command = [
        "accelerate",
        "launch",
        "--config_file",
        "accelerate_configs/cpu.yaml",
        "--num_processes",
        "4",
        str(script),
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert "num_processes: 4 processes were asked for, but cpu.yaml starts one" in ended.stdout
    assert f"yaml: {ROOT / 'accelerate_configs' / 'cpu.yaml'}" in ended.stdout
