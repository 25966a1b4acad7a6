"""Takes the optimizer and the scheduler that a DeepSpeed configuration names into the terms of the recipe.

Other trainers let such a file decide them. Here they are options, so the file's values become options before the run
begins. "auto" leaves a value to the recipe. A value that the recipe or a flag contradicts is an error.
"""

from typing import Any, TypeVar

from pydantic import ValidationError

from accel_llm.backend.zero import deepspeed_settings
from accel_llm.config.options import TrainOptions
from accel_llm.errors import raise_problems
from accel_llm.system.launcher import launcher_flag, process_rank

_TrainOptionsT = TypeVar("_TrainOptionsT", bound=TrainOptions)
_Values = dict[str, tuple[str, Any]]  # by option: where the file says it, and the value

# DeepSpeed's Adam decays as AdamW does, unless `adam_w_mode` is false.
_OPTIMIZERS = {"adamw": "adamw", "adam": "adamw", "lion": "lion", "muon": "muon", "sgd": "sgd"}
_OPTIMIZER_OPTIONS = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
# Keys with the only value under which the optimizer is ours; those of the second kind change nothing.
_OPTIMIZER_FIXED = {"adam_w_mode": True, "bias_correction": True, "amsgrad": False, "max_grad_norm": 0.0}
_OPTIMIZER_HARMLESS = ("torch_adam", "fused", "freeze_step", "cuda_aware", "comm_backend_name")
_SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine_with_min_lr"}
_SCHEDULE_OPTIONS = {
    "warmup_max_lr": "learning_rate",
    "warmup_num_steps": "warmup_steps",
    "cos_min_ratio": "min_lr_rate",
}
_SCHEDULE_FIXED = {"warmup_min_lr": 0.0, "warmup_min_ratio": 0.0, "last_batch_iteration": -1}
_COSINE_FLOOR = 0.0001  # DeepSpeed 0.19's default of cos_min_ratio


def take_optimizer_and_schedule(options: _TrainOptionsT) -> _TrainOptionsT:
    """Return the options with those that the DeepSpeed configuration of the launch YAML sets, and say which.

    Raises:
        ConfigError: the file names an optimizer or a schedule that is not here, or a value that the user contradicts.
    """
    if not launcher_flag("ACCELERATE_USE_DEEPSPEED"):
        return options
    settings = deepspeed_settings()
    values, problems = _optimizer_values(settings.get("optimizer") or {})
    schedule, others = _schedule_values(settings.get("scheduler") or {})
    problems += others
    for name, (key, value) in schedule.items():
        if name in values and values[name][1] != value:
            first, other = values[name]
            problems.append(
                f"{key}: the DeepSpeed configuration says {value!r}, but {first} there says {other!r}; correct one."
            )
    values = schedule | values
    raise_problems(problems + _wrong_values(options, values) + _contradictions(options, values))
    updates = {name: value for name, (_, value) in values.items() if name not in options.model_fields_set}
    if not updates:
        return options
    checked = type(options).model_validate(updates)
    copy = options.model_copy(update={name: getattr(checked, name) for name in updates})
    raise_problems(copy.problems())
    if process_rank() == 0:
        taken = ", ".join(f"{name}={getattr(copy, name)}" for name in updates)
        print(f"taken from the DeepSpeed configuration: {taken}", flush=True)
        if settings.get("scheduler") and _parameters(settings["scheduler"]).get("warmup_type") is None:
            print("scheduler: the warmup is linear; DeepSpeed's own default is logarithmic", flush=True)
    return copy


def _parameters(block: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a block that are not left to the recipe."""
    return {key: value for key, value in (block.get("params") or {}).items() if value not in ("auto", None)}


def _optimizer_values(block: dict[str, Any]) -> tuple[_Values, list[str]]:
    if not block:
        return {}, []
    kind, where = str(block.get("type", "")), "optimizer.params."
    ours = _OPTIMIZERS.get(kind.lower())
    if ours is None:
        return {}, [_absent("optimizer.type", kind, "AdamW, Adam, Lion, Muon or SGD", "optim")]
    values: _Values = {"optim": ("optimizer.type", ours)}
    parameters = _parameters(block)
    betas = parameters.pop("betas", None)
    if isinstance(betas, list) and len(betas) == 2:
        values |= {f"adam_beta{k + 1}": (f"{where}betas", beta) for k, beta in enumerate(betas)}
    elif betas is not None:
        parameters["betas"] = betas
    problems = _sort(parameters, values, where, _OPTIMIZER_OPTIONS, _OPTIMIZER_FIXED, _OPTIMIZER_HARMLESS)
    return values, problems


def _schedule_values(block: dict[str, Any]) -> tuple[_Values, list[str]]:
    if not block:
        return {}, []
    kind, where = str(block.get("type", "")), "scheduler.params."
    ours = _SCHEDULES.get(kind)
    if ours is None:
        return {}, [_absent("scheduler.type", kind, " or ".join(_SCHEDULES), "lr_scheduler_type")]
    values: _Values = {"lr_scheduler_type": ("scheduler.type", ours)}
    parameters = _parameters(block)
    if ours == "cosine_with_min_lr":
        values["min_lr_rate"] = (f"{where}cos_min_ratio", parameters.pop("cos_min_ratio", _COSINE_FLOOR))
    problems = _sort(parameters, values, where, _SCHEDULE_OPTIONS, _SCHEDULE_FIXED | {"warmup_type": "linear"}, ())
    if "total_num_steps" in parameters:
        problems = [problem for problem in problems if "total_num_steps" not in problem]
        values["max_steps"] = (f"{where}total_num_steps", parameters["total_num_steps"])
    return values, problems


def _sort(
    parameters: dict[str, Any],
    values: _Values,
    where: str,
    options: dict[str, str],
    fixed: dict[str, Any],
    harmless: tuple[str, ...],
) -> list[str]:
    """Put the parameters that are options into `values`; return a sentence for each one that cannot be in force."""
    problems = []
    for key, value in parameters.items():
        if key in options:
            values[options[key]] = (where + key, value)
        elif key in fixed and value != fixed[key]:
            problems.append(
                f"{where}{key}: the DeepSpeed configuration says {value!r}, but only {fixed[key]!r} is supported."
            )
        elif key not in fixed and key not in harmless:
            problems.append(f"{where}{key}: no option means the same, so nothing would follow from it; remove it.")
    return problems


def _absent(key: str, kind: str, allowed: str, option: str) -> str:
    return (
        f"{key}: the DeepSpeed configuration says {kind!r}, which is not here; give {allowed}, or remove the block and "
        f"use {option} in the recipe."
    )


def _wrong_values(options: TrainOptions, values: _Values) -> list[str]:
    """Return a sentence for each value that its option does not allow."""
    try:
        type(options).model_validate({name: value for name, (_, value) in values.items()})
    except ValidationError as error:
        wrong = {str(item["loc"][0]): item for item in error.errors() if item["loc"]}
        return [
            f"{values[name][0]}: the DeepSpeed configuration says {values[name][1]!r}, which {name} does not allow "
            f"({item['msg']})."
            for name, item in wrong.items()
            if name in values
        ]
    return []


def _contradictions(options: TrainOptions, values: _Values) -> list[str]:
    """Return a sentence for each option that the user has set to another value than the file."""
    return [
        f"{key}: the DeepSpeed configuration says {value!r}, but {name} is {getattr(options, name)!r} in the recipe or "
        'on the command line; remove one of them, or write "auto" in the configuration.'
        for name, (key, value) in values.items()
        if name in options.model_fields_set and getattr(options, name) != value
    ]
