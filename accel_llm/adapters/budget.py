"""AdaLoRA's budget (arXiv 2303.10512): of the ranks that all layers begin with, the less important ones are given up.

The rule and its schedule are PEFT's `AdaLoraModel.update_and_allocate`. PEFT calls it nowhere, keeps the averages by
which ranks are compared in no state_dict, and works on whole tensors. Here it runs after each step of the optimizer,
and the averages lie in the optimizer's state: checkpoints find them there, and a shard has its own part of them.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import accel_llm.system.chatter

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch.distributed.tensor import DTensor, Partial, Replicate

from accel_llm.backend.accelerator import local_part
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError
from accel_llm.system.launcher import process_rank

# Fields of LoraConfig that PEFT 0.21 reads for AdaLoRA; it ignores the others, which AdaLoraConfig inherits.
SHARED_FIELDS = {
    "bias", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "target_modules", "trainable_token_indices",
}  # fmt: skip
IGNORED_FIELDS = {field.name for field in fields(LoraConfig)} - SHARED_FIELDS
# Shares of a run: how long all ranks are kept, and how long the ranks that are left train alone. The settings of the
# paper's GLUE runs (appendix, 8 tasks) are 9% to 18% and 44% to 58% of their steps.
FIRST_SHARE, LAST_SHARE = 1 / 8, 1 / 2
ALLOCATIONS = 1000  # per run, at most; the paper's intervals are 1 to 100 steps of 3,000 to 90,000
# Names in the optimizer's state: the averages of each weight, and 1 for each rank that was kept, 0 for the others.
IMPORTANCE, UNCERTAINTY, KEPT = "importance", "uncertainty", "kept"


def unused_options(options: MethodOptions) -> list[str]:
    """Return a sentence for each of AdaLoRA's `method_options` that would be ignored, or that follows from the run."""
    if options.method != "adalora":
        return []
    problems = [
        f"method_options: adalora does not use {name}, which is an option of lora; remove it."
        for name in options.method_options
        if name in IGNORED_FIELDS
    ]
    if "total_step" in options.method_options:
        problems.append("method_options: total_step is the number of steps of the run; remove it, or set max_steps.")
    if "rank_pattern" in options.method_options:
        problems.append("method_options: rank_pattern is what adalora finds out in the run; remove it.")
    return problems


def budget_problems(config: Any) -> list[str]:
    """Return what is wrong with the numbers in AdaLoRA's config; nothing for the config of another method."""
    if not isinstance(config, AdaLoraConfig):
        return []
    problems = []
    if not 0 < config.target_r < config.init_r:
        problems.append(
            f"method_options: target_r {config.target_r} must be at least 1 and less than init_r, which is "
            f"{config.init_r}: adalora begins with init_r ranks in each layer and ends with target_r on average."
        )
    problems += [
        f"method_options: {name} {getattr(config, name)} is not allowed; give at least {least}."
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1))
        if getattr(config, name) < least
    ]
    problems += [
        f"method_options: {name} {getattr(config, name)} is not allowed; give a number between 0 and 1."
        for name in ("beta1", "beta2")
        if not 0 < getattr(config, name) < 1
    ]
    return problems


