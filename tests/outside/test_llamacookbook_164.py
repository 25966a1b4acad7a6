"""llama-cookbook 164: four days of training, the evaluation loss is inf at every epoch, and no model was ever saved.

A model was saved only when the loss got better, and inf never is. Right: with no best evaluation the last weights are
exported, and only a finite loss can be the best.
"""

import math

import pytest

from accel_llm.errors import ConfigError
from accel_llm.training.best import Best


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_run_without_a_finite_evaluation_still_exports(script, tiny, chats, tmp_path, monkeypatch, value) -> None:
    assert Best().after(3, value, "eval/loss") == Best(later=1)
    monkeypatch.setattr("accel_llm.training.evaluation.mean_loss", lambda *_: {"eval/loss": value})
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--eval_files", chats, "--max_length", 128)
    words += ("--max_steps", 2, "--eval_steps", 1, "--metric_for_best_model", "eval/loss", "--output_dir", tmp_path)
    with pytest.raises(ConfigError, match="The run is done and its weights are complete, but"):
        script("sft", *words)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    record = (tmp_path / "run.json").read_text()
    assert '"exported_step": 2' in record and "no evaluation had a finite eval/loss" in record
