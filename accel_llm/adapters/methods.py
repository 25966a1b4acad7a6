"""The methods by name: which class of the installed PEFT each one is, what it cannot do, and its config."""

import sys
import warnings
from difflib import get_close_matches
from typing import Any

import accel_llm.system.chatter

from peft import PeftConfig, PeftType, PromptLearningConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from accel_llm.adapters.budget import IGNORED_FIELDS, budget_problems, unused_options
from accel_llm.adapters.lora_options import INIT_ROWS, REFUSED_FIELDS, complete_fields, lora_problems
from accel_llm.adapters.method_options import check_method_options, option_names
from accel_llm.adapters.partial import check_partial_options
from accel_llm.adapters.prompt_options import prompt_problems
from accel_llm.adapters.refused_options import is_refused, refused_option_problems
from accel_llm.config.method import METHODS_BY_OPTION, METHODS_WITHOUT_ADAPTER, PROMPT_METHODS
from accel_llm.config.options import MethodOptions, ModelOptions, TrainOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.classifier import HEAD
from accel_llm.model.loading import short_reason

# Methods whose names here are not PEFT's. P-tuning v2 is prefix tuning without the network that computes the prefixes.
PEFT_TYPES = {"qlora": "LORA", "prefix": "PREFIX_TUNING", "p_tuning_v2": "PREFIX_TUNING", "prompt": "PROMPT_TUNING"}
# Methods of PEFT that need more than a model and rows, and what they need.
REFUSED_METHODS = {
    "xlora": "it mixes adapters that were trained before",
    "poly": "each row must name its task (task_ids)",
    "multitask_prompt_tuning": "each row must name its task (task_ids)",
    "cpt": "it needs the tokens of a context with a type for each (cpt_token_ids), and has a loss of its own",
    "cartridge": "its first keys and values are those of a long text, which PEFT reads outside of training",
    "adaption_prompt": "PEFT's code replaces the attention of some families, so packed rows cannot be kept apart",
    "lily": "PEFT mixes its matrices by the average over all tokens of a batch, later tokens and other rows included, so a "
    "token would see what it has to predict",
    "shadow": "it trains a second network beside the model, with a loss of its own that PEFT computes outside the model",
}
# Options that say the same in two ways; PEFT takes one of them, and the other must be 0.
ALTERNATIVES = {"oft": {"r": "oft_block_size"}, "boft": {"boft_block_num": "boft_block_size"}}
# Options with flat names, and the fields of PEFT's config that they set.
FLAT_OPTIONS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_bias": "bias",
    "lora_target_modules": "target_modules",
    "modules_to_save": "modules_to_save",
    "init_lora_weights": "init_lora_weights",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
