"""Part b beside the matrix: options and programs that take another way on a GPU, each as a person types it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from launches import LORA, METHODS, facts_of_record, facts_of_table, inputs
from runner import HERE, Cell, Part, launch, python

MIXTURE = "mixture"  # a tiny model whose experts are weights of three dimensions


class Feature(NamedTuple):
    """One run: its launch YAML, options of the launcher and of the script, and what must stand in its facts.

    `{work}` in an option is the folder of check.py. A run without `--check_only` writes its adapter and reads it back.
    """

    yaml: str
    launcher: str
    options: str
    expected: dict[str, Any]
    script: str = "sft"


QLORA = METHODS["qlora"]
ASKED = "qlora, evaluated, exported"
TRAIN = "--max_steps 3 --eval_share 0.02 --eval_generate 4"
# The most telling come first.
FEATURES = {
    ASKED: Feature("single_gpu", "", f"{QLORA} {TRAIN} --gradient_checkpointing", {}),
    "experts in 4 bits": Feature(
        "single_gpu", "", f"{QLORA} --check_only --model_name_or_path {{work}}/{MIXTURE}", {"dtypes frozen": "uint8"}
    ),
    # The demo's own embedding is also its output head.
    "offload_embeddings": Feature(
        "single_gpu", "", f"{QLORA} {TRAIN} --offload_embeddings --model_name_or_path {{work}}/{MIXTURE}", {}
    ),
    "fsdp_offload_params, full": Feature("fsdp2", "--fsdp_offload_params true", "--method full --check_only", {}),
    "fsdp_offload_params, qlora": Feature("fsdp2", "--fsdp_offload_params true", f"{QLORA} --check_only", {}),
    "mixture, full": Feature(
        "single_gpu", "", f"--method full --check_only --model_name_or_path {{work}}/{MIXTURE}", {}
    ),
    "inductor": Feature(
        "single_gpu", "--dynamo_backend inductor", f"{LORA} --check_only", {"compiled backend": "inductor"}
    ),
    "olora on 4 bits": Feature("single_gpu", "", f"{QLORA} {TRAIN} --init_lora_weights olora", {}),
    "pissa": Feature("single_gpu", "", f"{LORA} {TRAIN} --init_lora_weights pissa", {}),
    "stochastic rounding": Feature(
        "single_gpu", "", f"--method full {TRAIN} --master_weights stochastic_rounding", {"dtypes trained": "bfloat16"}
    ),
    "padded, dropout, NEFTune": Feature(
        "single_gpu",
        "",
        f"{LORA} --check_only --packing false --per_device_train_batch_size 4 --lora_dropout 0.1 --neftune_noise_alpha 5 "
        "--gradient_checkpointing",
        {},
    ),
    "experts in 4 bits, fsdp2": Feature(
        "fsdp2", "", f"{QLORA} --check_only --model_name_or_path {{work}}/{MIXTURE}", {"dtypes frozen": "bfloat16"}
    ),
    "inductor, fsdp2": Feature(
        "fsdp2", "--dynamo_backend inductor", f"{LORA} --check_only", {"compiled backend": "inductor"}
    ),
    "pretrain": Feature("single_gpu", "", "--config launch/recipes/demo_base.yaml --check_only", {}, "pretrain"),
}


def check_feature(part: Part, name: str, work: Path, port: int) -> list[Cell]:
    """Run one of `FEATURES`; the first one is asked and merged afterwards, in cells of its own."""
    feature = FEATURES[name]
    folder = work / f"feature-{name.replace(' ', '-').replace(',', '')}"
    checked = "--check_only" in feature.options
    words = [*feature.options.format(work=work).split(), *(["--verbose"] if checked else [])]
    if feature.script == "sft":
        words = [*inputs(work), "--precision", "bf16", *words]
        words += [] if checked else ["--output_dir", str(folder), "--logging_steps", "1"]
    group = {} if feature.yaml == "single_gpu" else {"port": port, "processes": 1}
    script = f"launch/{feature.script}.py"
    ended = part.run(name, launch(feature.yaml, script, *words, launcher=feature.launcher.split(), **group))
    facts = facts_of_table(ended.text) if checked else facts_of_record(folder)
    if ended.code or not facts:
        return [Cell(name, False, ended.cause, "runs, with the expected facts", facts)]

    expected = feature.expected | ({} if checked else {"status": "done"})
    problems = [f"{key} is {facts.get(key)}" for key, value in expected.items() if value not in str(facts.get(key))]
    figure = f"{ended.seconds:.0f} s; {'; '.join(problems) or figures(facts)}"
    cell = Cell(name, not problems, figure, "runs, with the expected facts", facts)
    return [cell, *ask(part, folder)] if name == ASKED and not problems else [cell]


def figures(facts: dict[str, Any]) -> str:
    names = ("dtypes trained", "dtypes frozen", "compiled graphs", "first_step gradients", "losses")
    return ", ".join(f"{name} {facts[name]}" for name in names if name in facts)


def ask(part: Part, folder: Path) -> list[Cell]:
    """Ask the adapter: on its base in 4 bits, as it was trained, and merged into a model."""
    question = ["--prompt", "What is 3 + 4?", "--max_new_tokens", "8"]
    merged = folder.with_name("feature-merged")
    commands = {
        "asked as it was trained": ["launch/chat.py", "--model", folder, *question],
        "asked in 4 bits": ["launch/chat.py", "--model", folder, "--load_in_4bit", *question],
        "merged": ["launch/merge.py", "--adapter", folder, "--output_dir", merged],
        "merged, asked": ["launch/chat.py", "--model", merged, *question],
    }
    cells = []
    for name, words in commands.items():
        ended = part.run(f"qlora, {name}", python(*words))
        lines = [line.strip() for line in ended.text.splitlines() if line.strip()]
        figure = " | ".join(lines[-3:])[:300] if ended.code == 0 else ended.cause
        cells.append(Cell(f"qlora, {name}", ended.code == 0 and bool(lines), figure, "an answer, its device and dtype"))
    return cells


def out_of_memory(part: Part, work: Path) -> list[Cell]:
    """A run that needs more memory than it may take ends with the sentence of out_of_memory.py, and run.json says so."""
    folder = work / "shape-memory"
    words = ["--method", "full", "--precision", "bf16", "--max_length", "2048", "--max_steps", "3", "--limit_gib", "4"]
    ended = part.run("out of memory", python(HERE / "shapes.py", "qwen3_0.6b", "--folder", folder, *words))
    sentence = next((line for line in ended.text.splitlines() if "Out of memory on " in line), "")
    record = folder / "out" / "run.json"
    status = json.loads(record.read_text(encoding="utf-8"))["status"] if record.is_file() else "no run.json"
    good = "cuda:0 has" in sentence and status in ("failed", "no run.json")
    return [Cell("out of memory", good, f"{sentence or ended.cause} ({status})", "one sentence, and run.json: failed")]


def write_mixture(folder: Path) -> None:
    """Write a mixture of experts with random weights, large enough for blocks of 64 and the grouped products of a GPU."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from accel_llm.demo.tokenizer import build_demo_tokenizer

    tokenizer = build_demo_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_experts=8,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_position_embeddings=1024,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
