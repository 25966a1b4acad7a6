"""Parameter groups and the optimizer that the option `optim` names."""

from typing import Literal

import torch
from torch import nn

from accel_llm.config.options import OptimOptions
from accel_llm.errors import ConfigError
from accel_llm.training.own_optimizers import MuonWithAdamW, RoundedAdamW

Engine = Literal["none", "deepspeed", "fsdp"]

# Optimizers that an engine cannot run, as seen with deepspeed 0.19.8, bitsandbytes 0.50.2, transformers 5.23 and torch
# 2.13. ZeRO flattens the weights, which Muon and Adafactor need as matrices. With a DTensor of FSDP2 bitsandbytes
# raises an error, and Adafactor mixes it with plain tensors.
NEEDS_MATRICES = "DeepSpeed hands it flat pieces of the weights and it needs matrices"
REFUSES_SHARDS = "FSDP hands it sharded tensors, which it does not take"
UNSUPPORTED: dict[Engine, dict[str, str]] = {
    "none": {},
    "deepspeed": {"muon": NEEDS_MATRICES, "adafactor": NEEDS_MATRICES},
    "fsdp": dict.fromkeys(["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor"], REFUSES_SHARDS),
}


def parameter_groups(model: nn.Module, options: OptimOptions) -> list[dict]:
    """Sort the trainable parameters into at most four groups, by weight decay and learning rate.

    Vectors (norms, biases and DoRA magnitudes) have no weight decay. With `loraplus_lr_ratio` the B matrices of an
    adapter have that many times the learning rate of the A matrices (LoRA+, arXiv 2402.12354).
    """
    assert options.learning_rate is not None, "OptimOptions fills it in"
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


def effective_optimizer(options: OptimOptions, device_type: str) -> str:
    """Return the name of the optimizer that will run: `optim`, without paging if there is no CUDA."""
    return options.optim if device_type == "cuda" else options.optim.removeprefix("paged_")


def check_optimizer(options: OptimOptions, device_type: str, engine: Engine) -> None:
    """Raise ConfigError if the engine cannot run the optimizer."""
    name = effective_optimizer(options, device_type)
    if reason := UNSUPPORTED[engine].get(name):
        possible = [other for other in ("adamw", "lion", "sgd", "muon") if other not in UNSUPPORTED[engine]]
        raise ConfigError(f"optim: {name} cannot run here: {reason}; give {', '.join(possible)}.")


def build_optimizer(
    model: nn.Module, options: OptimOptions, device_type: str, engine: Engine, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer that `options.optim` names, over the trainable parameters of a model before `prepare`.

    `device_type` and `engine` are those of the training. `seed` is used by stochastic rounding.

    Raises:
        ConfigError: the engine cannot run the optimizer.
    """
    check_optimizer(options, device_type, engine)
    name = effective_optimizer(options, device_type)
    groups = parameter_groups(model, options)
    assert options.adam_beta2 is not None, "OptimOptions fills it in"
    betas = (options.adam_beta1, options.adam_beta2)

    # Optimizers of torch, of transformers and of our own.
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
        # Not torch's Adafactor: its steps are proportional to the weights, so an adapter's B, which starts at zero,
        # would hardly move.
        from transformers.optimization import Adafactor

        return Adafactor(groups, scale_parameter=False, relative_step=False)

    # Optimizers of bitsandbytes, which is imported only where it is needed.
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
    # Under ZeRO-3 a parameter is an empty vector; DeepSpeed keeps its shape in `ds_shape`.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Keep 32-bit state for embeddings, as bitsandbytes advises: rare tokens make their gradients very uneven."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
