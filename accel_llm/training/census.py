"""What a run really computes, as observed: dtypes of products, kernels, recomputed layers, compiled graphs."""

import re
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from accel_llm.backend.compilation import compile_settings, compiled_graphs, decoder_layers

# Names of operators of torch and bitsandbytes.
PRODUCT = re.compile(r"(add|b|badd|_int_|_scaled_|_grouped_)?mm|(mkl|mkldnn)?_?linear|int8_\w*(mm|matmul)|gem[mv]_4bit")
BIAS_FIRST = ("addmm", "baddbmm")
ATTENTION = re.compile(r"_scaled_dot_product_\w+|_flash_attention_forward|_efficient_attention_forward|_varlen_attn")


class ProductCensus(TorchDispatchMode):
    """Counts, inside its `with` block, the matrix products by the dtype in which they run, and the attention kernels.

    Autocast has chosen the dtype before an operator arrives here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.attention_kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if PRODUCT.fullmatch(name):
            self.products[dtype_name(args[1 if name in BIAS_FIRST else 0])] += 1
        elif ATTENTION.fullmatch(name):
            self.attention_kernels[name.lstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def dtype_name(tensor: torch.Tensor) -> str:
    """Return the dtype without `torch.`, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def watch_layers(model: nn.Module, facts: dict[str, Any]) -> list[RemovableHandle]:
    """Record from the next training step whether autocast is on in the layers and whether they are computed again.

    Adds `autocast` (its dtype, or None) and `recomputed_in_backward` to `facts`, and returns the hooks to remove.
    """
    facts |= {"autocast": None, "recomputed_in_backward": False}

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training:
            return
        device = next(iter(module.parameters())).device.type
        if torch.is_autocast_enabled(device):
            facts["autocast"] = str(torch.get_autocast_dtype(device)).removeprefix("torch.")
        # -1 outside a backward pass.
        facts["recomputed_in_backward"] |= torch._C._current_graph_task_id() != -1

    # A checkpoint is inside a layer's own forward, so the layer's parts are watched.
    parts = [part for layer in decoder_layers(model)[:1] for part in layer.children() if list(part.parameters())]
    return [part.register_forward_hook(note) for part in parts]


def compilation_facts() -> dict[str, Any] | None:
    """Return what `torch.compile` was asked for and how many graphs it has compiled; None if it was not asked for.

    Raises:
        RuntimeError: nothing was compiled.
    """
    settings = compile_settings()
    if settings and not compiled_graphs():
        raise RuntimeError(f"dynamo_backend: {settings['backend']} compiled nothing in the first step.")
    return settings | {"graphs": compiled_graphs()} if settings else None
