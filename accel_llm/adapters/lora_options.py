"""Options of LoRA beyond those with flat names: what each needs, what cannot be had here, and what would have no effect.

PEFT 0.21 says nothing, or only warns, if a pattern fits no layer or an option belongs to another one.
"""

import re
from typing import Any

import accel_llm.system.chatter

from peft import EvaConfig, LoraGAConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key

from accel_llm.backend.strategy import strategy
from accel_llm.config.options import MethodOptions
from accel_llm.errors import raise_problems

INIT_ROWS = "init_rows"  # our own option: the number of rows that DATA_INITS look at
# Values of init_lora_weights that need rows of the run, see adapters/data_starts.py.
DATA_INITS = ("eva", "corda", "lora_ga")
# Fields of PEFT's config that belong to one value of init_lora_weights, and their defaults.
INIT_FIELDS: dict[str, tuple[str, Any]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
    "loftq": ("loftq_config", dict),
}
LOFTQ_SETTINGS = {"loftq_bits": 4, "loftq_iter": 1}
# Options of PEFT 0.21 that would have no effect, or a wrong one, in training here, and why.
REFUSED_FIELDS = {
    "alora_invocation_tokens": "PEFT looks for the tokens in whole rows of a batch, so documents that are packed into one "
    "row would share one adapter, and it cannot be merged",
    "arrow_config": "it routes between adapters that were trained before",
    "kasa_config": "PEFT takes a part out of the base's weights, so the base cannot be had again by switching the adapter "
    "off, and leaves its penalties to the loss of the caller",
    "layer_replication": "the model gets more layers than its base, so the adapter cannot be merged, and the base cannot be "
    "had again by switching the adapter off",
    "megatron_config": "the models of transformers have no Megatron layers",
    "megatron_core": "the models of transformers have no Megatron layers",
    "monteclora_config": "PEFT leaves its variational loss to the loss of the caller",
    "qalora_group_size": "PEFT has QALoRA for a base in GPTQ only, which cannot be trained here",
    "runtime_config": "it moves weights to a GPU for a moment, but the adapter is attached before any weight is there",
    "use_qalora": "PEFT has it for a base in GPTQ only, which cannot be trained here",
    "velora_config": "its gradient is an approximation that depends on how a step is cut into micro-batches",
}
BIAS_FIELDS = ("bias", "config_C", "config_D_E")  # the latter are GLoRA's; `none` leaves the biases as they are
REFUSED_CORDA = ("cache_file", "covariance_file", "verbose", "prune_temporary_fields")


def looks_at_rows(options: MethodOptions) -> bool:
    """Return whether the first values of the LoRA come from rows of the run."""
    is_lora = options.method in ("lora", "qlora") and options.adapter_name_or_path is None
    return is_lora and options.init_lora_weights in DATA_INITS


def lora_problems(options: MethodOptions) -> list[str]:
    """Return what is wrong with the options of a LoRA, whatever the model is."""
    given, init = options.method_options, options.init_lora_weights
    problems = [
        f"method_options: {field} cannot be used: {reason}; leave it out."
        for field, reason in REFUSED_FIELDS.items()
        if given.get(field) not in (None, False)
    ]
    problems += [
        f"method_options: {field} has an effect only with init_lora_weights {value}, which is {init}; leave it out."
        for value, (field, _) in INIT_FIELDS.items()
        if given.get(field) and init != value and options.adapter_name_or_path is None
    ]
    rows = given.get(INIT_ROWS)
    if rows is not None and (type(rows) is not int or rows < 1):
        problems.append(f"method_options: {INIT_ROWS} {rows!r} is not allowed; give a whole number of at least 1.")
    if rows is not None and init not in DATA_INITS:
        problems.append(
            f"method_options: {INIT_ROWS} has an effect only with init_lora_weights {', '.join(DATA_INITS)}; leave it out."
        )
    if given.get("lora_bias") and not (isinstance(init, bool) and not options.use_dora):
        problems.append("method_options: lora_bias needs init_lora_weights true or false, and no use_dora.")
    corda = given.get("corda_config")
    problems += [
        f"method_options: {field} of corda_config cannot be used, everything is computed when the run starts; leave it out."
        for field in REFUSED_CORDA
        if isinstance(corda, dict) and field in corda
    ]
    return problems + _init_problems(options)


def _init_problems(options: MethodOptions) -> list[str]:
    """Return why `init_lora_weights` cannot be had with this base or on this backend."""
    init = str(options.init_lora_weights)
    bits = "4" if options.in_4_bits else "8" if options.load_in_8bit else ""
    problems = []
    if init == "loftq" and bits != "4":
        problems.append(
            "init_lora_weights: loftq makes up for what 4 bits lose; set load_in_4bit, or take other first values."
        )
    if init == "loftq" and (options.method_options.get("loftq_config") or LOFTQ_SETTINGS) != LOFTQ_SETTINGS:
        problems.append(
            f"method_options: loftq_config {options.method_options['loftq_config']} would need a base other than the "
            f"rounded one, which no file holds; only {LOFTQ_SETTINGS} is possible, so leave it out."
        )
    if bits and init == "lora_ga":
        problems.append(
            f"init_lora_weights: lora_ga needs gradients of the base's weights, which {bits} bits do not have; take other "
            f"first values, or a base that is not quantized."
        )
    if init in DATA_INITS and strategy() in ("zero3", "zero3_offload", "fsdp2"):
        problems.append(
            f"init_lora_weights: {init} runs the model before the optimizer exists, but {strategy()} has split its "
            "weights by then; take zero2 or ddp, or other first values."
        )
    return problems


