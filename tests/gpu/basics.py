"""Import what the project needs, and send weights through 4 and 8 bits and back on this machine's device.

`check.py` runs this file in part a.
"""

import importlib
import importlib.metadata
import json

import accel_llm.system.chatter

import torch

from accel_llm.model.quantization import round_to_4_bits

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "deepspeed", "bitsandbytes", "pydantic", "rich")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def tell(name: str, ok: bool, figure: str, required: str) -> None:
    print("CELL " + json.dumps({"name": name, "ok": ok, "figure": figure, "required": required}), flush=True)


def check_imports() -> None:
    failed, versions = [], []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:150])
    tell("imports", not failed, "; ".join(failed or versions), "all imported")


def check_4_bits() -> None:
    """NF4 with double quantization, on normal weights: the relative error has a known size."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        back = round_to_4_bits(weight.to(dtype), transposed=False)
        error = float((back.float() - weight).norm() / weight.norm())
        again = round_to_4_bits(back, transposed=False)
        drift = float((again.float() - back.float()).norm() / back.float().norm())
        name = f"4 bits and back, {str(dtype).removeprefix('torch.')}"
        tell(name, 0.08 < error < 0.11 and drift < 0.02, f"error {error:.4f}, again {drift:.1e}", "0.08 to 0.11")


def check_layers() -> None:
    """The product of a 4-bit layer against that of the weight it stands for; an 8-bit layer against the weight."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(256, 512, generator=generator), torch.randn(64, 512, generator=generator)
    weight, inputs = weight.to(DEVICE, torch.bfloat16), inputs.to(DEVICE, torch.bfloat16)
    layer = Linear4bit(512, 256, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": 64}
    layer.weight = Params4bit(weight.clone(), requires_grad=False, module=layer, **options)
    layer = layer.to(DEVICE)
    layer.weight = layer.weight.to(DEVICE)
    expected = inputs.float() @ round_to_4_bits(weight, transposed=False).float().T
    error = float((layer(inputs).float() - expected).norm() / expected.norm())
    tell("4-bit layer, bfloat16", error < 1e-2, f"{error:.1e}", "at most 1e-02")

    eight = Linear8bitLt(512, 256, bias=False, has_fp16_weights=False, threshold=6.0)
    eight.weight = Int8Params(weight.half().cpu(), requires_grad=False, has_fp16_weights=False)
    expected = inputs.float() @ weight.float().T
    error = float((eight.to(DEVICE)(inputs.half()).float() - expected).norm() / expected.norm())
    tell("8-bit layer, float16", error < 3e-2, f"{error:.1e}", "at most 3e-02")


if __name__ == "__main__":
    for check in (check_imports, check_4_bits, check_layers):
        try:
            check()
        except Exception as error:
            tell(check.__name__, False, f"{type(error).__name__}: {error}"[:250], "no error")
