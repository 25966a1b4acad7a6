"""What a merge will write: the base without its weights, the adapters on it, the names and shapes of the result."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PEFT_PREFIX, SavedAdapter
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import AttachedAdapters, attach_adapters, can_be_lazy, combine_adapters, untie_head
from accel_llm.merge.four_bit import unpack_4_bits
from accel_llm.merge.one_module import plain_module
from accel_llm.merge.skeleton import Skeleton, build_skeleton, parameter_specs, read_model_config, saved_names
from accel_llm.model.loading import short_reason
from accel_llm.model.quantization import quantized_weights, round_to_4_bits
from accel_llm.model.vocabulary import adapter_vocabulary_size, extend_vocabulary
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightFiles, open_weights


class MergePlan(NamedTuple):
    """A model to be written: `specs` of all its parameters and buffers, `names` of those that are saved.

    `low` are names of weights that are taken as a 4-bit base has them, with whether they are stored transposed.
    """

    source: Path
    checkpoint: WeightFiles
    layout: Skeleton
    made: AttachedAdapters
    specs: dict[str, TensorSpec]
    names: list[str]
    low: dict[str, bool]


def plan_merge(
    options: MergeOptions, adapters: list[SavedAdapter], source: Path, lazy: bool | None = None
) -> MergePlan:
    """The base in the folder `source` without its weights, with the adapters attached; not `lazy`: with its weights.

    Raises:
        ConfigError: a base that cannot be read, or that the adapters are not for.
    """
    config = read_model_config(source, options.trust_remote_code)
    task = adapters[0].config.task_type
    if labels := _labels(adapters[0]):
        config.num_labels = labels
    try:
        checkpoint = open_weights(source, options.allow_pickle)
        stored = checkpoint.specs.keys()
        checkpoint = unpack_4_bits(checkpoint, config, options.merge_base)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"base: {source} cannot be read ({short_reason(error)}).") from None
    _check_base(source, checkpoint)
    lazy = can_be_lazy(adapters) if lazy is None else lazy
    rounds = options.merge_base == "dequantized" and stored == checkpoint.specs.keys()
    made = None
    while made is None:
        laid = build_skeleton(config, task, checkpoint, options.dtype, options.trust_remote_code, lazy)
        extend_vocabulary(laid.model, _new_rows(laid.model, adapters))
        specs, names = parameter_specs(laid.model), saved_names(laid.model)
        low = quantized_weights(laid.model) if rounds else {}
        for name, turned in () if lazy else low.items():
            weight = laid.model.get_parameter(name)
            weight.data = round_to_4_bits(weight.data, turned)
        made = attach_adapters(laid, adapters, lazy)
        lazy = False
    if len(adapters) > 1:
        weights = options.adapter_weights or [1.0] * len(adapters)
        combine_adapters(made, weights, options.combination_type, options.density, options.seed)
    if untie_head(laid.model, made):
        head = plain_module(laid.model.get_output_embeddings())
        own = {name for name, (module, _) in made.owners.items() if module is head}
        names = [name for name in specs if name in own or name in names]
    _settle_config(laid.model)
    return MergePlan(source, checkpoint, laid, made, specs, names, low)


def _check_base(source: Path, checkpoint: WeightFiles) -> None:
    strange = [name for name in checkpoint.specs if name.startswith(PEFT_PREFIX) or ".lora_" in name]
    if strange:
        raise ConfigError(
            f"base: {source} holds weights of an adapter, such as {min(strange)}; a state dict put together by hand is no "
            "model: name the base model, and the adapter's own folder with --adapter."
        )


def _labels(adapter: SavedAdapter) -> int | None:
    """How many classes the head has that the adapter was trained with, if it has one whole."""
    if adapter.config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [f"{PEFT_PREFIX}{name}.weight" for name in ("score", "classifier", "classifier.out_proj")]
    return next((len(adapter.weights[name]) for name in heads if name in adapter.weights), None)


def _new_rows(model: PreTrainedModel, adapters: list[SavedAdapter]) -> range:
    if not hasattr(model.config.get_text_config(), "vocab_size"):  # not of text
        return range(0)
    wanted = max(adapter_vocabulary_size(model, adapter.settings, adapter.weights) for adapter in adapters)
    return range(model.config.get_text_config().vocab_size, wanted)


def _settle_config(model: PreTrainedModel) -> None:
    """What `save_pretrained` writes into the config of a model, and whether embedding and head are one."""
    ends = [
        plain_module(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None
    ]
    if len(ends) == 2 and ends[0].weight is not ends[1].weight:
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
