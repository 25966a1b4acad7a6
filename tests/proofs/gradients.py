"""Compare gradients of one optimizer step over two processes with a float64 reference, for every way to cut the step.

    accelerate launch --config_file accelerate_configs/ddp.yaml --num_processes 2 tests/proofs/gradients.py worst.json

It writes the largest relative error of a parameter's gradient for each case: {32x1, 8x4, 1x32} micro-batches x rows
over all processes, packed or padded, activations stored or recomputed; and for a control that keeps the averaging.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from accel_llm.backend.accelerator import build_accelerator
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.training.loop import total_targets, undo_averaging

ROWS = 32


def rows(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rows of uneven lengths and uneven shares of labels, so that the processes count very different targets."""
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(number):
        ids = rng.integers(0, 64, rng.integers(4, 40)).astype(np.int32)
        labels = np.where(rng.random(len(ids)) < (k % 8 + 1) / 9, ids, -100).astype(np.int32)
        pairs.append((ids, labels))
    return pairs


def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return Qwen2ForCausalLM(config)


def reference(net: Qwen2ForCausalLM, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Return the gradients in float64, row by row through the model's own logits: sum of losses over all targets."""
    net.double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in pairs:
        targets = torch.tensor(labels[1:]).long()
        logits = net(input_ids=torch.tensor(ids).long()[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    (total / count).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def main() -> None:
    accelerator = build_accelerator(TrainOptions(precision="fp32"))
    pairs = rows(ROWS)
    expected, worst = reference(model(), pairs), {}
    world, rank = accelerator.num_processes, accelerator.process_index
    cases = [
        (size, packed, recompute, True)
        for size in (1, 4, 32)
        for packed in (True, False)
        for recompute in (False, True)
    ]
    for size, packed, recompute, undo in [*cases, (1, True, False, False)]:
        net = model()
        attach_loss(net, 4096)
        if packed:
            enable_packing(net)
        if recompute:
            net.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        prepared = accelerator.prepare(net.train())
        mine = pairs[rank::world]
        each = max(1, size // world)
        cut = [mine[i : i + each] for i in range(0, len(mine), each)]
        micro_batches = [collate_packed(part) if packed else collate_padded(part, 0) for part in cut]
        accelerator.gradient_accumulation_steps, accelerator.step = len(micro_batches), 0
        targets = total_targets(accelerator, micro_batches)
        scale = undo_averaging(accelerator) if undo else 1
        for batch in micro_batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(next_token_loss(prepared, batch) * scale / targets)
        errors = [
            float((p.grad - expected[n]).norm() / expected[n].norm())
            for n, p in net.named_parameters()
            if p.grad is not None
        ]
        assert len(errors) == len(expected)
        name = f"{ROWS // size}x{size} {'packed' if packed else 'padded'}"
        name += ", recomputed" if recompute else ""
        worst[name + ("" if undo else ", averaging left in")] = max(errors)
        accelerator.free_memory()
    if accelerator.is_main_process:
        Path(sys.argv[1]).write_text(json.dumps(worst, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