LORA_METHODS = ("lora", "qlora")
# Kinds of LoRA that people call by a name of their own, and how they are set.
LORA_VARIANTS = {
    "dora": "--method lora --use_dora",
    "qdora": "--method qlora --use_dora",
    "rslora": "--method lora --use_rslora",
    **{name: f"--method lora --init_lora_weights {name}" for name in ("pissa", "olora", "eva", "corda", "lora_ga")},
    "loftq": "--method qlora --init_lora_weights loftq",
    "lora+": "--method lora --loraplus_lr_ratio 16",
}
# What AdaLoRA takes of LoRA's flat options; its ranks are init_r and target_r.
ADALORA_OPTIONS = ("lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "modules_to_save")


def peft_methods() -> list[str]:
    """Return the names of all methods that train an adapter with the installed PEFT."""
    kinds = {PeftType(kind).value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return sorted((kinds - {"prefix_tuning", "prompt_tuning"}) | PEFT_TYPES.keys())


def config_class_of(method: str) -> type[PeftConfig]:
    """Return PEFT's config class of a method.

    Raises:
        ConfigError: the installed PEFT has no such method.
    """
    kind = PEFT_TYPES.get(method, method.upper())
    try:
        return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    except (ValueError, KeyError):
        names = [*METHODS_WITHOUT_ADAPTER, *(name for name in peft_methods() if name not in REFUSED_METHODS)]
        guess = get_close_matches(method, names, 1)
        hint = f"did you mean {guess[0]}? " if guess else ""
        if method in LORA_VARIANTS:
            raise ConfigError(f"method: {method!r} is lora with an option; write {LORA_VARIANTS[method]}.") from None
        raise ConfigError(f"method: {method!r} is unknown; {hint}Allowed are {', '.join(names)}.") from None


def check_method(options: MethodOptions) -> None:
    """Check the method and its options, before anything is read.

    Raises:
        ConfigError: the installed PEFT has no such method, it needs more than a model and rows, or an option is not its.
    """
    if not options.has_adapter:
        return check_partial_options(options)
    config_class = config_class_of(options.method)
    _check_purpose(options, config_class)
    problems = _misplaced_options(options, config_class) + refused_option_problems(options, config_class)
    if options.method == "trainable_tokens" and not options.method_options.get("token_indices"):
        problems.append("method_options: method trainable_tokens needs token_indices, the ids of the tokens to train.")
    problems += unused_options(options)
    if options.method in LORA_METHODS:
        problems += lora_problems(options)
    if options.method in PROMPT_METHODS:
        problems += prompt_problems(options)
    raise_problems(problems)
    raise_problems(budget_problems(fresh_adapter_config(options)))


def _check_purpose(options: MethodOptions, config_class: type[PeftConfig]) -> None:
    """Check that the method trains something here that can be kept.

    Raises:
        ConfigError: it does not.
    """
    if isinstance(options, PretrainOptions) and options.config_name:
        raise ConfigError(
            f"method: {options.method} trains an adapter beside random weights, which nothing keeps, so it would fit no "
            "model; use method full, or give model_name_or_path."
        )
    reason = REFUSED_METHODS.get(options.method)
    if issubclass(config_class, PromptLearningConfig) and options.method not in PROMPT_METHODS:
        reason = reason or "only PEFT's own code knows where its virtual tokens go"
    if options.gives_scores and "modules_to_save" not in option_names(config_class):
        reason = reason or "the file of such an adapter has no place for the head that gives scores"
    if reason:
        raise ConfigError(f"method: {options.method} cannot be trained here: {reason}; give another method.")


def _misplaced_options(options: MethodOptions, config_class: type[PeftConfig]) -> list[str]:
    """Return a sentence for each option with a flat name that is not for the method, or is among `method_options`."""
    names = option_names(config_class)
    problems = [
        f"{option}: method {options.method} does not use it; remove it."
        for option in ("lora_target_modules", "modules_to_save")
        if option in options.model_fields_set
        and getattr(options, option)
        and (FLAT_OPTIONS[option] not in names or options.method in PROMPT_METHODS)  # their file has no place for it
    ]
    flat = {field: option for option, field in flat_options(options).items()}
    for name in TrainOptions.model_fields:
        if name not in names and options.method in METHODS_BY_OPTION.get(name, (options.method,)):
            flat[name] = name
    return problems + [
        f"method_options: {name} is set by an option of its own; write --{flat[name]} {_as_flag(value)}."
        for name, value in options.method_options.items()
        if name in flat
    ]


def _as_flag(value: Any) -> str:
    """Return a value as it is typed behind the name of an option."""
    if isinstance(value, list):
        return " ".join(map(_as_flag, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def flat_options(options: MethodOptions) -> dict[str, str]:
    """Return those options with flat names that the method uses, and the field of PEFT's config of each."""
    if options.method in LORA_METHODS:
        return FLAT_OPTIONS
    names = ADALORA_OPTIONS if options.method == "adalora" else ("lora_target_modules", "modules_to_save")
    known = option_names(config_class_of(options.method))
    return {name: FLAT_OPTIONS[name] for name in names if FLAT_OPTIONS[name] in known}


def _not_for(options: MethodOptions, config_class: type[PeftConfig]) -> list[str]:
    """Return the fields of PEFT's config that are refused in `method_options`, or have a flat name."""
    refused = {"adalora": IGNORED_FIELDS}.get(options.method, REFUSED_FIELDS if options.method in LORA_METHODS else ())
    names = {*flat_options(options).values(), *refused}
    return [name for name in option_names(config_class) if name in names or is_refused(options.method, name)]


def fresh_adapter_config(options: MethodOptions) -> Any:
    """Return PEFT's config for a fresh adapter of the method.

    Raises:
        ConfigError: the installed PEFT refuses a value of `method_options`.
    """
    config_class = config_class_of(options.method)
    values = {field: getattr(options, option) for option, field in flat_options(options).items()}
    if "modules_to_save" in values:
        whole = [*options.modules_to_save, *([HEAD] if options.gives_scores else [])]
        values["modules_to_save"] = list(dict.fromkeys(whole)) or None
    if "progressbar" in option_names(config_class):
        values["progressbar"] = False
    if options.method in ("prefix", "p_tuning_v2"):
        values["prefix_projection"] = options.method == "prefix"
    if options.method_options.get("prompt_tuning_init") == "TEXT" and isinstance(options, ModelOptions):
        values["tokenizer_name_or_path"] = options.tokenizer_name or options.model_name_or_path
    if options.method == "adalora":
        values["total_step"] = sys.maxsize  # until the run is known, see budget.py
    own, later = {INIT_ROWS} if options.method in LORA_METHODS else set(), {}
    given = {name: value for name, value in options.method_options.items() if name not in own}
    values |= check_method_options(options.method, given, config_class, _not_for(options, config_class))
    if options.method in LORA_METHODS:
        values, later = complete_fields(values)
    if values.get("target_modules") == "all-linear":  # which modules these are is known only with the model
        later |= {name: values.pop(name) for name in ("layers_to_transform", "layers_pattern") if name in values}
    for option, other in ALTERNATIVES.get(options.method, {}).items():
        if given.get(option) and other not in given:
            values[other] = 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*will be ignored", UserWarning)  # an option without effect is an error
            config = config_class(task_type="SEQ_CLS" if options.gives_scores else "CAUSAL_LM", **values)
    except ImportError as error:
        raise ConfigError(f"method: {options.method} needs another package ({short_reason(error)}).") from None
    except Exception as error:  # whatever PEFT's config class stumbles over
        raise ConfigError(
            f"method_options: {options.method_options} are not allowed for method {options.method} "
            f"({short_reason(error)})."
        ) from None
    for name, value in later.items():
        setattr(config, name, value)
    return config
