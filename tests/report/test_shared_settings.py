"""Which settings of a run others see, on the model card and in trackers: a new option is in one of two lists."""

import json

import pytest

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.report.shared_settings import SHARED_OPTIONS, as_plain_values, shared_settings
from accel_llm.report.trackers import tracker_settings

# Options that can hold a path, a name in somebody's data, a prompt or any other text, and those that do not shape a run.
KEPT_HERE = """
model_name_or_path tokenizer_name revision trust_remote_code allow_pickle adapter_name_or_path config_name config_overrides text_column sample_text
reference_model_name_or_path train_files eval_files columns chat_template chat_template_kwargs
preprocessing_num_workers cache_dir method_options output_dir overwrite_output_dir resume_from_checkpoint
save_total_limit save_async allow_changed report_to run_name project dry_run preflight verbose check_only push_to_hub hub_model_id
hub_private_repo
"""
SCRIPTS = [SftOptions, DpoOptions, KtoOptions, RewardOptions, ClassifyOptions, PretrainOptions]


def test_each_option_is_shared_or_kept_on_purpose():
    options = {name for script in SCRIPTS for name in script.model_fields}
    assert options == {*SHARED_OPTIONS, *KEPT_HERE.split()}
    assert not {*SHARED_OPTIONS} & {*KEPT_HERE.split()}


@pytest.mark.parametrize(
    "base, said", [("owner/model", "owner/model"), ("/home/lovelace/models/base", "base"), (None, None)]
)
def test_nothing_private_is_shared(base, said):
    secret = "hunter2-of-a-setting"
    private = {
        "model_name_or_path": base,
        "output_dir": f"/home/lovelace/{secret}",
        "train_files": [f"/home/lovelace/{secret}.jsonl", f"https://lovelace:{secret}@host/x.jsonl"],
        "chat_template_kwargs": {"key": secret},
        "columns": {"instruction": secret},
        "method": "prompt",
        "method_options": {"num_virtual_tokens": 8, "prompt_tuning_init_text": secret},
        "run_name": secret,
    }
    options = resolved_options(SftOptions(**private, learning_rate=1e-4, eval_steps=7))
    settings = tracker_settings(options, 2)
    text = json.dumps(settings)
    assert secret not in text and "lovelace" not in text and "/home" not in text
    assert settings.get("model_name_or_path") == said
    assert settings["learning_rate"] == 1e-4 and settings["eval_steps"] == 7 and settings["num_processes"] == 2
    assert settings["method_options"] == "num_virtual_tokens=8" and "max_steps" not in settings


def test_trackers_get_plain_values(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2-of-a-setting")
    values = as_plain_values({"a": [1, "x"], "b": {"k": 0.5}, "c": "a hunter2-of-a-setting", "d": True})
    assert values == {"a": "1, x", "b": "k=0.5", "c": "a ***", "d": True}


def test_settings_that_are_not_given_are_left_out():
    shared = shared_settings(resolved_options(SftOptions()))
    assert None not in shared.values() and [] not in shared.values()
    assert shared["lora_target_modules"] == "all-linear" and shared["precision"] == "auto"
