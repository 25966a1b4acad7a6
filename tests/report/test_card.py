"""The README.md of an export: valid for the hub, with what is known of the run, without anything private."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.report.card import base_license, card_header, write_run_card

RUN: dict[str, Any] = {
    "options": {
        "model_name_or_path": "/home/ada/models/base",
        "config_name": None,
        "train_files": ["/home/ada/data/chats.jsonl", {"path": "https://bob:pass@example.org/x/more.jsonl?token=abc"}],
        "method": "lora",
        "load_in_8bit": False,
        "lora_r": 8,
        "init_lora_weights": "pissa",
        "metric_for_best_model": "eval/loss",
    },
    "ledger": {"bins": {"/home/ada/data/chats.jsonl": {"trained": {"rows": 1200, "supervised": 34000, "context": 9}}}},
    "accelerate": {"precision": "bf16", "num_processes": 2, "strategy": "zero2"},
    "exported_step": 2,
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 16,
    "lora_alpha": 32.0,
    "target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"],
    "use_dora": True,
}
METRICS = [
    {"step": 1, "loss": 5.25, "epoch": 0.1},
    {"step": 2, "eval/loss": 4.5, "eval/loss/ada.txt": 4.25, "eval/perplexity/bob.txt": 70.0},
    {"step": 4, "loss": 4.125, "epoch": 0.4},
    {"step": 4, "eval/loss": None},
]


def write(folder: Path, run: dict[str, Any], adapter: dict[str, Any] | None = None) -> str:
    export = folder / "run" / ("adapter" if adapter else "model")
    export.mkdir(parents=True, exist_ok=True)
    (export.parent / "run.json").write_text(json.dumps(run), encoding="utf-8")
    (export.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, METRICS)), encoding="utf-8")
    if adapter:
        (export / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    write_run_card(export)
    return (export / "README.md").read_text(encoding="utf-8")


def test_a_card_says_what_is_known_of_the_run_and_nothing_private(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "more.jsonl?token")
    text = write(tmp_path, RUN, ADAPTER)
    assert "| base | `base` |" in text
    assert (
        "| method | DoRA; rank 16; alpha 32; on q_proj, up_proj; trained with rank 8 from pissa, and stored as a plain LoRA "
        "of twice the rank on the unchanged base |"
    ) in text
    assert "| data | `chats.jsonl` (1,200 rows, 34,000 trained tokens), `more.jsonl` |" in text
    assert "| steps | 4, epoch 0.40 |" in text and "| evaluation loss | 4.5000 at step 2 |" in text
    assert "| training loss | 5.2500 at step 1, 4.1250 at step 4 |" in text
    assert "| weights | of step 2, the best by eval/loss |" in text
    assert "| trained in | bf16, by 2 processes (zero2) |" in text
    assert not re.search(r"ada|bob|pass|abc|token=|More Information Needed|license", text.replace("adapter", ""))


@pytest.mark.parametrize("base", ["owner/model", "/home/ada/models/base", None])
def test_the_header_is_one_that_the_hub_accepts(tmp_path, base):
    """The hub refuses a base_model that is a path; huggingface_hub parses the header as the hub does."""
    for adapter in (ADAPTER, None):
        sources = ["owner/rows", "/home/ada/data/chats.jsonl"]
        card = ModelCard(
            write(
                tmp_path,
                RUN | {"options": RUN["options"] | {"model_name_or_path": base, "train_files": sources}},
                adapter,
            )
        )
        assert card.data.library_name == ("peft" if adapter else "transformers")
        assert card.data.base_model == ("owner/model" if base == "owner/model" else None)
        assert card.data.datasets == ["owner/rows"] and card.data.license is None
        assert card.data.pipeline_tag == "text-generation"
        assert card.data.get("base_model_relation") == (
            None if base != "owner/model" else "adapter" if adapter else "finetune"
        )
    assert ("none: trained from random weights" in card.text) == (base is None)


@pytest.mark.parametrize(
    ("options", "adapter", "said"),
    [
        ({"method": "freeze", "method_options": {"layers": 2}}, None, "a part of the weights; layers 2"),
        ({"method": "bitfit"}, None, "all biases (BitFit)"),
        (
            {"method": "loha", "method_options": {"r": 32}, "load_in_4bit": True},
            {"peft_type": "LOHA", "target_modules": ["q_proj"]},
            "LOHA on a 4-bit base; r 32; on q_proj",
        ),
        (
            {"method": "prompt", "method_options": {"num_virtual_tokens": 20}},
            {"peft_type": "PROMPT_TUNING"},
            "PROMPT_TUNING; num_virtual_tokens 20",
        ),
    ],
)
def test_a_card_names_the_method_that_was_used(tmp_path, options, adapter, said):
    run = RUN | {"options": RUN["options"] | {"load_in_8bit": False, "method_options": {}} | options}
    text = write(tmp_path, run, adapter)
    assert f"| method | {said} |" in text
    assert ("- lora" in text) == (adapter is not None and adapter["peft_type"] == "LORA")


LICENSES = {
    "---\nlicense: apache-2.0\ntags: [x]\n---\n# A model": {"license": "apache-2.0"},
    "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n": {
        "license": "other",
        "license_name": "own",
        "license_link": "LICENSE",
    },
    "---\nlicense: [a, b]\n---\n": {},
    "---\n- a list\n---\n": {},
    "---\na: : b\n---\n": {},
    "no header": {},
}


@pytest.mark.parametrize(("card", "said"), LICENSES.items())
def test_the_licence_is_that_of_the_base(tmp_path, monkeypatch, card, said):
    """Read from the folder of the base, or from the cache of the hub, without asking it."""
    base, cache = tmp_path / "base", tmp_path / "cache" / "models--owner--model"
    for folder in (base, cache / "refs", cache / "snapshots" / "abc"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (base / "README.md").write_text(card, encoding="utf-8")
    (cache / "snapshots" / "abc" / "README.md").write_text(card, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert base_license(str(base)) == base_license("owner/model") == said
    assert base_license("owner/another") == base_license(None) == base_license(str(tmp_path)) == {}
    text = write(tmp_path, RUN | {"options": RUN["options"] | {"model_name_or_path": "owner/model"}}, ADAPTER)
    assert ModelCard(text).data.license == said.get("license")
    assert ModelCard(text).data.license_name == said.get("license_name")


def test_the_settings_are_a_recipe(tmp_path):
    options = {"learning_rate": 1e-4, "train_on": "assistant", "lora_target_modules": ["q_proj"], "seed": 7}
    private = {"chat_template_kwargs": {"key": "hunter2"}, "output_dir": "/home/ada/hunter2", "run_name": "hunter2"}
    text = write(tmp_path, RUN | {"options": RUN["options"] | options | private}, ADAPTER)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    read = parse_options(SftOptions, ["--config", str(tmp_path / "recipe.yaml")])
    assert (read.learning_rate, read.lora_target_modules, read.seed, read.lora_r) == (1e-4, ["q_proj"], 7, 8)
    assert "hunter2" not in text


def test_names_that_mean_something_in_yaml_stay_names():
    header = "\n".join(card_header("peft", "owner/no", "adapter", ["yes", "a: b"]))
    assert ModelCard(header).data.to_dict()["tags"] == ["yes", "a: b"]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_writes_the_card_and_its_example_loads_the_export(script, tiny, chats, tmp_path, monkeypatch, method):
    words = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", 2)
    script("sft", *words, "--method", method, "--logging_steps", 1, "--output_dir", tmp_path / "run")
    folder = tmp_path / "run" / ("model" if method == "full" else "adapter")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "`chats.jsonl` (24 rows, 134 trained tokens)" in text and str(tmp_path) not in text
    assert "More Information Needed" not in text and "| steps | 2, epoch" in text
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], names)  # type: ignore[index]
    assert type(names["model"]).__name__ == ("LlamaForCausalLM" if method == "full" else "PeftModelForCausalLM")
    assert len(names["tokenizer"]) > 100
