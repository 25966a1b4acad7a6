"""What the matrix is compared with: plain transformers and PEFT in float64, on a base that holds dequantized weights.

Nothing here is of this project, except that bitsandbytes is imported as the scripts import it. A 4-bit or 8-bit base is
replaced by the numbers that it stands for, by bitsandbytes' own functions. A step sees all rows, so their order and how
they are cut into batches does not matter: the loss is the mean over all targets, row by row without padding.
"""

import re
from pathlib import Path
from typing import Any

import accel_llm.system.chatter

import numpy as np
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

EncodedRow = tuple[dict, list[int], set[int]]  # the row, its ids and the trained positions
# The adapter that runs of each method continue. A fresh one has B = 0, and so no gradient for A.
ADAPTERS = {"lora": "lora", "dora": "dora", "qlora": "lora", "lora8": "lora"}


def write_adapters(work: Path) -> None:
    """Write an adapter of each kind whose every weight has a gradient."""
    for name in set(ADAPTERS.values()):
        base: Any = AutoModelForCausalLM.from_pretrained(work / "model")
        settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", use_dora=name == "dora")
        torch.manual_seed(1)
        model = get_peft_model(base, settings)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.05)
        model.save_pretrained(work / f"adapter-{name}")


def dequantized(weight: torch.Tensor, method: str) -> torch.Tensor:
    """Return the numbers that a weight stands for: NF4 in blocks of 64 with quantized scales, or 8 bits by rows."""
    if method == "qlora":
        return dequantize_4bit(
            *quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        ).double()
    rows, scales, _ = int8_vectorwise_quant(weight.half())
    return rows.double() * scales.double()[:, None] / 127


def load(work: Path, method: str) -> Any:
    """Load the model of a method in float64, with its adapter."""
    base: Any = AutoModelForCausalLM.from_pretrained(work / "model")
    layers = [module for module in base.model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [dequantized(m.weight.data, method) if method in ("qlora", "lora8") else m.weight.data for m in layers]
    base.double()
    for module, weight in zip(layers, weights, strict=True):
        module.weight.data.copy_(weight)
    if method == "full":
        return base
    return PeftModel.from_pretrained(base, work / f"adapter-{ADAPTERS[method]}", is_trainable=True).double()


def mean_loss(model: Any, rows: list[EncodedRow]) -> torch.Tensor:
    """Return the mean cross-entropy over the trained positions of all rows, by transformers' own logits."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for _, ids, trained in rows:
        targets = sorted(trained - {0})
        scores = model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :].log_softmax(-1)  # without virtual tokens
        total = total - scores[[k - 1 for k in targets], [ids[k] for k in targets]].sum()
        count += len(targets)
    return total / count


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the trained parameters by their names in the exported file."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {re.sub(r"(magnitude_vector)\.weight$", r"\1", k.replace(".default", "")): p for k, p in named.items()}


def clipped_step(
    work: Path, method: str, rows: list[EncodedRow], held_out: list[EncodedRow], max_norm: float
) -> dict[str, Any]:
    """Return the numbers of one step: the clipped gradient by name, its norm before, and the losses.

    `evaluation` is the loss over the rows `held_out` before the step, in eval mode.
    """
    model = load(work, method)
    with torch.no_grad():
        evaluation = mean_loss(model.eval(), held_out)
    loss = mean_loss(model.train(), rows)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    numbers = {"loss": loss.detach(), "norm": norm, "evaluation": evaluation}
    gradients = {f"gradient {name}": p.grad for name, p in trained(model).items() if p.grad is not None}
    starts = {f"start {name}": p.detach() for name, p in trained(model).items()}
    return {name: np.array(tensor) for name, tensor in (numbers | gradients | starts).items()}


def path(
    work: Path, method: str, rows: list[EncodedRow], held_out: list[EncodedRow], steps: int, every: int, **adamw: float
) -> dict[str, list[float]]:
    """Return the curves of `steps` steps of torch's AdamW, with an evaluation at the start and after each `every`."""
    model = load(work, method)
    optimizer = torch.optim.AdamW(trained(model).values(), **adamw)
    curves: dict[str, list[float]] = {"loss": [], "grad_norm": [], "eval/loss": []}
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                curves["eval/loss"].append(float(mean_loss(model.eval(), held_out)))
        if step < steps:
            optimizer.zero_grad()
            loss = mean_loss(model.train(), rows)
            loss.backward()
            curves["grad_norm"].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
            curves["loss"].append(loss.item())
            optimizer.step()
    return curves