def set_schedule(config: Any, options: MethodOptions, total_steps: int) -> None:
    """Write the steps of a run, and AdaLoRA's phases in it, into PEFT's config; nothing for another method.

    Phases that the options do not set are shares of the run.

    Raises:
        ConfigError: no step is left in which ranks could be given up.
    """
    if not isinstance(config, AdaLoraConfig):
        return
    phases = {
        "tinit": int(total_steps * FIRST_SHARE),
        "tfinal": int(total_steps * LAST_SHARE),
        "deltaT": max(1, total_steps // ALLOCATIONS),
    }
    for name, value in phases.items():
        if name not in options.method_options:
            setattr(config, name, value)
    config.total_step = total_steps
    if config.tinit >= total_steps - config.tfinal:
        raise ConfigError(
            f"method_options: of the {total_steps} steps of this run tinit {config.tinit} and tfinal {config.tfinal} "
            "leave none in which adalora gives up ranks; lower one of them, or train longer."
        )


def budget_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the two averages, float32, of each weight of AdaLoRA; 0 for another method."""
    return sum(2 * 4 * weight.numel() for layer in _layers(model) for weight in _weights(layer))


def follow_budget(model: Any, options: MethodOptions, optimizer: Any, scheduler: Any, total_steps: int) -> None:
    """Let AdaLoRA give up ranks after the steps of `optimizer`; nothing for another method."""
    if options.has_adapter and has_budget(model):
        RankBudget(model, options, optimizer, scheduler, total_steps)


class RankBudget:
    """Follows AdaLoRA's schedule: measures how important each rank is, and gives up the least important ones.

    `model` is the adapted model, before or after it is sharded. The optimizer calls `after_step` when it has stepped, so
    a step that is skipped measures nothing; the schedule goes on, like that of the learning rate.
    """

    def __init__(
        self,
        model: Any,
        options: MethodOptions,
        optimizer: torch.optim.Optimizer,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        total_steps: int,
    ):
        self.config, self.allocator = model.peft_config["default"], model.base_model.rankallocator
        set_schedule(self.config, options, total_steps)
        self.layers, self.scheduler = _layers(model), scheduler
        self.state: dict[Any, dict[str, Any]] = {}  # the optimizer's; `prepare` gives it another one
        optimizer.register_step_post_hook(self.after_step)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Do what PEFT's `update_and_allocate` does after a step; the gradients are still those of the step."""
        self.state = optimizer.state
        values = [layer.lora_E["default"] for layer in self.layers]
        if KEPT in self.state[values[0]]:
            # The last phase. The optimizer's momentum has moved the ranks that were given up.
            for value in values:
                local_part(value).mul_(local_part(self.state[value][KEPT]))
            return
        step, last = self.scheduler.last_epoch + 1, self.config.total_step - self.config.tfinal
        if step < last or IMPORTANCE not in self.state[values[0]]:  # also in a run of one or two steps
            self._measure_importance()
        budget, due = self.allocator.budget_schedule(min(step, last))
        if due or step >= last:
            self._allocate(values, budget, step >= last)

    def _measure_importance(self) -> None:
        """Take a step into the averages of |weight x gradient| and of its distance to this average (formulas 8 to 10)."""
        weights = [weight for layer in self.layers for weight in _weights(layer)]
        for weight in weights:
            if IMPORTANCE not in self.state[weight]:
                self.state[weight] |= {IMPORTANCE: torch.zeros_like(weight), UNCERTAINTY: torch.zeros_like(weight)}
        # A weight that took no part in the step, such as that of an expert without tokens, has no gradient.
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        importance, uncertainty = ([self.state[w][name] for w in weights] for name in (IMPORTANCE, UNCERTAINTY))
        for parts in zip(weights, gradients, importance, uncertainty, strict=True):
            weight, gradient, average, distance = map(local_part, parts)
            sensitivity = (weight * gradient).abs()
            average.mul_(self.config.beta1).add_(sensitivity, alpha=1 - self.config.beta1)
            distance.mul_(self.config.beta2).add_((sensitivity - average).abs(), alpha=1 - self.config.beta2)

    def _allocate(self, values: list[Any], budget: int, final: bool) -> None:
        """Set all singular values to 0 but those of the `budget` most important ranks; in the end this stays so."""
        scores = [self._scores(*_weights(layer)) for layer in self.layers]
        # PEFT's rule: all scores up to this one are given up, with equal ones more of them.
        threshold = torch.cat(scores).sort().values[self.allocator.init_bgt - budget - 1]
        kept = [score > threshold for score in scores]
        for value, flags in zip(values, kept, strict=True):
            mask = _sharded_like(value, flags.to(value.dtype)[:, None])
            local_part(value).mul_(local_part(mask))
            if final:
                self.state[value][KEPT] = mask
        if final:
            for weight in (weight for layer in self.layers for weight in _weights(layer)):
                self.state[weight].pop(IMPORTANCE, None)
                self.state[weight].pop(UNCERTAINTY, None)
            if process_rank() == 0:
                ranks = [int(flags.sum()) for flags in kept]
                print(
                    f"adalora: {sum(ranks)} of {self.allocator.init_bgt} ranks are kept, {min(ranks)} to {max(ranks)} in "
                    "a layer",
                    flush=True,
                )

    def _scores(self, a: Any, b: Any, e: Any) -> torch.Tensor:
        """Return the importance [r] of the ranks of a layer, the same on all processes (formula 7)."""
        a, b, e = (_whole(self.state[w][IMPORTANCE] * self.state[w][UNCERTAINTY]) for w in (a, b, e))
        return e[:, 0] + (a.mean(1) + b.mean(0))


def _layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, AdaLoraLayer)]


