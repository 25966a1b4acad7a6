"""Plans a merge: the base without its weights, the adapters attached to it, names and shapes of the merged weights."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PEFT_PREFIX, SavedAdapter
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import AttachedAdapters, attach_adapters, can_be_lazy, combine_adapters
from accel_llm.merge.classifier_head import adapted_config, check_head_stored, count_head_rows
from accel_llm.merge.four_bit import unpack_4_bits
from accel_llm.merge.one_module import plain_module
from accel_llm.merge.skeleton import Skeleton, build_skeleton, parameter_specs, read_model_config, saved_names
from accel_llm.merge.tied_head import untie_head
from accel_llm.model.config_file import untie
from accel_llm.model.loading import short_reason
from accel_llm.model.quantization import quantized_weights, round_to_4_bits
from accel_llm.model.vocabulary import adapter_vocabulary_size, extend_vocabulary
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightFiles, open_weights


class MergePlan(NamedTuple):
    """The model that a merge writes.

    `specs`: dtype and shape of all its parameters and buffers. `names`: those that are saved. `four_bit`: names of
    weights to round to 4 bits and back before they are merged, and whether each is stored transposed.
    """

    source: Path
    checkpoint: WeightFiles
    skeleton: Skeleton
    attached: AttachedAdapters
    specs: dict[str, TensorSpec]
    names: list[str]
    four_bit: dict[str, bool]


def plan_merge(
    options: MergeOptions, adapters: list[SavedAdapter], source: Path, lazy: bool | None = None
) -> MergePlan:
    """Plan the merge of `adapters` into the base in `source`.

    `lazy` leaves the base's weights out of memory; None chooses it whenever the adapters allow it.

    Raises:
        ConfigError: the base cannot be read, or the adapters do not fit it.
    """
    # Read the config and the headers of the weights.
    config = read_model_config(source, options.trust_remote_code)
    task = adapters[0].config.task_type
    # The base may have no head, or another one; the adapter's folder says how many classes there are.
    if task == "SEQ_CLS":
        config = adapted_config(config, adapters[0], options.trust_remote_code)
    elif labels := count_head_rows(config, adapters[0], options.trust_remote_code):
        config.num_labels = labels
    try:
        checkpoint = open_weights(source, options.allow_pickle)
        stored_names = checkpoint.specs.keys()
        checkpoint = unpack_4_bits(checkpoint, config, options.merge_base)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"base: {source} cannot be read ({short_reason(error)}).") from None
    _check_base(source, checkpoint)

    # Attach the adapters. A lazy attempt that turns out to be impossible is repeated with the weights in memory.
    in_4_bits = stored_names != checkpoint.specs.keys()
    rounds_weights = options.merge_base == "dequantized" and not in_4_bits
    lazy = can_be_lazy(adapters) if lazy is None else lazy
    while True:
        skeleton = build_skeleton(config, task, checkpoint, options.dtype, options.trust_remote_code, lazy)
        model = skeleton.model
        if task == "SEQ_CLS":
            check_head_stored(skeleton.missing, adapters, source)
        extend_vocabulary(model, _new_rows(model, adapters))
        specs, names = parameter_specs(model), saved_names(model)
        four_bit = quantized_weights(model) if rounds_weights else {}
        if not lazy:
            _round_in_place(model, four_bit)
        attached = attach_adapters(skeleton, adapters, lazy)
        if attached is not None:
            break
        lazy = False

    # Several adapters become one before anything is merged.
    if len(adapters) > 1:
        weights = options.adapter_weights or [1.0] * len(adapters)
        combine_adapters(attached, weights, options.combination_type, options.density, options.seed)

    # Embedding and head may become two matrices; then both are saved.
    if untie_head(skeleton.model, attached):
        head = plain_module(skeleton.model.get_output_embeddings())
        head_names = {name for name, (module, _) in attached.owners.items() if module is head}
        names = [name for name in specs if name in head_names or name in names]
    _update_config(skeleton.model)
    return MergePlan(source, checkpoint, skeleton, attached, specs, names, four_bit)


def _round_in_place(model: PreTrainedModel, four_bit: dict[str, bool]) -> None:
    """Round the weights in `four_bit` to 4 bits and back; its values say which are stored transposed."""
    for name, transposed in four_bit.items():
        weight = model.get_parameter(name)
        weight.data = round_to_4_bits(weight.data, transposed)


def _check_base(source: Path, checkpoint: WeightFiles) -> None:
    """Refuse a base whose files hold weights of an adapter."""
    adapter_weights = [name for name in checkpoint.specs if name.startswith(PEFT_PREFIX) or ".lora_" in name]
    if adapter_weights:
        raise ConfigError(
            f"base: {source} holds weights of an adapter, such as {min(adapter_weights)}, so it is not a base model; "
            "name the base model, and the adapter's own folder with --adapter."
        )


def _new_rows(model: PreTrainedModel, adapters: list[SavedAdapter]) -> range:
    """Return the ids of the tokens that the adapters added to the base's vocabulary."""
    if not hasattr(model.config.get_text_config(), "vocab_size"):  # not a language model
        return range(0)
    size = max(adapter_vocabulary_size(model, adapter.settings, adapter.weights) for adapter in adapters)
    return range(model.config.get_text_config().vocab_size, size)


def _update_config(model: PreTrainedModel) -> None:
    """Set the config values that `save_pretrained` would set, and whether embedding and head are tied."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    embedding_and_head = [plain_module(module) for module in modules if module is not None]
    if len(embedding_and_head) == 2 and embedding_and_head[0].weight is not embedding_and_head[1].weight:
        untie(model.config)
    # `save_pretrained` of a model sets these two.
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
