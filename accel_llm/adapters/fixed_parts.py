"""Parts of an adapter that are not trained, but decide what it computes: projections, decompositions of the base, offsets.

PEFT computes some of them from the base's weights by a decomposition, whose vectors another processor, or another
number of threads, finds with other signs or rotated. The trained weights belong to the vectors that the run began with.
So the adapter's file and the checkpoints hold these parts. Not held are places that PEFT draws from a seed on the CPU,
which gives the same ones everywhere: those of SHiRA, FourierFT and WaveFT.
"""

import re
from typing import Any

import accel_llm.system.chatter

import torch
from peft.utils import set_peft_model_state_dict
from peft.utils.integrations import gather_params_ctx

from accel_llm.adapters.decompositions import Decompositions
from accel_llm.adapters.initial import offsets
from accel_llm.backend.strategy import training_device

# PEFT 0.21 leaves PSOFT's two factors of the base's weights out of its files, and computes them anew at each load.
UNSAVED_PARTS = ("_psoft_A_cache", "_psoft_B_cache")
OF_ADAPTER = re.compile(r"\.default(\.|$)")


def computed_by_peft(model: Any) -> bool:
    """Return whether plain PEFT computes a part of this adapter anew at each load, so that it may become another one."""
    return any(hasattr(module, name) for module in model.modules() for name in (*UNSAVED_PARTS, "frod_U"))


def save_all_parts(model: Any) -> None:
    """Let PEFT save and load what it would leave out of an adapter's file. Plain PEFT ignores it there."""
    for module in model.modules():
        for part in (getattr(module, name, None) for name in UNSAVED_PARTS):
            if part is not None:
                part.persistent = True
                part._non_persistent_buffers_set.clear()


def fixed_parts(model: Any) -> dict[str, torch.Tensor]:
    """Return the parts by name: the offsets of first values, and the buffers that an adapter's file holds."""
    saved = model.state_dict(keep_vars=True).keys() if hasattr(model, "peft_config") else {}
    buffers = {name: part for name, part in model.named_buffers() if name in saved and OF_ADAPTER.search(name)}
    return offsets(model) | buffers


def load_all_parts(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give an adapter that plain PEFT has loaded all parts that its file, with these `weights`, holds."""
    if computed_by_peft(model):
        save_all_parts(model)
        set_peft_model_state_dict(model, weights)
        follow_projections(model)


def follow_projections(model: Any) -> None:
    """Compute FRoD's U for the projection V that was loaded; all processes must call it.

    FRoD puts U (S + L) V' in place of a weight W of the base; it begins with S = 0 and U L V' = W. PEFT 0.21 saves V, but
    not U, which is as large as W, and leaves it as it was computed for another V.
    """
    for layer in model.modules():
        for name, left in getattr(layer, "frod_U", {}).items():
            base = layer.get_base_layer()
            # PEFT moves both matrices to the CPU; that they take long is said where the layers were added.
            with gather_params_ctx(base.weight), torch.no_grad(), Decompositions("frod", training_device(), 0):
                weight = base.weight.full_tensor() if hasattr(base.weight, "full_tensor") else base.weight
                weight = weight.T if layer.fan_in_fan_out else weight
                left.copy_(layer._calculate_frod_u_and_lambda(layer.frod_V[name], weight)[0])
