"""Runs on real rows of preferences with tiny models that were trained before: margins rise. And recipes that dry-run."""

import json
from pathlib import Path

import pytest
from support import ROOT, metrics, moved_adapter, run_json

from accel_llm.demo.files import DEMO_BASE
from accel_llm.demo.preferences import demo_pairs

DATA = ROOT.parent / "shared" / "data"
STORIES = ["--model_name_or_path", DATA / "weights" / "stories260K_hf", "--max_length", 512]
STORIES += ["--chat_template", DATA / "chat_templates" / "chujiezheng" / "alpaca.jinja"]
BYTES = ["--model_name_or_path", DEMO_BASE, "--max_length", 1024]  # a token for each byte, as no story has Chinese
RECIPES = ["qwen3_8gb_dpo", "qwen3_24gb_dpo", "llama3_24gb_dpo", "llama3_8gb_kto"]

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft 0.21.2
]


@pytest.mark.skipif(not DATA.is_dir(), reason="shared/data is not there")
@pytest.mark.parametrize(
    ("name", "file", "model", "rate", "least"),
    [
        ("dpo", "dpo_en_demo.json", STORIES, 2e-5, 18),
        ("dpo", "dpo_zh_demo.json", BYTES, 1e-5, 40),
        ("kto", "kto_en_demo.json", STORIES, 1e-4, 60),
    ],
)
def test_margins_rise_on_real_preferences(name, file, model, rate, least, script, tmp_path):
    rows, out = DATA / "preference" / file, tmp_path / "out"
    where = ["--train_files", rows, "--eval_files", rows, "--cache_dir", tmp_path / "cache", "--output_dir", out]
    script(name, *model, *where, "--max_lost", 1, "--learning_rate", rate, "--max_steps", 12, "--eval_on_start")
    evaluations = [line for line in metrics(out) if "eval/rewards/margins" in line]
    before, after = evaluations[0], evaluations[-1]
    # A tiny model has no opinion about these answers, and the reference is the policy itself.
    assert before["eval/rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert after["eval/rewards/margins"] > 0.02 and after["eval/loss"] < before["eval/loss"] - 0.003
    trained = sum(bins["trained"]["rows"] for bins in run_json(out)["ledger"]["bins"].values())
    assert trained >= least


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_for_preferences_runs_dry_on_a_tiny_model(recipe, script, tiny, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in demo_pairs("eval")), encoding="utf-8")
    words = ["--config", ROOT / "launch" / "recipes" / f"{recipe}.yaml", "--model_name_or_path", tiny]
    if "adapter_name_or_path" in Path(words[1]).read_text(encoding="utf-8"):
        moved_adapter(tiny, tmp_path / "adapter", lora_r=4, method="lora")
        words += ["--adapter_name_or_path", tmp_path / "adapter"]
    where = ["--train_files", pairs, "--cache_dir", tmp_path / "cache", "--output_dir", tmp_path / "out", "--dry_run"]
    where += ["--max_length", 256]  # the positions of the tiny model
    script(recipe.split("_")[-1], *words, *where)
    printed = capsys.readouterr().out
    assert "learning rate  5e-06, as given" in printed and not (tmp_path / "out").exists()
