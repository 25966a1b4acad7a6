"""Parameter groups, the optimizer by name, the learning rate's course, and noise on the input embeddings."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from accel_llm.config.options import OptimOptions
from accel_llm.errors import ConfigError

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


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights without float32 copies: each step is computed in float32 and rounded up or down at random,
    with the odds that keep its mean (Gupta et al. 2015, arXiv 1502.02551). Moments are float32.

    The draws follow from seed, step and place alone, so copies of a weight on several ranks stay equal, and so does a
    resumed run.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, seed: int):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._step_one(group, parameter, place)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch 2.13 casts moments to the dtype of their weight.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            for name in ("exp_avg", "exp_avg_sq") if key in state_dict["state"] else ():
                self.state[parameter][name] = state_dict["state"][key][name].to(parameter.device, copy=True)

    def _step_one(self, group: dict, parameter: nn.Parameter, place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
        state["step"] += 1
        number, (beta1, beta2) = state["step"], group["betas"]
        weight, gradient, mean, square = map(_local, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]))
        gradient = gradient.float()
        mean.lerp_(gradient, 1 - beta1)
        square.lerp_(gradient.square(), 1 - beta2)
        updated = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] / (1 - beta1**number)
        updated.addcdiv_(mean, (square / (1 - beta2**number)).sqrt_().add_(group["eps"]), value=-size)
        generator = torch.Generator(weight.device)
        # Shards of one weight are different numbers, copies of it are the same.
        shard = torch.distributed.get_rank() if weight is not parameter else 0
        generator.manual_seed(hash((self.seed, number, place, shard)) & (2**63 - 1))
        weight.copy_(rounded_at_random(updated, generator))


def _local(tensor: Any) -> torch.Tensor:
    """This rank's part of a sharded tensor; a whole one as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def rounded_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 `values` as bfloat16, each one of its two neighbours there, the nearer the likelier; the mean is `values`."""
    # bfloat16 is the upper half of a float32: what the lower half adds to a random number carries over, or does not.
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for vectors, embeddings, output head and stacked experts, as one optimizer.

    Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so both take the same learning rate.
    """

    def __init__(self, model: nn.Module, groups: list[dict], betas: tuple[float, float], eps: float):
        apart = _embedding_parameters(model)

        def for_muon(parameter: nn.Parameter) -> bool:
            return parameter.ndim == 2 and id(parameter) not in apart

        matrices = _chosen(groups, for_muon)
        others = _chosen(groups, lambda parameter: not for_muon(parameter))
        self.parts: list[tuple[torch.optim.Optimizer, slice]] = []
        if matrices:
            muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
            self.parts.append((muon, slice(0, len(matrices))))
        if others:
            self.parts.append((torch.optim.AdamW(others, betas=betas, eps=eps), slice(len(matrices), None)))
        super().__init__([group for part, _ in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # Handed over anew each time: loading a state, and FSDP2 for its shards, replace groups, state and parameters.
        for part, groups in self.parts:
            part.param_groups, part.state = self.param_groups[groups], self.state
            part.step()


def _chosen(groups: list[dict], wanted: Callable[[nn.Parameter], bool]) -> list[dict]:
    """The groups with the wanted parameters only; empty ones are left out."""
    kept = [{**group, "params": [p for p in group["params"] if wanted(p)]} for group in groups]
    return [group for group in kept if group["params"]]


def _dimensions(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a parameter is an empty vector from the moment it is loaded; DeepSpeed keeps its shape apart.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def _embedding_parameters(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {id(parameter) for module in [*tables, *([head] if head else [])] for parameter in module.parameters()}


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Rare tokens give embeddings the most uneven gradients, for which bitsandbytes advises 32-bit state."""
    from bitsandbytes.optim.optimizer import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            manager.register_module_override(module, "weight", {"optim_bits": 32})


def warmup_length(options: OptimOptions, total_steps: int) -> int:
    """Steps of warmup: `warmup_steps` itself, or below 1 that share of all steps, rounded up."""
    if options.lr_scheduler_type == "constant":
        return 0
    steps = options.warmup_steps
    return int(steps) if steps >= 1 else math.ceil(steps * total_steps)


def lr_at(step: int, options: OptimOptions, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) as a share of its peak.

    Warmup rises in equal parts from above 0, so no step is idle, and reaches 1 at the step after it. What follows
    would arrive at the end value, `min_lr_rate` or 0, at step `total_steps`, the first that is not taken.
    """
    assert options.min_lr_rate is not None, "OptimOptions resolves it"
    name, floor, warmup = options.lr_scheduler_type, options.min_lr_rate, warmup_length(options, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if name in ("constant", "constant_with_warmup"):
        return 1.0
    start = warmup
    if name == "warmup_stable_decay":
        start = max(warmup, total_steps - math.ceil(options.decay_share * total_steps))
    left = min(1.0, (total_steps - step) / max(1, total_steps - start)) if step < total_steps else 0.0
    if name == "linear":
        return left
    if name == "warmup_stable_decay":
        return floor + (1 - floor) * left
    wave = 0.5 * (1 - math.cos(math.pi * left))
    return wave if name == "cosine" else floor + (1 - floor) * wave


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimOptions, total_steps: int) -> LambdaLR:
    """The schedule, a pure function of the step; it is stepped once an optimizer step and never prepared."""
    return LambdaLR(optimizer, lambda step: lr_at(step, options, total_steps))


def neftune(model: nn.Module, alpha: float | None) -> None:
    """Adds noise to the input embeddings while training: uniform in +-alpha / sqrt(L d) (NEFTune, arXiv 2310.05914).

    L is the length of the token's own document, so alpha means the same packed and padded; d is the width. It is
    read from what `model`'s forward is called with (`cu_seq_lens_q` of a packed batch, else `attention_mask`), so
    `model` is the outermost one that is prepared, PEFT's included. The noise comes from the device's global
    generator: ranks must be seeded apart for it to differ.
    """
    if not alpha:
        return
    lengths: list[torch.Tensor] = []

    def remember_lengths(module: nn.Module, args: tuple, kwargs: dict) -> None:
        lengths.clear()
        if (boundaries := kwargs.get("cu_seq_lens_q")) is not None:
            documents = boundaries.diff()
            tokens = kwargs["input_ids"].shape[-1]
            lengths.append(documents.repeat_interleave(documents, output_size=tokens)[None, :, None])
        elif (mask := kwargs.get("attention_mask")) is not None:
            lengths.append(mask.sum(-1)[:, None, None])

    def add_noise(module: nn.Module, args: tuple, embedded: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embedded
        tokens, width = embedded.shape[-2:]
        length = lengths[0].clamp(min=1) if lengths else torch.tensor(tokens)
        bound = alpha * (length * width).float().rsqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * bound.to(embedded.dtype)

    model.register_forward_pre_hook(remember_lengths, with_kwargs=True)
    model.get_input_embeddings().register_forward_hook(add_noise)  # type: ignore[operator]
