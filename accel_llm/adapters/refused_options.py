"""Options that PEFT's config classes have and that are refused here: they change nothing, or spoil the result.

tests/adapters/test_refused_options.py shows for each of the former that it still changes nothing.
"""

import json
from dataclasses import MISSING, fields
from typing import Any

import accel_llm.system.chatter

from peft import PeftConfig

from accel_llm.config.options import MethodOptions

LEAVES_LAYERS_OUT = "a layer that is left out in a step has no gradient, for which other processes wait"
NO_CONVOLUTIONS = "it is for convolutions, which are not adapted here"
# Options that would make a result wrong or unusable if they had another value than PEFT's default, and why.
REFUSED_OPTIONS = {
    "adamss.use_asa": "PEFT freezes weights in the middle of the run, which DDP, FSDP2 and checkpoints do not expect",
    "boft.boft_n_butterfly_factor": "PEFT 0.21 takes 1 wherever it cannot compile its CUDA extension",
    "frod.runtime_offload_base_weight": "the base's weights would move in the middle of a step",
    "hra.apply_GS": "PEFT 0.21 begins with pairs of equal columns, and to make them orthogonal gives NaN",
    "loha.module_dropout": LEAVES_LAYERS_OUT,
    "lokr.module_dropout": LEAVES_LAYERS_OUT,
    "oft.coft": "PEFT changes the weights in the forward pass, which DeepSpeed, FSDP2 and checkpoints do not see",
    "pvera.generator_seed": "no checkpoint has the state of its generator, and seed sets the noise too",
    "pvera.init_weights": "PEFT 0.21 then draws variances so large that their noise is infinite",
    "vblora.save_only_topk_weights": "the file would lack weights that further training needs",
}
# Those of them that do not matter once the weights are there: an adapter that was made with them is trained further.
FIRST_VALUES_ALONE = ("hra.apply_GS", "pvera.init_weights")
# Options beside dropout that have no part in an adapter's weights and in what it computes when it is used.
OF_TRAINING = ("generator_seed", "runtime_offload_base_weight")
# Options that change nothing, whatever the others are, and why. The first one is an option of many methods.
WITHOUT_EFFECT = {
    "fan_in_fan_out": "PEFT itself sees how a layer stores its weight",
    "hira.rank_pattern": "PEFT 0.21 gives every layer the rank r",
    "loha.use_effective_conv2d": NO_CONVOLUTIONS,
    "lokr.use_effective_conv2d": NO_CONVOLUTIONS,
    "oft.eps": "only coft reads it, which is refused",
    "oft.module_dropout": "PEFT 0.21 builds the dropout and never calls it",
    "osf.target_svd_config": "PEFT 0.21 never reads it",
}
# Options that change nothing unless another option has one of these values; `...` is any value but 0 and none.
EFFECTIVE_WITH: dict[str, tuple[str, tuple[Any, ...]]] = {
    "deft.init_scale": ("init_weights", (False,)),
    "lokr.rank_dropout_scale": ("rank_dropout", (...,)),
    "miss.mini_r": ("init_weights", ("mini",)),
    "oft.num_cayley_neumann_terms": ("use_cayley_neumann", (True,)),
    "psoft.use_cayley_neumann": ("psoft_orth", (True,)),
    "psoft.random_seed": ("psoft_svd", ("lowrank",)),
    "supertuning.lora_dropout": ("r", (...,)),
    "randlora.sparse": ("very_sparse", (False,)),
    "tinylora.init_v_bound": ("init_weights", ("uniform",)),
    "vera.d_initial": ("init_weights", (True,)),
    "waveft.n_frequency_pattern": ("proportional_parameters", (False,)),
    "waveft.wavelet_family": ("use_idwt", (True,)),
}


def may_differ(name: str) -> bool:
    """Return whether an option of an earlier adapter may have another value when it is trained further."""
    return "dropout" in name or name in OF_TRAINING


def refused_option_problems(options: MethodOptions, config_class: type[PeftConfig]) -> list[str]:
    """Return a sentence for each of `method_options` that would spoil the result, or change nothing.

    What an earlier adapter was made with (`adapter_name_or_path`) may have no effect: it is in that adapter's file.
    """
    defaults = {field.name: field.default if field.default is not MISSING else None for field in fields(config_class)}
    changed = [name for name, value in options.method_options.items() if name in defaults and value != defaults[name]]
    problems = [
        f"method_options: {name} of method {options.method} cannot be used: {reason}; "
        f"{_remedy(options, name, defaults[name])}."
        for name in changed
        if (reason := REFUSED_OPTIONS.get(f"{options.method}.{name}"))
        and (options.adapter_name_or_path is None or f"{options.method}.{name}" not in FIRST_VALUES_ALONE)
    ]
    if options.adapter_name_or_path is not None:
        changed = [name for name in changed if name == "fan_in_fan_out"]  # not taken from the file, see adopt.py
    problems += [
        f"method_options: {name} of method {options.method} has no effect: {reason}; leave it out."
        for name in changed
        if (reason := _without_effect(options.method, name))
    ]
    for name in changed:
        other, values = EFFECTIVE_WITH.get(f"{options.method}.{name}", ("", (...,)))
        value = options.method_options.get(other, defaults.get(other))
        if other and value not in values and not (... in values and value):
            wanted = " or ".join("a value" if v is ... else str(v).lower() for v in values)
            problems.append(
                f"method_options: {name} of method {options.method} has no effect unless {other} has {wanted}; set that, "
                "or leave it out."
            )
    return problems


def _remedy(options: MethodOptions, name: str, default: Any) -> str:
    """Return what to do about an option of the method that is refused unless it has its default value."""
    adapter = options.adapter_name_or_path
    if adapter is None:
        return "leave it out"
    if may_differ(name):
        return f"write --method_options {name}={json.dumps(default)}, whatever the adapter {adapter} was made with"
    return f"the adapter {adapter} was made with it, so merge it (launch/merge.py) and train a new one on the result"


def _without_effect(method: str, name: str) -> str | None:
    return WITHOUT_EFFECT.get(name) or WITHOUT_EFFECT.get(f"{method}.{name}")


def is_refused(method: str, name: str) -> bool:
    """Return whether an option of a method of PEFT is always refused."""
    return f"{method}.{name}" in REFUSED_OPTIONS or _without_effect(method, name) is not None
