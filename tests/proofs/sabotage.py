"""Mistakes that the matrix must notice: each is made on purpose in the ranks of a run, before the script starts.

The scripts are imported by then, so a mistake replaces a name in the module that uses it.
"""

from dataclasses import replace
from typing import Any


def averaging_left_in() -> None:
    from accel_llm.training import loop

    loop.undo_averaging = lambda accelerator: 1


def equal_data() -> None:
    from accel_llm.data.stream import Stream

    honest = Stream.__init__
    Stream.__init__ = lambda self, rows, options, start, *more: honest(
        self, rows, options, replace(start, rank=0), *more
    )


def leaking_document() -> None:
    import torch

    from accel_llm.model import attention, loss, probe

    honest = attention.forward_arguments

    def one_document(batch: dict) -> dict:
        tokens = batch["input_ids"].numel()
        whole = {"cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32), "max_seqlen": tokens, "lengths": [tokens]}
        return honest(batch | whole if "cu_seqlens" in batch else batch)

    attention.forward_arguments = loss.forward_arguments = probe.forward_arguments = one_document


def whole_layer() -> None:
    """FSDP2 leaves one decoder layer unsharded."""
    import torch.distributed.fsdp as fsdp

    honest, left_out = fsdp.fully_shard, set()

    def fully_shard(module: Any, **settings: Any) -> Any:
        if type(module).__name__ == "Qwen3DecoderLayer" and not left_out:
            left_out.update(module.parameters())
            return module
        return honest(module, **settings | {"ignored_params": left_out | set(settings.get("ignored_params") or [])})

    fsdp.fully_shard = fully_shard


def whole_tensors() -> None:
    """ZeRO-3 does not shard small tensors: here the projections of queries, keys and values."""
    from accel_llm.backend import strategy, zero

    honest = zero.deepspeed_settings

    def settings_in_force() -> dict[str, Any]:
        settings = honest()
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 5000
        return settings

    zero.deepspeed_settings = strategy.deepspeed_settings = settings_in_force


# Each mistake, the cell and the kind of run it is made in, and a pattern of the verdict that it must get.
CONTROLS = {
    averaging_left_in: ("ddp-full-packed-acc4-plain-2p-sft", "gradient", "different"),
    equal_data: ("ddp-full-packed-acc4-plain-2p-sft", "gradient", "different"),
    leaking_document: ("cpu-full-packed-acc1-plain-1p-sft", "curve", "refused error: packing: true leaks"),
    whole_layer: ("fsdp2-full-packed-acc1-plain-2p-sft", "gradient", "failed .*not sharded"),
    whole_tensors: ("zero3-full-packed-acc1-plain-2p-sft", "gradient", "failed .*not sharded"),
}
