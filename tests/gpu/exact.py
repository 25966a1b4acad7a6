"""Compare losses and gradients on this machine's device with float64, with padded rows, and with dequantized weights.

`check.py` runs this file as part c. It prints one line for each comparison, which begins with CELL.
"""

import copy
import json
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import accel_llm.system.chatter

import numpy as np
import torch
import torch.nn.functional as F
from support import scaled_model
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.model import document_attention, probe
from accel_llm.model.attention import enable_packing, stock_attention
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.placement import materialize_weights
from accel_llm.model.positions import scale_by_document
from accel_llm.model.probe import LEAK_TOLERANCE, PACKED_TOLERANCE, SHORT_LENGTH, check_isolation
from accel_llm.model.quantization import (
    build_quantization_config,
    prepare_4bit_layers,
    quantized_weights,
    round_to_4_bits,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float32, torch.bfloat16)
VOCABULARY, ROWS = 512, 24
# Relative to the norm of the whole gradient.
GRADIENT_LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# fp16 needs a scale, or small gradients vanish; the same one for both sides of a comparison.
SCALE = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 1024.0}

Rows = list[tuple[np.ndarray, np.ndarray]]
Gradients = dict[str, torch.Tensor]


def tell(name: str, value: float, limit: float, note: str = "") -> None:
    cell = {"name": name, "ok": value <= limit, "figure": f"{value:.1e}{note}", "required": f"at most {limit:.0e}"}
    print("CELL " + json.dumps(cell), flush=True)


def random_rows() -> Rows:
    """Return rows of uneven lengths and uneven shares of labels."""
    rng, rows = np.random.default_rng(0), []
    for k in range(ROWS):
        ids = rng.integers(3, VOCABULARY, rng.integers(8, 200)).astype(np.int32)
        rows.append((ids, np.where(rng.random(len(ids)) < (k % 8 + 1) / 9, ids, -100).astype(np.int32)))
    return rows


def new_model() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocast(dtype: torch.dtype) -> Any:
    return nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE.type, dtype)


def gradients(model: nn.Module, batch: dict, dtype: torch.dtype) -> tuple[float, Gradients]:
    """Return the mean loss of a batch and the gradient of each trained parameter, in float64 on the CPU."""
    batch = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    targets = int((batch["labels"][:, 1:] != -100).sum())
    model.zero_grad(set_to_none=True)
    with autocast(dtype):
        loss = next_token_loss(model, batch) / targets
    (loss * SCALE[dtype]).backward()
    found = {name: p.grad.double().cpu() / SCALE[dtype] for name, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), found


def distance(found: Gradients, expected: Gradients) -> float:
    """Return the norm of the difference, relative to the norm of what is expected, over all parameters together."""
    assert found.keys() == expected.keys()
    squares = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (squares / sum(float(value.square().sum()) for value in expected.values())) ** 0.5


def float64_gradients(rows: Rows) -> tuple[float, Gradients]:
    """Return loss and gradients row by row on the CPU, through the model's own logits."""
    model = new_model().double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for ids, labels in rows:
        targets = torch.tensor(labels[1:]).long()
        logits = model(input_ids=torch.tensor(ids).long()[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        count += int((targets != -100).sum())
    (total / count).backward()
    return float(total.detach()) / count, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def with_our_loss(model: Any) -> Any:
    attach_loss(model, 8192)
    enable_packing(model)
    return model.train()


def compare_with_float64() -> None:
    """Packed and padded rows against float64, and against each other."""
    rows = random_rows()
    expected_loss, expected = float64_gradients(rows)
    kernel, calls = document_attention.varlen_attn, []
    document_attention.varlen_attn = lambda *a, **o: calls.append(1) or kernel(*a, **o)  # type: ignore[assignment]
    model = with_our_loss(new_model().to(DEVICE))
    for dtype in DTYPES:
        calls.clear()
        loss, packed = gradients(model, collate_packed(rows), dtype)
        path = f", {'torch varlen kernel' if calls else 'one document at a time'}"
        with stock_attention(model):
            _, padded = gradients(model, collate_padded(rows, 0), dtype)
        limit, name = GRADIENT_LIMIT[dtype], name_of(dtype)
        tell(f"{name}: loss against float64", abs(loss / expected_loss - 1), min(limit, 1e-3))
        tell(f"{name}: packed gradient against float64", distance(packed, expected), limit, path)
        tell(f"{name}: padded gradient against float64", distance(padded, expected), limit)
        tell(f"{name}: packed against padded", distance(packed, padded), 2 * limit)
    document_attention.varlen_attn = kernel


@torch.no_grad()
def compare_documents() -> None:
    """Logits of a packed row against those of each document alone, and after one document has changed."""
    model = with_our_loss(new_model().to(DEVICE)).eval()
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, VOCABULARY, (n,), generator=generator).to(DEVICE) for n in (70, 1, 129, 33)]
    for dtype in DTYPES:
        with autocast(dtype):
            packed = probe._logits_together(model, documents, True)
            changed = probe._logits_together(model, [documents[0].roll(1), *documents[1:]], True)
            with stock_attention(model):
                alone = [model(input_ids=d[None], use_cache=False).logits[0].float() for d in documents]
        name = name_of(dtype)
        tell(f"{name}: packed against alone", probe._relative_distance(packed, alone), PACKED_TOLERANCE[dtype])
        tell(f"{name}: leak", probe._relative_distance(changed[1:], packed[1:]), LEAK_TOLERANCE[dtype])


