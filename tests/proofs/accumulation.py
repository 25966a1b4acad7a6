"""Compare the gradient of 32 uneven micro-batches in bfloat16 with float64, and count the bytes that a process holds.

    accelerate launch --config_file accelerate_configs/zero2.yaml --num_processes 2 tests/proofs/accumulation.py zero2.json

Every process has 32 micro-batches of one row. Those with the most labels come first: then the later ones are small
beside the sum, which is where a sum in bfloat16 loses most. The step is one of plain gradient descent, so the change of
the float32 weights is the gradient, for every engine.

The file gets `error`, the relative error of the whole gradient; `bytes`, those of all tensors of a process for each
trained parameter in the middle of the accumulation; and `bucket`, DeepSpeed's reduce_bucket_size in force.

On a CPU with two processes, torch 2.13 and deepspeed 0.19.8 (ZeRO-1, 2, 3; FSDP2 rounds all weights too, DDP does not):

    sums and messages in bfloat16     8.6e-3  8.6e-3  8.5e-3
    only the messages in bfloat16     5.6e-3  5.4e-3  5.2e-3
    both in float32, as it is now     5.2e-3  5.2e-3  5.0e-3     FSDP2 5.2e-3     DDP 3.3e-3
"""

import gc
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from gradients import model, reference, rows

from accel_llm.backend import accelerator as backend
from accel_llm.backend.strategy import strategy
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.placement import place_weights
from accel_llm.training.loop import total_targets, undo_averaging

MICRO_BATCHES, RATE = 32, 1e4


def bfloat16_model() -> Any:
    """Return a model whose weights lose nothing when they are rounded to bfloat16."""
    net: Any = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(parameter.bfloat16())
    return net


def float32_weights(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the complete weights that the optimizer steps. All processes must call it."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights, parameters = {}, dict[str, Any](net.named_parameters())
    for name, parameter in parameters.items():
        whole: Any = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        if strategy().startswith("zero"):
            whole = safe_get_full_fp32_param(parameter)
        weights[name] = whole.detach().double()
    return weights


def held_bytes() -> int:
    """Return the bytes of all tensors that Python can see, and of their gradients."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    tensors = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]  # type: ignore[operator]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def main() -> None:
    settings: Any = {"precision": "bf16", "gradient_accumulation_steps": MICRO_BATCHES, "max_grad_norm": 0}
    options = TrainOptions(method="full", output_dir=tempfile.mkdtemp(), **settings)
    accelerator = backend.build_accelerator(options)
    world, rank = accelerator.num_processes, accelerator.process_index
    pairs = rows(MICRO_BATCHES * world)

    net = bfloat16_model()
    attach_loss(net, 4096)
    place_weights(accelerator, net, options)
    prepared, optimizer = backend.prepare(accelerator, net.train(), torch.optim.SGD(net.parameters(), lr=RATE))

    mine = sorted(pairs[rank::world], key=lambda pair: -(pair[1] >= 0).sum())
    micro_batches = [collate_padded([pair], 0) for pair in mine]
    targets, held = total_targets(accelerator, micro_batches), 0
    for k, batch in enumerate(micro_batches):
        with accelerator.accumulate(prepared):
            loss = next_token_loss(prepared, batch)
            accelerator.backward(loss * undo_averaging(accelerator) / targets)
            del loss
            optimizer.step()
            optimizer.zero_grad()
        if k == MICRO_BATCHES // 2:
            held = held_bytes()
    after = float32_weights(net)

    if accelerator.is_main_process:
        before, expected = bfloat16_model().double().state_dict(), reference(bfloat16_model(), pairs)
        wrong = sum(((before[n] - after[n]) / RATE - g).square().sum() for n, g in expected.items())
        error = float((wrong / sum(g.square().sum() for g in expected.values())) ** 0.5)
        result = {"error": error, "bytes": held / sum(g.numel() for g in expected.values())}
        if strategy().startswith("zero"):
            plugin: Any = accelerator.state.deepspeed_plugin
            result["bucket"] = plugin.deepspeed_config["zero_optimization"]["reduce_bucket_size"]
        Path(sys.argv[1]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
