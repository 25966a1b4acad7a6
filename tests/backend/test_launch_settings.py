"""The settings of a launch are checked against the recipe: number of processes, launch YAML, DeepSpeed's settings."""

import json

from accel_llm.backend.zero import build_deepspeed_plugin, deepspeed_settings
from accel_llm.config.options import TrainOptions


def test_more_cpu_processes_than_allowed(sft_errors, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert sft_errors()[0].startswith("num_processes: 9 processes without a GPU, but at most 8 are allowed; ")


def test_a_launch_yaml_that_contradicts_the_recipe(sft_errors, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert sft_errors("--precision", "fp32") == [
        "mixed_precision: the launch YAML says bf16, but the recipe's precision is fp32; remove it there, or set "
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
    settings |= {"train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True}, "optimizer": {"type": "Adam"}}
    (tmp_path / "zero.json").write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "zero.json"))
    sentences = {sentence.split(":")[0]: sentence for sentence in sft_errors()}
    fields = {"gradient_accumulation_steps", "gradient_clipping", "train_micro_batch_size_per_gpu", "optimizer", "bf16"}
    assert sentences.keys() == fields
    assert sentences["gradient_clipping"].endswith(
        'says 0.5; set it to "auto" there and use max_grad_norm in the recipe.'
    )


def test_launcher_values_fill_gaps_of_an_inline_deepspeed_config(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file,zero_stage,gradient_accumulation_steps")
    assert deepspeed_settings()["gradient_accumulation_steps"] == "auto"
    assert build_deepspeed_plugin(TrainOptions(), 2, cpu=True).gradient_accumulation_steps == 2
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert deepspeed_settings()["gradient_accumulation_steps"] == 4
