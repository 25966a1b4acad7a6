"""A run whose every path is odd: in the home folder, with spaces, signs of shells and globs, from other folders."""

import json
import shutil
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

from accel_llm.chat.template_source import CHATML
from accel_llm.errors import ConfigError

NAME = "it's a $HOME [x] #1 日本"


@pytest.mark.long
def test_every_script_finds_every_path_from_any_folder(script, tiny, chats, tmp_path, monkeypatch, capsys):
    """With `--output_dir=~/x` the log, the checkpoints and run.json were written to ./~/x, and no resume found them."""
    home, here, elsewhere = tmp_path / "home", tmp_path / "here", tmp_path / "else where"
    for folder in (home, here, elsewhere):
        folder.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(tiny, home / NAME / "v1")
    (home / NAME / "model").symlink_to("v1")
    shutil.copy(chats, home / NAME / "chats [1].jsonl")
    (home / NAME / "template.jinja").write_text(CHATML, encoding="utf-8")

    # Train.
    monkeypatch.chdir(here)
    words = [f"--model_name_or_path=~/{NAME}/model", f"--train_files=~/{NAME}/chats [1].jsonl"]
    words += [f"--output_dir=~/{NAME}/run/", f"--chat_template=~/{NAME}/template.jinja", "--max_length", "128"]
    script("sft", *words, "--max_steps", 1)
    run = home / NAME / "run"
    assert list(here.iterdir()) == []
    assert {"run.json", "metrics.jsonl", "checkpoints", "adapter", "report.html"} <= {
        path.name for path in run.iterdir()
    }
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "done" and facts["working_dir"] == str(here)
    assert facts["options"]["model_name_or_path"] == str(home / NAME / "model")
    assert "it'\"'\"'s a $HOME [x] #1 日本/run'" in capsys.readouterr().out  # the next commands, quoted for a shell

    # The same command finds the run again, a longer one continues it, and a new one its adapter, from another folder.
    monkeypatch.chdir(elsewhere)
    with pytest.raises(ConfigError, match="holds a finished run"):
        script("sft", *words, "--max_steps", 1)
    script("sft", *words, "--max_steps", 2, f"--resume_from_checkpoint=~/{NAME}/run/checkpoints/step-00000001",
           f"--output_dir=~/{NAME}/longer", "--allow_changed", "max_steps")  # fmt: skip
    assert json.loads((home / NAME / "longer" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
    script("sft", *words, "--max_steps", 1, f"--adapter_name_or_path=~/{NAME}/run", "--output_dir", "-dash")
    assert (elsewhere / "-dash" / "adapter" / "adapter_model.safetensors").is_file()

    # Every tool, and plain PEFT.
    script("chat", f"--model=~/{NAME}/run", "--prompt", "Hi", "--max_new_tokens", 1)
    script(
        "merge",
        f"--adapter=~/{NAME}/run",
        "--output_dir",
        "-dash",
        "--overwrite_output_dir",
        "--output_dir",
        "mer[g]ed",
    )
    script("extract", f"--base=~/{NAME}/model", "--model=mer[g]ed", f"--output_dir=~/{NAME}/extracted", "--lora_r", 4)
    script("show_data", f"--tokenizer_name=~/{NAME}/model", *words[1:2], *words[3:])
    for adapter in (run / "adapter", home / NAME / "extracted"):
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        assert Path(base) == home / NAME / "v1"
        AutoPeftModelForCausalLM.from_pretrained(str(adapter))
    assert sorted(path.name for path in elsewhere.iterdir()) == ["-dash", "mer[g]ed"]