def complete_fields(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split fields of LoraConfig: those for its constructor, and those to set on the config afterwards.

    The latter say how the first values are computed. PEFT's constructor warns of combinations that only its own way of
    computing them cannot do, and its `loftq` would change the base.
    """
    init = values.get("init_lora_weights")
    later = {"init_lora_weights": init} if init not in (True, False, "loftq") else {}
    field, default = INIT_FIELDS.get(str(init), ("", None))
    if default is not None and init != "loftq":
        later[field] = values.get(field) or default()
    held = {"init_lora_weights", *(name for name, _ in INIT_FIELDS.values())}
    first = {name: value for name, value in values.items() if name not in held and name not in later}
    return first | ({} if "init_lora_weights" in later else {"init_lora_weights": init is not False}), later


def check_patterns(model: Any, config: Any) -> None:
    """Check that each pattern and each number in the settings of an attached adapter fits something in the model.

    Raises:
        ConfigError: one of them has no effect.
    """
    layers = {name: module for name, module in model.get_base_model().named_modules()}
    adapted = [pattern_name(name, module) for name, module in layers.items() if isinstance(module, BaseTunerLayer)]
    is_osf = config.peft_type == "OSF"
    problems = [
        f"method_options: {field} has {key!r}, but no adapted layer has such a name; one is {min(adapted)}."
        for field, patterns in vars(config).items()
        if field.endswith("_pattern") and isinstance(patterns, dict)
        for key in patterns
        # OSF takes a part of a name.
        if not any(get_pattern_key([key], name) == key or (is_osf and key in name) for name in adapted)
    ]
    problems += [
        f"method_options: exclude_modules has {key!r}, but the model has no such module."
        for key in (config.exclude_modules if isinstance(getattr(config, "exclude_modules", None), set | list) else ())
        if not any(name == key or name.endswith(f".{key}") for name in layers)
    ]
    wanted = getattr(config, "layers_to_transform", None)
    numbers = [wanted] if isinstance(wanted, int) else wanted or ()
    if getattr(config, "layers_pattern", None) and wanted is None:
        problems.append("method_options: layers_pattern has an effect only with layers_to_transform; leave it out.")
    problems += [
        f"method_options: layers_to_transform has {number}, but no adapted layer has this number; one is {min(adapted)}."
        for number in numbers
        if not any(re.search(rf"\.{number}\.", name) for name in adapted)
    ]
    problems += [
        f"method_options: target_parameters has {key!r}, but the model has no such parameter that can be adapted."
        for key in getattr(config, "target_parameters", None) or ()
        if not any(name == key or name.endswith(f".{key}") for name in adapted)
    ]
    blocks = getattr(config, "use_bdlora", None)
    problems += [
        f"method_options: use_bdlora has {key!r}, but no adapted layer has such a name; one is {min(adapted)}."
        for key in [
            *(getattr(blocks, "target_modules_bd_a", None) or ()),
            *(getattr(blocks, "target_modules_bd_b", None) or ()),
        ]
        if not any(key in name for name in adapted)
    ]
    if getattr(config, "ensure_weight_tying", False):
        problems += _tying_problems(model, config)
    raise_problems(problems)


def check_biases(model: Any, options: MethodOptions) -> None:
    """Check that options of a fresh adapter for biases find some in the base; many models have none.

    Raises:
        ConfigError: they do not.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    in_layers = any(getattr(layer.get_base_layer(), "bias", None) is not None for layer in layers)
    anywhere = any(name.endswith(".bias") and ".default." not in name for name, _ in model.named_parameters())
    given = {f"method_options: {name}": value for name, value in options.method_options.items() if name in BIAS_FIELDS}
    raise_problems(
        [
            f"{name} {value} has no effect, because the {where} no biases; leave it out."
            for name, value in ({"lora_bias:": options.lora_bias} | given).items()
            for where, found in [("model has", anywhere) if value == "all" else ("adapted layers have", in_layers)]
            if value != "none" and not found
        ]
    )


def _tying_problems(model: Any, config: Any) -> list[str]:
    if not model.get_base_model().config.get_text_config().tie_word_embeddings:
        return [
            "method_options: ensure_weight_tying has no effect, because embedding and head are two matrices; leave it out."
        ]
    tied = model.peft_config["default"]
    if getattr(tied, "target_modules_to_tie", None):
        return [
            "method_options: ensure_weight_tying cannot tie the LoRA of embedding and head, because PEFT 0.21 keeps it "
            "twice; name the embedding in modules_to_save, or leave it out."
        ]
    return []


def pattern_name(name: str, layer: Any) -> str:
    """Return the name by which PEFT's patterns know a layer: for a single parameter it is the parameter's."""
    while name.endswith(".base_layer"):  # several parameters of one module
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}" if isinstance(layer, ParamWrapper) else name
