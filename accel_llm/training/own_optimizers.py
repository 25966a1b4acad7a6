"""Optimizers of this project: AdamW with stochastic rounding, and Muon together with AdamW."""

from collections.abc import Callable

import torch
from torch import nn

from accel_llm.backend.accelerator import local_part

# So many weights `RoundedAdamW` steps at once: beside them, their gradients and moments it takes less than 300 MiB.
PIECE_SIZE = 2**24


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW for bfloat16 weights without float32 copies of them.

    Each step is computed in float32 and then rounded up or down at random, so that its mean is the exact step
    (stochastic rounding, Gupta et al. 2015, arXiv 1502.02551). The moments are float32.

    The random numbers depend only on the seed, the step and the position of the weight. So copies of a weight on
    several ranks stay equal, and a resumed run draws what the interrupted one would have drawn. A large weight is
    stepped in pieces, which draw one after the other.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float], eps: float, seed: int):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        position = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                position += 1
                if parameter.grad is not None:
                    self._update(group, parameter, position)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # torch 2.13 casts the moments to bfloat16, the dtype of their weight: take them again from `state_dict`.
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, parameters, strict=True):
            if key not in state_dict["state"]:
                continue
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[parameter][name] = state_dict["state"][key][name].to(parameter.device, copy=True)

    def _update(self, group: dict, parameter: nn.Parameter, position: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter, dtype=torch.float32) for _ in range(2))
        state["step"] += 1
        tensors = [local_part(t) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]

        # Rounding: shards of a weight need different random numbers, copies of it the same.
        generator = torch.Generator(tensors[0].device)
        shard = torch.distributed.get_rank() if tensors[0] is not parameter else 0
        # `hash` of integers is the same in every process; Python adds a random key for texts only.
        generator.manual_seed(hash((self.seed, state["step"], position, shard)) & (2**63 - 1))
        for pieces in zip(*map(_split_into_pieces, tensors), strict=True):
            _step_rounded(group, state["step"], generator, *pieces)


def _split_into_pieces(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a tensor along its first dimension into views of at most PIECE_SIZE numbers, or of one row."""
    tensor = torch.atleast_1d(tensor)
    return tensor.split(max(1, PIECE_SIZE // max(1, tensor.shape[1:].numel())))


def _step_rounded(
    group: dict,
    step: int,
    generator: torch.Generator,
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
) -> None:
    """Change a weight and its moments by one step of AdamW (arXiv 1711.05101), which is computed in float32."""
    beta1, beta2 = group["betas"]
    gradient = gradient.float()
    mean.lerp_(gradient, 1 - beta1)
    square.lerp_(gradient.square(), 1 - beta2)
    updated = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
    step_size = group["lr"] / (1 - beta1**step)
    updated.addcdiv_(mean, (square / (1 - beta2**step)).sqrt_().add_(group["eps"]), value=-step_size)
    weight.copy_(round_stochastically(updated, generator))


def round_stochastically(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round float32 `values` to bfloat16, up or down at random. The nearer one is likelier: the mean stays `values`."""
    # bfloat16 is the upper 16 bits of a float32. Random lower 16 bits are added: the sum carries into the upper ones
    # with a probability equal to the fraction that rounding would drop. Then the lower bits are cleared.
    noise = torch.randint(2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer that steps hidden matrices with Muon, and vectors, embeddings, output head and experts with AdamW.

    Muon's step is scaled to the root mean square of AdamW's (arXiv 2502.16982), so both use the same learning rate.
    Stacked experts are tensors of three dimensions, which Muon does not take.
    """

    def __init__(self, model: nn.Module, groups: list[dict], betas: tuple[float, float], eps: float):
        embedding_ids = embedding_weight_ids(model)

        def is_for_muon(parameter: nn.Parameter) -> bool:
            return parameter.ndim == 2 and not is_vector(parameter) and id(parameter) not in embedding_ids

        matrices = _filter_groups(groups, is_for_muon)
        others = _filter_groups(groups, lambda parameter: not is_for_muon(parameter))

        # Each inner optimizer, and the slice of all groups that it steps.
        self.parts: list[tuple[torch.optim.Optimizer, slice]] = []
        if matrices:
            muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw")
            self.parts.append((muon, slice(0, len(matrices))))
        if others:
            self.parts.append((torch.optim.AdamW(others, betas=betas, eps=eps), slice(len(matrices), None)))
        super().__init__([group for part, _ in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        # Loading a state, and FSDP2 when it shards, replace groups, state and parameters: pass them on in every step.
        for part, groups in self.parts:
            part.param_groups, part.state = self.param_groups[groups], self.state
            part.step()


def _filter_groups(groups: list[dict], condition: Callable[[nn.Parameter], bool]) -> list[dict]:
    """Return the groups with only those parameters that meet the condition, without groups that are empty then."""
    filtered = [{**group, "params": [p for p in group["params"] if condition(p)]} for group in groups]
    return [group for group in filtered if group["params"]]


def is_vector(parameter: nn.Parameter) -> bool:
    """Return whether at most one dimension is longer than 1, as in (IA)3's scales [1, n]."""
    # Under ZeRO-3 a parameter is an empty vector; DeepSpeed keeps its shape in `ds_shape`.
    return sum(size > 1 for size in getattr(parameter, "ds_shape", parameter.shape)) <= 1


def embedding_weight_ids(model: nn.Module) -> set[int]:
    """Return the `id` of each weight of an embedding or of the output head."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {id(parameter) for module in [*tables, *([head] if head else [])] for parameter in module.parameters()}