def compare_lengths(kind: str) -> None:
    """Rotary embeddings that depend on a document's length: packed and padded documents against each alone."""
    model: Any = scaled_model(kind, length=SHORT_LENGTH).to(DEVICE)
    scale_by_document(model)
    enable_packing(model)
    check_isolation(model, DEVICE, torch.float32)
    with stock_attention(model):
        check_isolation(model, DEVICE, torch.float32, packed=False)
    tell(f"float32: {kind}, packed and padded", 0.0, 0.0, ", as each document alone")


def adapted(base: Any, dtype: torch.dtype, **changes: Any) -> Any:
    """Return `base` with a random adapter and our loss, its weights on the device in the dtypes of a training."""
    options = TrainOptions(method="qlora", init_lora_weights=False, **changes)
    base.unread = True  # the loss cannot be tested before the weights are on the device
    with_our_loss(base)
    if options.use_dora:  # its magnitudes are computed from the weights
        materialize_weights(base, list(base.modules()), dtype, DEVICE)
    torch.manual_seed(1)
    model = attach_adapter(base, options)
    materialize_weights(model, list(model.modules()), dtype, DEVICE)
    return model


def compare_with_dequantized(dtype: torch.dtype, **changes: Any) -> None:
    """The gradient of QLoRA against that of LoRA on the weights that the 4 bits stand for."""
    dense = new_model()
    quantized: Any = copy.deepcopy(dense)
    config = build_quantization_config(TrainOptions(method="qlora"), dtype, sharded=False)
    assert config is not None
    prepare_4bit_layers(quantized, config)
    weights = dict(dense.named_parameters())
    for name in quantized_weights(new_model()):
        weights[name].data = round_to_4_bits(weights[name].data.to(DEVICE, dtype), False).float().cpu()
    batch = collate_packed(random_rows())
    loss, found = gradients(adapted(quantized, dtype, **changes), batch, dtype)
    expected_loss, expected = gradients(adapted(dense, dtype, **changes), batch, dtype)
    what = f"{name_of(dtype)}: qlora{' with DoRA' if changes else ''} against dequantized weights"
    tell(f"{what}, loss", abs(loss / expected_loss - 1), GRADIENT_LIMIT[dtype])
    tell(f"{what}, gradient", distance(found, expected), GRADIENT_LIMIT[dtype])


def attempt(name: str, function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Run one comparison; an error is a failed cell, and the others go on."""
    try:
        function(*arguments, **options)
    except Exception as error:
        traceback.print_exc()
        cell = {"name": name, "ok": False, "figure": f"{type(error).__name__}: {error}"[:200], "required": "no error"}
        print("CELL " + json.dumps(cell), flush=True)


def main() -> None:
    attempt("float64", compare_with_float64)
    attempt("documents", compare_documents)
    for kind in ("phi3 longrope", "llama dynamic"):
        attempt(kind, compare_lengths, kind)
    for dtype in DTYPES:
        attempt(f"{name_of(dtype)}: qlora", compare_with_dequantized, dtype)
    attempt("float32: qlora with DoRA", compare_with_dequantized, torch.float32, use_dora=True)


if __name__ == "__main__":
    main()
