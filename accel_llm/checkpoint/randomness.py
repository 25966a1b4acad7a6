"""Saves and restores the random number generators that training uses, as JSON, so that loading needs no pickle."""

import random
from typing import Any

import numpy as np
import torch


def generator_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every generator that training draws from (torch, NumPy, Python, CUDA), ready for JSON."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "numpy": [kind, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)],
        "python": random.getstate(),
    }
    # Each process uses one GPU, so the generator of that device is enough.
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_generator_states(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `generator_states` returned, also after it went through JSON."""
    torch.set_rng_state(_from_hex(state["torch"]))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    # JSON made lists of Python's tuples.
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda":
        torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)


def _from_hex(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(bytes.fromhex(text), np.uint8).copy())
