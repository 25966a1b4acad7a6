"""Parameter groups and the optimizer that the option `optim` names."""

import re
from typing import Literal

import torch
from torch import nn

from accel_llm.config.options import OptimOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.training.own_optimizers import MuonWithAdamW, RoundedAdamW, is_vector

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
    """Sort the trainable parameters into groups, by weight decay and learning rate; that of most options comes first.

    Vectors have no weight decay: norms, biases, magnitudes and scales. A prompt, which is a matrix, has it, as in the
    code of Lester et al. 2021 (arXiv 2104.08691). The rate is that of the first of `learning_rate_patterns` with a
    match in the name, else `learning_rate`, which `loraplus_lr_ratio` multiplies for the B matrices of an adapter
    (LoRA+, arXiv 2402.12354).

    Raises:
        ConfigError: a pattern is the first match of no trained parameter.
    """
    assert options.learning_rate is not None, "OptimOptions fills it in"
    faster = options.learning_rate * (options.loraplus_lr_ratio or 1.0)
    patterns, unused = options.learning_rate_patterns, set(options.learning_rate_patterns)
    names: list[str] = []
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        names.append(name)
        rate = faster if "lora_B" in name or "lora_embedding_B" in name else options.learning_rate
        if pattern := next((pattern for pattern in patterns if re.search(pattern, name)), None):
            rate = patterns[pattern]
            unused.discard(pattern)
        groups.setdefault((not is_vector(parameter), rate), []).append(parameter)
    raise_problems(
        [
            f"learning_rate_patterns: {pattern!r} matches no trained parameter that an earlier pattern leaves; they "
            f"have names such as {', '.join([names[0], names[-1]])}."
            for pattern in patterns
            if pattern in unused
        ]
    )
    return [
        {"params": parameters, "weight_decay": options.weight_decay if decays else 0.0, "lr": rate}
        # The metric learning_rate is that of the first group.
        for (decays, rate), parameters in sorted(groups.items(), key=lambda group: group[0][1] in patterns.values())
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


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Keep 32-bit state for embeddings, as bitsandbytes advises: rare tokens make their gradients very uneven."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})
