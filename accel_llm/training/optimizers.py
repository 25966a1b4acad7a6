"""Parameter groups, the optimizer by name, the learning rate's course, and noise on the input embeddings."""

from typing import Literal

import torch
from torch import nn

from accel_llm.config.options import OptimOptions
from accel_llm.errors import ConfigError
from accel_llm.training.own_optimizers import MuonWithAdamW, RoundedAdamW

Engine = Literal["none", "deepspeed", "fsdp"]

# What an engine cannot run, seen with deepspeed 0.19.8, bitsandbytes 0.50.2, transformers 5.23 and torch 2.13:
# bitsandbytes raises on a DTensor, Adafactor mixes it with plain tensors, and ZeRO flattens what it and Muon factorise.
FLAT = "DeepSpeed hands it flat pieces of the weights and it needs matrices"
SHARDED = "FSDP hands it sharded tensors, which it does not take"
IMPOSSIBLE: dict[Engine, dict[str, str]] = {
    "none": {},
    "deepspeed": {"muon": FLAT, "adafactor": FLAT},
    "fsdp": dict.fromkeys(["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor"], SHARDED),
}


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict]:
    """The trainable parameters as at most four groups, by weight decay and learning rate.

    Vectors, that is norms, biases and DoRA magnitudes, never decay. With `loraplus_lr_ratio` the B matrices of an
    adapter learn faster than the A matrices by that factor (LoRA+, arXiv 2402.12354).
    """
    assert options.learning_rate is not None, "OptimOptions resolves it"
    ratio = options.loraplus_lr_ratio or 1.0
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            faster = ratio != 1 and ("lora_B" in name or "lora_embedding_B" in name)
            groups.setdefault((_dimensions(parameter) > 1, faster), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": options.weight_decay if decays else 0.0,
            "lr": options.learning_rate * (ratio if faster else 1),
        }
        for (decays, faster), parameters in groups.items()
    ]


def optimizer_in_force(options: OptimOptions, device_type: str) -> str:
    """The optimizer that `build_optimizer` gives: bitsandbytes pages state to the host on CUDA only."""
    return options.optim if device_type == "cuda" else options.optim.removeprefix("paged_")


def check_optimizer(options: OptimOptions, device_type: str, engine: Engine) -> None:
    """Raises ConfigError where the engine cannot run the optimizer."""
    name = optimizer_in_force(options, device_type)
    if reason := IMPOSSIBLE[engine].get(name):
        possible = [other for other in ("adamw", "lion", "sgd", "muon") if other not in IMPOSSIBLE[engine]]
        raise ConfigError(f"optim: {name} cannot run here, as {reason}; give {', '.join(possible)}")


def build_optimizer(
    model: nn.Module, options: OptimOptions, device_type: str, engine: Engine, seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer that `options.optim` names, over the trainable parameters of a model that is not yet prepared.

    `device_type` and `engine` are those of the training to come; `seed` is for stochastic rounding. Raises ConfigError as
    `check_optimizer` does.
    """
    check_optimizer(options, device_type, engine)
    name = optimizer_in_force(options, device_type)
    groups = parameter_groups(model, options)
    assert options.adam_beta2 is not None, "OptimOptions resolves it"
    betas = (options.adam_beta1, options.adam_beta2)
    if options.master_weights == "stochastic_rounding":
        return RoundedAdamW(groups, betas, options.adam_epsilon, seed)
    if name == "adamw":
        fused = device_type in ("cpu", "cuda", "xpu", "mps")
        return torch.optim.AdamW(groups, betas=betas, eps=options.adam_epsilon, fused=fused)
    if name == "sgd":
        return torch.optim.SGD(groups)
    if name == "muon":
        return MuonWithAdamW(model, groups, betas, options.adam_epsilon)
    if name == "adafactor":
        # Not torch's: it scales each step by the size of the weights, so an adapter's B, zero at first, hardly moves.
        from transformers.optimization import Adafactor

        return Adafactor(groups, scale_parameter=False, relative_step=False)

    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW, PagedAdamW8bit
    from bitsandbytes.optim.lion import Lion

    if name == "lion":
        return Lion(groups, betas=betas)
    if name == "paged_adamw":
        return PagedAdamW(groups, betas=betas, eps=options.adam_epsilon)
    _keep_embeddings_in_32_bits(model)
    kind = PagedAdamW8bit if name == "paged_adamw_8bit" else AdamW8bit
    return kind(groups, betas=betas, eps=options.adam_epsilon)


def _dimensions(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is an empty vector from the moment it is loaded; DeepSpeed keeps its shape apart.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Rare tokens give embeddings the most uneven gradients, for which bitsandbytes advises 32-bit state."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
