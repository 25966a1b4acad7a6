"""Whether the texts of a classifier can be packed, from the config of its model alone: before rows and weights are read.

A family tells by its forward: a twin of the model with few layers and random values is asked (model/text_probe.py).
"""

from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.errors import ConfigError
from accel_llm.model.attention import REMEDY, family_obstacle
from accel_llm.model.classifier import attach_scores, scores_last_token
from accel_llm.model.encoders import encoder_parts
from accel_llm.model.text_probe import text_packing_obstacle

TWIN_LAYERS = 2
TWIN_VOCABULARY = 512
# A twin is no larger than that: its values take time to draw, and its test row is longer than its table of positions.
TWIN_SIZES = {"vocab_size": TWIN_VOCABULARY, "max_position_embeddings": 64, "intermediate_size": 128}
PADDED_BATCH_SIZE = 16  # rows in a forward pass, in place of 1 packed row
_BATCH_SIZES = ("per_device_train_batch_size", "total_batch_size", "gradient_accumulation_steps")


def fit_packing(options: ClassifyOptions, config: PreTrainedConfig) -> tuple[ClassifyOptions, str | None]:
    """Return the options without packing if the model of `config` cannot take packed texts, and a sentence that says so.

    Without packing, texts of similar length come together, and 16 of them are computed at once; what the user has set
    stays. The sentence is None if nothing changes.

    Raises:
        ConfigError: the user has set packing, but the model cannot take packed texts.
    """
    if not options.packing or not (reason := config_packing_obstacle(config)):
        return options, None
    if "packing" in options.model_fields_set:
        raise ConfigError(f"packing: {options.packing} does not work with this model: {reason}; {REMEDY}.")
    defaults: dict[str, Any] = {"packing": None, "order": "group_by_length"}
    if not options.model_fields_set & set(_BATCH_SIZES):
        defaults |= dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), PADDED_BATCH_SIZE)
    fitted = options.with_defaults(defaults)
    changed = {name: getattr(fitted, name) for name in defaults if getattr(fitted, name) != getattr(options, name)}
    values = ", ".join(f"{name}: {value or 'false'}" for name, value in changed.items())
    return fitted, f"texts are padded, and not packed, because {reason}; in force are {values}"


def config_packing_obstacle(config: PreTrainedConfig) -> str | None:
    """Return the reason why a classifier made of a model of `config` cannot take packed texts, or None.

    A decoder, whose head reads the state of one token, is told by its family alone; so is a family without such a class
    in transformers, whose code comes with the model: None. An encoder is tried out on the CPU, always with the same
    values; no random number is drawn from the caller's generators.
    """
    mapping: Any = AutoModelForSequenceClassification._model_mapping
    if type(config) not in mapping:
        return None
    model_class = mapping[type(config)]
    reason = family_obstacle(model_class, config)
    if reason or scores_last_token(config):
        return reason
    small = _small_config(config)
    with torch.device("meta"):
        empty = model_class(deepcopy(small))
    if encoder_parts(empty).states is None:
        return f"no module of {model_class.__name__} returns the last states of the tokens as they reach its head"
    # Only the generator of the CPU: torch.manual_seed would seed those of all devices.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        twin = model_class(small).float()
    attach_scores(twin)
    return text_packing_obstacle(twin, "cpu", torch.float32)


def _small_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config with TWIN_LAYERS layers, of different kinds if there are some, and TWIN_SIZES at most."""
    config = deepcopy(config)
    config._attn_implementation = "eager"
    layers: int = config.num_hidden_layers
    if layers > TWIN_LAYERS:
        kinds = getattr(config, "layer_types", None) or [""] * layers
        firsts = [k for k, kind in enumerate(kinds) if kind not in kinds[:k]]
        kept = sorted([*firsts, *(k for k in range(layers) if k not in firsts)][:TWIN_LAYERS])
        # Lists with a value for each layer.
        lists = {
            name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == layers
        }
        config.num_hidden_layers = TWIN_LAYERS
        for name, value in lists.items():
            setattr(config, name, [value[k] for k in kept])
    large = [name for name in vars(config) if name.endswith("_token_id") and _is_large(getattr(config, name))]
    if _is_large(getattr(config, "vocab_size", None)):
        # Special tokens with a larger number get the last ones of the small vocabulary.
        numbers = sorted({getattr(config, name) for name in large}, reverse=True)
        for name in large:
            setattr(config, name, TWIN_VOCABULARY - 1 - numbers.index(getattr(config, name)))
    for name, most in TWIN_SIZES.items():
        if (getattr(config, name, None) or 0) > most:
            setattr(config, name, most)
    return config


def _is_large(number: Any) -> bool:
    return isinstance(number, int) and number >= TWIN_VOCABULARY
