"""Train a shape of shapes.py with TRL, on the micro-batches of launch/sft.py and from the same random weights.

    python tests/gpu/beside.py qwen3_0.6b --folder /tmp/shape --method lora

`check.py` runs it in part f, and shapes.py with the same settings: packed rows and padded ones. It reads the line that
begins with MEASURED. The rows are encoded and packed by this project, so that both programs take the same steps.
"""

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import torch
from bitsandbytes.nn.modules import Params4bit
from datasets import Dataset
from peft import LoraConfig
from shapes import (
    CUDA,
    SHAPES,
    TIMED,
    WARM,
    config_of,
    memory_facts,
    now,
    random_weight,
    token_count,
    words_of,
    write_inputs,
)
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from trl import SFTConfig, SFTTrainer
from turns import wait_for_turn

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.data.batches import Batch
from accel_llm.data.stream import Position
from accel_llm.training import setup

STEPS = WARM + TIMED


def our_batches(folder: Path, words: list[str]) -> list[Batch]:
    """Return the micro-batches with which sft.py begins under these options."""
    options = parse_options(SftOptions, words_of(folder, words))
    chat = setup.chat_tokenizer(options)
    data = setup.encode_chats(options, setup.read_config(options), chat)
    batches = setup.open_stream(options, data.train, Position(), chat.tokenizer).batches()
    return [next(batches) for _ in range(STEPS)]


def rows_of(batch: Batch) -> list[dict[str, list[int]]]:
    """Return the rows that TRL needs for the same batch: a packed one with its lengths, or one for each document."""
    if "cu_seqlens" in batch:
        row = {name: batch[name][0].tolist() for name in ("input_ids", "labels")}
        return [row | {"seq_lengths": batch["cu_seqlens"].diff().tolist()}]
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{name: batch[name][k, :n].tolist() for name in ("input_ids", "labels")} for k, n in enumerate(lengths)]


def drawn_model(folder: Path, method: str) -> Any:
    """Return the model whose weights shapes.py draws, on the device: in bf16, or its linear layers in 4 bits."""
    device = torch.device("cuda" if CUDA else "cpu")
    config = AutoConfig.from_pretrained(folder / "model")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    if method == "qlora":
        four_bits: Any = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **four_bits)
        replace_with_bnb_linear(model, ["lm_head"], settings)
        model.is_loaded_in_4bit = True
        model.config.quantization_config = settings
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config).to(device)
    for name, old in list(model.named_parameters()):
        owner, weight = model.get_submodule(name.rpartition(".")[0]), random_weight(name, old.shape, device)
        if isinstance(old, Params4bit):
            packed: Any = Params4bit(weight, requires_grad=False, **vars(old))  # type: ignore[arg-type]
            owner._parameters[name.rpartition(".")[2]] = packed.to(device)
        else:
            owner._parameters[name.rpartition(".")[2]] = nn.Parameter(weight)
    model.tie_weights()
    return model


class Clock(TrainerCallback):
    """Times the same steps as shapes.py."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == WARM:
            wait_for_turn()
            self.times.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STEPS:
            self.times.append(now())


def train(folder: Path, method: str, batches: list[Batch]) -> dict[str, Any]:
    """Train with TRL on these batches, and return what was measured."""
    rows = [rows_of(batch) for batch in batches]
    model, packed = drawn_model(folder, method), "cu_seqlens" in batches[0]
    if CUDA:  # what drawing the weights took does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=None,
        padding_free=packed,
        per_device_train_batch_size=len(rows[0]),
        max_steps=STEPS,
        learning_rate=1e-4,
        logging_steps=1,
        bf16=True,
        use_cpu=not CUDA,
        gradient_checkpointing=method == "qlora",
        optim="adamw_torch_fused",
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to="none",
    )
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_list([row for batch in rows for row in batch]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        peft_config=LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"),
        callbacks=[clock],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    seconds, tokens = clock.times[1] - clock.times[0], sum(map(token_count, batches[WARM:]))
    return {"tokens_a_second": tokens / seconds, "ms_a_step": 1000 * seconds / TIMED, "losses": losses} | memory_facts()


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=["packed", "unpacked"])
    args, words = parser.parse_known_args()  # all other words are options of sft.py
    write_inputs(config_of(args.shape), args.folder)
    for how in args.rows:
        unpacked = ["--packing", "false", "--per_device_train_batch_size", "16"] if how == "unpacked" else []
        batches = our_batches(args.folder, [*words, *unpacked])
        method = words[words.index("--method") + 1]
        facts = {"rows": how, **train(args.folder, method, batches)}
        print("MEASURED " + json.dumps(facts), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
