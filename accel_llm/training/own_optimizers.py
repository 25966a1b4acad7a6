"""Optimizers written here: AdamW with stochastic rounding, and Muon with AdamW."""

from collections.abc import Callable

import torch
from torch import nn

from accel_llm.backend.accelerator import local_part


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
        weight, gradient, mean, square = map(
            local_part, (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        )
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
        weight.copy_(round_at_random(updated, generator))


def round_at_random(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """float32 `values` as bfloat16, each one of its two neighbours there, the nearer the likelier; the mean is `values`."""
    # bfloat16 is the upper half of a float32: what the lower half adds to a random number carries over, or does not.
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for the hidden matrices, AdamW for vectors, embeddings, output head and stacked experts, as one optimizer.

    Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so both take the same learning rate.
    """

    def __init__(self, model: nn.Module, groups: list[dict], betas: tuple[float, float], eps: float):
        apart = embedding_parameters(model)

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


def embedding_parameters(model: nn.Module) -> set[int]:
    """Identities of the weights of embeddings and of the output head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {id(parameter) for module in [*tables, *([head] if head else [])] for parameter in module.parameters()}
