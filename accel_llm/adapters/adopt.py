"""Takes the method and the settings of a run from the adapter that it trains further (`adapter_name_or_path`)."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from accel_llm.adapters.compat import check_first_values, clean_settings
from accel_llm.adapters.initial import subtracted_init
from accel_llm.adapters.locate import locate_folder
from accel_llm.adapters.method_options import check_method_options, option_names
from accel_llm.adapters.methods import PEFT_TYPES, config_class_of, flat_options
from accel_llm.adapters.prompts import ensemble_folders
from accel_llm.adapters.refused_options import may_differ
from accel_llm.adapters.saved import ADAPTER_WEIGHTS, read_adapter_config
from accel_llm.config.options import MethodOptions
from accel_llm.errors import ConfigError, raise_problems

# First values, and what they were computed from: they do not matter, because the weights are there.
FIRST_VALUES = (
    "init_lora_weights",
    "eva_config",
    "corda_config",
    "loftq_config",
    "lora_ga_config",
    "runtime_config",
    "trainable_token_indices",  # see model/vocabulary.py
    "fan_in_fan_out",  # PEFT sees for itself how a layer stores its weight
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "encoder_hidden_size",  # of a network that is not in the file
)
# Methods whose file holds what their network has computed, but not the network: what goes on with the results alone.
RESULTS_ALONE = {"PREFIX_TUNING": "p_tuning_v2", "P_TUNING": "prompt"}


def adopt_adapter_options(options: MethodOptions) -> Any:
    """Return the options with the folder, the method and the settings of the adapter in `adapter_name_or_path`.

    Without that option they are returned as they are.

    Raises:
        ConfigError: there is no such adapter, its weights are not safetensors, or an option contradicts its settings.
    """
    name = options.adapter_name_or_path
    if name is None:
        return options
    folder = locate_folder(name, "adapter_name_or_path")
    settings = read_adapter_config(folder, "adapter_name_or_path")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"adapter_name_or_path: {name} has no {ADAPTER_WEIGHTS}; only safetensors are read.")
    _check_task(options, settings, name)
    method = _method_of(options, settings, folder)
    _check_first_values(options, settings, method, name)
    options = options.model_copy(update={"adapter_name_or_path": str(folder), "method": method})
    members = 1 + len(ensemble_folders(folder))
    if options.prompt_ensemble != members and "prompt_ensemble" in options.model_fields_set:
        raise ConfigError(
            f"prompt_ensemble: {options.prompt_ensemble} is given, but the adapter {name} has {members}; leave it out."
        )
    options = options.with_defaults({"prompt_ensemble": members})
    return _adopt_settings(options, settings, name)


def _check_task(options: MethodOptions, settings: dict[str, Any], name: str) -> None:
    """Check that the adapter has a head for scores if, and only if, the run trains one.

    Raises:
        ConfigError: it is otherwise.
    """
    has_head = settings.get("task_type") == "SEQ_CLS"
    if has_head and not options.gives_scores:
        raise ConfigError(
            f"adapter_name_or_path: {name} is that of a reward model or a classifier, whose head gives scores and no "
            "answers; train it further with launch/reward.py, or name another adapter."
        )
    if options.gives_scores and not has_head:
        raise ConfigError(
            f"adapter_name_or_path: {name} has no head for scores; merge it into its base (launch/merge.py), and name the "
            "result in model_name_or_path."
        )


def _method_of(options: MethodOptions, settings: dict[str, Any], folder: Path) -> str:
    """Return the method that goes on with an adapter of these settings.

    Raises:
        ConfigError: the installed PEFT does not know such an adapter, it cannot be trained further, or the user has named
            another method.
    """
    kind = clean_settings(settings, folder)[0]["peft_type"]
    if kind == "ADALORA":
        raise ConfigError(
            f"adapter_name_or_path: {options.adapter_name_or_path} is an ADALORA adapter: it has given up ranks, and its "
            "schedule is over; merge it (launch/merge.py) and train a new adapter on the result."
        )
    names = [method for method, peft_type in PEFT_TYPES.items() if peft_type == kind] or [kind.lower()]
    if kind == "LORA":
        names = ["lora", "qlora"]
    elif kind in RESULTS_ALONE:
        names = [RESULTS_ALONE[kind]]
    if "method" not in options.model_fields_set:
        return names[0]
    if options.method not in names:
        raise ConfigError(
            f"method: {options.method} is given, but {options.adapter_name_or_path} holds {kind}; give "
            f"{' or '.join(names)}, or leave it out."
        )
    return options.method


def _check_first_values(options: MethodOptions, settings: dict[str, Any], method: str, name: str) -> None:
    """Check that the base of a LoRA can be had, and that no first values are asked for.

    Raises:
        ConfigError: they are, or it cannot.
    """
    check_first_values(settings, name, "adapter_name_or_path")
    in_4_bits = options.in_4_bits or method == "qlora"
    if subtracted_init(init := settings.get("init_lora_weights")) and (in_4_bits or options.load_in_8bit):
        raise ConfigError(
            f"adapter_name_or_path: {name} was saved by PEFT with init_lora_weights {init}, whose base in 4 or 8 bits "
            "nobody can compute again; train it further with method lora and without load_in_8bit."
        )
    if "init_lora_weights" in options.model_fields_set and options.init_lora_weights is not True:
        raise ConfigError(
            f"init_lora_weights: {options.init_lora_weights} has no effect, because the weights of the adapter {name} "
            "are the first values; leave it out."
        )


def _adopt_settings(options: MethodOptions, settings: dict[str, Any], name: str) -> Any:
    """Return the options with the adapter's settings, under flat names and in `method_options`.

    What the user set must agree with the adapter; dropout and the like may differ, they have no weights.

    Raises:
        ConfigError: it does not.
    """
    config_class = config_class_of(options.method)
    flat = {option: field for option, field in flat_options(options).items() if field not in FIRST_VALUES}
    adopted = {option: settings[field] for option, field in flat.items() if settings.get(field) is not None}
    user_values = {option: getattr(options, option) for option in adopted.keys() & options.model_fields_set}
    given = check_method_options(options.method, options.method_options, config_class)
    own = [field for field in option_names(config_class) if field not in (*flat.values(), *FIRST_VALUES)]
    defaults = {field.name: _default(field) for field in fields(config_class)}
    others = {field: settings.get(field, defaults[field]) for field in own}
    problems = [
        f"{option}: {value!r} is given, but the adapter {name} has {theirs!r}; leave it out."
        for option, value, theirs in (
            *((option, value, adopted[option]) for option, value in sorted(user_values.items())),
            *((f"method_options: {field}", given[field], others[field]) for field in own if field in given),
        )
        if not may_differ(option.removeprefix("method_options: ")) and _comparable(value) != _comparable(theirs)
    ]
    raise_problems(problems)
    changed = {field: value for field, value in others.items() if value != defaults[field]}
    options = options.with_defaults({option: value for option, value in adopted.items() if option not in user_values})
    options = options.model_copy(update={"method_options": changed | given})
    raise_problems(options.problems())  # the user may have set what the adapter's method does not use
    return options


def _default(field: Any) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _comparable(value: Any) -> Any:
    """Return a form of `value` for comparison: the order of a list, such as target modules, makes no difference."""
    return sorted(value) if isinstance(value, list | set) else value
