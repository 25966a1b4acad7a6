"""Train a shape of shapes.py with TRL, on the same rows and from the same random weights.

    python tests/gpu/beside.py qwen3_0.6b --folder /tmp/shape --packing

`check.py` runs it in part f, and shapes.py with the same settings. It reads the line that begins with MEASURED.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from datasets import Dataset
from peft import LoraConfig
from shapes import CUDA, TIMED, WARM, config_of, memory_facts, now, random_weight, write_inputs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

ROWS_AT_ONCE = 16  # of an unpacked batch
STEPS = WARM + TIMED + 1


def drawn_model(folder: Path) -> Any:
    """Return the model whose weights shapes.py draws, in bf16 on the device."""
    device = torch.device("cuda" if CUDA else "cpu")
    config = type(config_of("tiny")).from_pretrained(folder / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    for name, old in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        owner._parameters[name.rpartition(".")[2]] = nn.Parameter(random_weight(name, old.shape, device))
    model.tie_weights()
    return model


class Clock(TrainerCallback):
    """Times the same steps as shapes.py."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step in (WARM, WARM + TIMED):
            self.times.append(now())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--packing", action="store_true")
    args = parser.parse_args()
    write_inputs(config_of(args.shape), args.folder)
    lines = (args.folder / "chats.jsonl").read_text(encoding="utf-8").splitlines()
    settings = SFTConfig(
        output_dir=str(args.folder / "trl"),
        max_length=2048,
        packing=args.packing,
        per_device_train_batch_size=1 if args.packing else ROWS_AT_ONCE,
        max_steps=STEPS,
        learning_rate=2e-4,
        logging_steps=1,
        bf16=True,
        use_cpu=not CUDA,
        gradient_checkpointing=False,
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=drawn_model(args.folder),
        args=settings,
        train_dataset=Dataset.from_list([json.loads(line) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(args.folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    tokens = logs[WARM + TIMED - 1]["num_tokens"] - logs[WARM - 1]["num_tokens"]
    seconds = clock.times[1] - clock.times[0]
    facts = {"tokens_a_second": tokens / seconds, "ms_a_step": 1000 * seconds / TIMED}
    print("MEASURED " + json.dumps(facts | {"losses": [line["loss"] for line in logs]} | memory_facts()), flush=True)


if __name__ == "__main__":
    main()