def _weights(layer: Any) -> tuple[Any, Any, Any]:
    """Return A [r, in], B [out, r] and E [r, 1] of a layer, which adds B (E A) x."""
    return layer.lora_A["default"], layer.lora_B["default"], layer.lora_E["default"]


def _whole(weight: Any) -> torch.Tensor:
    """Return the whole of a weight, of which FSDP2 gives each process some rows; its gradient is averaged like theirs."""
    if not isinstance(weight, DTensor):
        # FSDP2 may leave a layer whole behind its forward, and then in 16 bits.
        return weight.to(torch.promote_types(weight.dtype, torch.float32))
    whole: Any = weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / weight.device_mesh.size())
    return whole


def _sharded_like(tensor: Any, whole: torch.Tensor) -> torch.Tensor:
    """Return `whole`, which each process has, as `tensor` is: FSDP2 gives each process some rows of it."""
    if not isinstance(tensor, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, tensor.device_mesh, [Replicate()], run_check=False)
    return everywhere.redistribute(placements=tensor.placements)


def has_budget(model: PeftModel) -> bool:
    """Return whether the adapter of a model is an AdaLoRA."""
    return isinstance(model.peft_config["default"], AdaLoraConfig)


def fill_ranks(model: PeftModel) -> None:
    """Give the AdaLoRA weights of an empty model a place: PEFT 0.21 picks ranks out of them before it loads a file."""
    for layer in _layers(model):
        for weights in (layer.lora_A, layer.lora_B, layer.lora_E):
            weights["default"] = torch.nn.Parameter(torch.zeros(weights["default"].shape))


def note_kept_ranks(model: PeftModel, state: dict[str, torch.Tensor]) -> None:
    """Write into AdaLoRA's config which ranks an export of the weights `state`, by name, has; PEFT leaves out the others.

    Those whose singular value is 0 change nothing. The weights themselves tell it, because they need not be the last
    ones of a run: the best ones may be of a step at which other ranks were in use.
    """
    if has_budget(model):
        config: Any = model.peft_config["default"]
        config.rank_pattern = {
            name.removeprefix("base_model.model.").removesuffix(".default"): (weight.view(-1) != 0).tolist()
            for name, weight in state.items()
            if name.endswith(".lora_E.default")
        }


def weigh_penalty(model: PeftModel) -> None:
    """Let AdaLoRA's penalty, which keeps A and B orthogonal, count once a step, and in training only.

    PEFT adds it to each loss, for a mean. `next_token_loss` is a sum, which the training loop divides by the weight of
    the whole step. So the penalty is multiplied by the micro-batch's `total_weight`, however the step is cut.
    """
    if has_budget(model):
        tuner: Any = model.base_model
        tuner.forward = partial(_forward_with_penalty, tuner, _layers(model))


def _forward_with_penalty(tuner: Any, layers: list[Any], *args: Any, **kwargs: Any) -> Any:
    output, targets = tuner.model.forward(*args, **kwargs), kwargs.get("targets")
    if tuner.training and targets:
        weight, penalty = tuner.peft_config["default"].orth_reg_weight, _penalty(layers)
        # The loss of answers and of scores is computed later, and adds this once for a unit.
        if "answer_ids" in targets or "places" in targets:
            balance = getattr(output, "balance", None)
            output.balance = weight * penalty + (0.0 if balance is None else balance)
        else:
            output.loss = output.loss + weight * targets["total_weight"] * penalty
    return output


def _penalty(layers: list[Any]) -> torch.Tensor:
    """Return the mean over all A and B of the norms of A A' - I and B' B - I, float32 (formula 4, as PEFT has it)."""
    distances = []
    # Autocast would compute the small differences in 16 bits.
    with torch.autocast(layers[0].lora_A["default"].device.type, enabled=False):
        for layer in layers:
            a, b = _whole(layer.lora_A["default"]), _whole(layer.lora_B["default"])
            for product in (a @ a.T, b.T @ b):
                identity = torch.eye(len(product), dtype=product.dtype, device=product.device)
                distances.append(torch.linalg.vector_norm(product - identity))
    return torch.stack(distances).mean()
