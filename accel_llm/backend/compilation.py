"""torch.compile: the launch YAML's `dynamo_backend`, in force for the layers in training.

Accelerate 1.15 would wrap the whole model. Then all names get the prefix `_orig_mod.`, which no export knows. And our
loss and the documents of a packed row, which have another shape in each step, would be compiled again and again. So
each part of a decoder layer (attention, MLP, norms) is compiled by itself; activation checkpointing and the hooks of
FSDP2 stay around the parts. Without gradients (evaluation, generation, checks at the start) the parts run uncompiled,
so an evaluation also checks what the compiler did.
"""

import functools
import os
import shutil
import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from accel_llm.errors import ConfigError

# torch 2.13 compiles a function 8 times at most, for all layers and shapes together, and then runs it uncompiled.
RECOMPILE_LIMIT = 64

# The other modes record CUDA graphs, whose results the next layer would overwrite.
MODES = ("default", "max-autotune-no-cudagraphs")


def compile_settings() -> dict[str, Any]:
    """Return the arguments of `torch.compile` that the launch YAML asks for; empty without `dynamo_backend`."""
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "no":
        return {}
    mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default").lower()
    # The launcher writes "False" also where the YAML says nothing. None: torch decides at the second length it meets.
    dynamic = os.environ.get("ACCELERATE_DYNAMO_USE_DYNAMIC", "false").lower() == "true" or None
    return {"backend": backend, "dynamic": dynamic} | ({} if mode == "default" else {"mode": mode})


def compile_problems(strategy: str, cpu: bool) -> list[str]:
    """Return a sentence if the launch YAML asks for `torch.compile` in a way that cannot work."""
    settings = compile_settings()
    if not settings:
        return []
    backend, mode = settings["backend"], settings.get("mode", "default")
    if backend == "cudagraphs" or mode not in MODES:
        return [f"dynamo_backend: {backend} with dynamo_mode: {mode} records CUDA graphs, which is not supported; use "
                f"inductor with dynamo_mode: {' or '.join(MODES)}."]  # fmt: skip
    allowed = {*torch.compiler.list_backends(exclude_tags=None), "eager", "aot_eager", "inductor"}
    if backend not in allowed:
        return [f"dynamo_backend: {backend} is not installed; use inductor, or remove it from the launch YAML."]
    if backend == "inductor" and cpu and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return ["dynamo_backend: inductor needs a C++ compiler on a CPU, and there is none; install g++, or remove it."]
    if backend == "inductor" and not cpu and find_spec("triton") is None:
        return ["dynamo_backend: inductor needs triton on a GPU; run pip install triton, or remove it."]
    if strategy == "zero3":
        # Tried with torch 2.13 and DeepSpeed 0.19.8: the first step did not end within five minutes.
        return ["dynamo_backend: ZeRO-3 fetches weights inside the layers, which cannot be compiled; use fsdp2.yaml."]
    return []


def compile_layers(model: nn.Module) -> None:
    """Compile the parts of each decoder layer, in place, if the launch YAML asks for it. Names stay as they are.

    Raises:
        ConfigError: the model does not name the classes of its layers.
    """
    settings = compile_settings()
    if not settings:
        return
    layers = decoder_layers(model)
    # A layer can be inside another one.
    parts = [p for layer in layers for p in layer.children() if not any(module in layers for module in p.modules())]
    if not parts:
        raise ConfigError(
            f"dynamo_backend: {type(model).__name__} does not name its layers (_no_split_modules), so none can be "
            "compiled; remove it from the launch YAML."
        )
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # torch 2.13 looks at the .grad of everything that a compiled function gets, and then warns about that.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf Tensor")
    for part in parts:
        _compile_in_training(part, settings)


def compiled_graphs() -> int:
    """Return how many graphs this process has compiled so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers of a transformers model, wrapped or not: modules of the classes in `_no_split_modules`."""
    names = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or []}
    # FSDP2 gives a layer that it shards a class of its own, made from the layer's class.
    return [module for module in model.modules() if names & {base.__name__ for base in type(module).__mro__}]


def _compile_in_training(module: nn.Module, settings: dict[str, Any]) -> None:
    uncompiled = module.forward
    compiled = torch.compile(uncompiled, **settings)

    @functools.wraps(uncompiled)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else uncompiled)(*args, **kwargs)

    module.forward = forward
