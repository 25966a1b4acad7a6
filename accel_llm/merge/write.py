"""The walk over a model's weights: what an adapter changes is merged module by module, all else is copied as it lies."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accel_llm.system.chatter

import torch
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from transformers import PreTrainedModel

from accel_llm.adapters.compat import PREFIX, Adapter
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge import attached as graft
from accel_llm.merge import four_bit as quantized
from accel_llm.merge import skeleton as layout
from accel_llm.merge import verify
from accel_llm.merge.one_module import bare, fold, scale
from accel_llm.merge.skeleton import Group, Layout
from accel_llm.model import placement as shards
from accel_llm.model import vocabulary
from accel_llm.model.loading import reason_of
from accel_llm.system.weights import Checkpoint, Spec, Writer, open_folder


class Plan(NamedTuple):
    """A model to be written: `specs` of all its parameters and buffers, `names` of those that are saved.

    `low` are names of weights that are taken as a 4-bit base has them, with whether they are stored transposed.
    """

    source: Path
    checkpoint: Checkpoint
    layout: Layout
    made: graft.Graft
    specs: dict[str, Spec]
    names: list[str]
    low: dict[str, bool]


class Written(NamedTuple):
    """`modules` were merged, `worst` is the largest relative error of one (None: none was looked at)."""

    modules: int
    worst: float | None
    sums: dict[str, int]


def plan(options: MergeOptions, adapters: list[Adapter], source: Path, lazy: bool | None = None) -> Plan:
    """The base in the folder `source` without its weights, with the adapters attached; not `lazy`: with its weights.

    Raises:
        ConfigError: a base that cannot be read, or that the adapters are not for.
    """
    config = layout.load_config(source, options.trust_remote_code)
    task = adapters[0].config.task_type
    if labels := _labels(adapters[0]):
        config.num_labels = labels
    try:
        checkpoint = open_folder(source, options.allow_pickle)
        stored = checkpoint.specs.keys()
        checkpoint = quantized.unpacked(checkpoint, config, options.merge_base)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"base: {source} cannot be read ({reason_of(error)}).") from None
    _check_base(source, checkpoint)
    lazy = graft.is_lazy(adapters) if lazy is None else lazy
    rounds = options.merge_base == "dequantized" and stored == checkpoint.specs.keys()
    made = None
    while made is None:
        laid = layout.lay_out(config, task, checkpoint, options.dtype, options.trust_remote_code, lazy)
        vocabulary.extend(laid.model, _new_rows(laid.model, adapters))
        specs, names = layout.specs_of(laid.model), layout.saved_names(laid.model)
        low = quantized.names_of(laid.model) if rounds else {}
        for name, turned in () if lazy else low.items():
            weight = laid.model.get_parameter(name)
            weight.data = quantized.rounded(weight.data, turned)
        made = graft.graft(laid, adapters, lazy)
        lazy = False
    if len(adapters) > 1:
        weights = options.adapter_weights or [1.0] * len(adapters)
        graft.combine(made, weights, options.combination_type, options.density, options.seed)
    if graft.untie(laid.model, made):
        head = bare(laid.model.get_output_embeddings())
        own = {name for name, (module, _) in made.owners.items() if module is head}
        names = [name for name in specs if name in own or name in names]
    _settle_config(laid.model)
    return Plan(source, checkpoint, laid, made, specs, names, low)


def _check_base(source: Path, checkpoint: Checkpoint) -> None:
    strange = [name for name in checkpoint.specs if name.startswith(PREFIX) or ".lora_" in name]
    if strange:
        raise ConfigError(
            f"base: {source} holds weights of an adapter, such as {min(strange)}; a state dict put together by hand is no "
            "model: name the base model, and the adapter's own folder with --adapter."
        )


def _labels(adapter: Adapter) -> int | None:
    """How many classes the head has that the adapter was trained with, if it has one whole."""
    if adapter.config.task_type not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    heads = [f"{PREFIX}{name}.weight" for name in ("score", "classifier", "classifier.out_proj")]
    return next((len(adapter.weights[name]) for name in heads if name in adapter.weights), None)


def _new_rows(model: PreTrainedModel, adapters: list[Adapter]) -> range:
    if not hasattr(model.config.get_text_config(), "vocab_size"):  # not of text
        return range(0)
    wanted = max(vocabulary.rows_of_adapter(model, adapter.settings, adapter.weights) for adapter in adapters)
    return range(model.config.get_text_config().vocab_size, wanted)


def _settle_config(model: PreTrainedModel) -> None:
    """What `save_pretrained` writes into the config of a model, and whether embedding and head are one."""
    ends = [bare(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    if len(ends) == 2 and ends[0].weight is not ends[1].weight:
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]


def write(plan: Plan, folder: Path, options: MergeOptions, progress: Callable[[int, int], None]) -> Written:
    """Write the weights of the merged model into `folder`, telling `progress` the bytes written and in all.

    Raises:
        ConfigError: a module cannot be merged, or merged it computes something else.
    """
    outputs = _outputs(plan)
    specs = {name: spec for output in outputs.values() for name, spec in output.specs.items()}
    writer = Writer(folder, specs, options.max_shard_size, options.verify != "none")
    total, errors, ready = sum(spec.size for spec in specs.values()), [], {}
    try:
        found = graft.units(plan.made.wrapped)
        modules = len(found)
        while found:
            key, module = found.pop(0)  # so that nothing here keeps what was merged
            names = [name for name in plan.specs if name.startswith(f"{key}.")]
            if not any(name in outputs for name in names):
                continue  # the head of tied ones, whose new rows are the embedding's
            results, error = _merge_module(plan, key, module, names, options, writer.wait)
            errors += [error] if error is not None else []
            ready |= {name: tensor for name, tensor in results.items() if name in outputs}
            del module, results
            _write_whole(plan, outputs, ready, writer)
            progress(writer.written, total)
        ready |= {name: plan.made.replaced[name].to(plan.specs[name].dtype) for name in plan.made.replaced}
        while ready:  # weights that stand in one tensor with others in the files
            group = outputs[next(iter(ready))].group
            ready = _load(plan, group) | ready
            _write_whole(plan, outputs, ready, writer)
        for output in list(outputs.values()):
            if not writer.has(output.specs):
                _write_untouched(plan, output, writer)
                progress(writer.written, total)
        writer.finish()
        progress(writer.written, total)
    finally:
        writer.close()
    return Written(modules, max(errors, default=None), writer.sums)


class Output(NamedTuple):
    """A group of parameters, and the tensors in the files that they are written as."""

    group: Group
    specs: dict[str, Spec]


def _outputs(plan: Plan) -> dict[str, Output]:
    """By the name of each parameter that is saved.

    Raises:
        ConfigError: neither the base nor the adapter has it.
    """
    outputs: dict[str, Output] = {}
    saved = tuple(
        f"{key}." for key, module in graft.units(plan.made.wrapped) if isinstance(module, ModulesToSaveWrapper)
    )
    for name in plan.names:
        if name in outputs or (name not in plan.layout.groups and name not in plan.layout.missing):
            continue  # what no loading misses is not needed
        group = plan.layout.groups.get(name) or Group((), (), (name,), None)
        if not group.sources and not name.startswith(saved) and name not in plan.made.replaced:
            missing = sorted(name for name in plan.layout.missing if not name.startswith(saved))
            raise ConfigError(
                f"base: {plan.source} does not fill the model: {len(missing)} weights are missing ({', '.join(missing[:3])})."
            )
        shapes = {target: plan.specs[target] for target in group.targets}
        empty = {target: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for target, spec in shapes.items()}
        results = layout.revert(plan.layout.model, empty)
        specs = {result: Spec(tensor.dtype, tuple(tensor.shape)) for result, tensor in results.items()}
        outputs |= dict.fromkeys(group.targets, Output(group, specs))
    return outputs


def _merge_module(
    plan: Plan, key: str, module: Any, names: list[str], options: MergeOptions, until_free: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """The weights of one merged module by name, and how far it is from the adapted one (None: not looked at).

    `names` are those of its weights in the base. Merging is what takes most memory, so `until_free` is called before it.

    Raises:
        ConfigError: PEFT cannot merge it, or what it computes has changed.
    """
    made = plan.made
    if not isinstance(module, ModulesToSaveWrapper):
        _fill_base(plan, names)
        _fill_computed(plan, bare(module))
    graft.fill(made, [name for name in made.pending if name.startswith(f"{PREFIX}{key}.")])
    if options.scale != 1:
        scale(module, options.scale)
    error = None
    until_free()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.verify == "none":
                plain = fold(module, options.unmerge)
            else:
                plain, error = verify.fold_checked(module, key, options.unmerge)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as reason:
        raise ConfigError(
            f"adapter: {key} cannot be {'un' * options.unmerge}merged, a {made.wrapped.peft_type.value} layer of PEFT "
            f"refuses it ({reason_of(reason)})."
        ) from None
    results = {f"{key}.{name}": tensor for name, tensor in plain.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in results.items()} != {
        name: plan.specs[name].shape for name in names
    }:
        raise ConfigError(f"adapter: {key} cannot be merged, it becomes a module of other weights than the base's.")
    parent, _, attribute = key.rpartition(".")
    setattr(plan.layout.model.get_submodule(parent), attribute, plain.to("meta"))
    return {name: tensor.to(plan.specs[name].dtype) for name, tensor in results.items()}, error


def _fill_base(plan: Plan, names: list[str]) -> None:
    """Put the base's weights of these names in place, in memory of their own."""
    made, left = plan.made, set(names)
    for name in names:
        if name not in left:
            continue
        module, attribute = made.owners[name]
        old = getattr(module, attribute)
        if name in made.replaced:
            loaded = {name: made.replaced.pop(name).to(plan.specs[name].dtype, copy=True)}
        elif old.device.type == "meta":
            loaded = _load(plan, plan.layout.groups[name])
        else:  # loaded as a map of the file, and perhaps changed since by the way that the adapter began
            loaded = {name: old.detach().clone()}
            shards.forget(old)
        for target in left & loaded.keys():
            graft.place(*made.owners[target], loaded.pop(target))
            left.remove(target)


def _fill_computed(plan: Plan, base: Any) -> None:
    """Buffers that no file holds, such as the scale of Gemma 3's embeddings: by the code that transformers has for them."""
    empty = [name for name, buffer in base.named_buffers(recurse=False) if buffer.device.type == "meta"]
    for name in empty:
        base._buffers[name] = torch.empty_like(base._buffers[name], device="cpu")
    if empty:
        weights = dict(base._parameters)
        base._parameters.update({name: weight.to("meta") for name, weight in weights.items() if weight is not None})
        plan.layout.model._init_weights(base)
        base._parameters.update(weights)


def _load(plan: Plan, group: Group) -> dict[str, torch.Tensor]:
    """The base's weights of a group, by name, as the adapter is merged into them."""
    made = layout.load(plan.layout.model, group, plan.checkpoint, plan.specs)
    return {
        name: quantized.rounded(tensor, plan.low[name]) if name in plan.low else tensor for name, tensor in made.items()
    }


def _write_whole(plan: Plan, outputs: dict[str, Output], ready: dict[str, torch.Tensor], writer: Writer) -> None:
    """Write and drop the parameters in `ready` whose whole group is there."""
    for name in list(ready):
        targets = outputs[name].group.targets
        if name in ready and all(target in ready for target in targets):
            tensors = layout.revert(plan.layout.model, {target: ready.pop(target) for target in targets})
            for result in list(tensors):
                writer.write(result, tensors.pop(result))


def _write_untouched(plan: Plan, output: Output, writer: Writer) -> None:
    """Copy the bytes where the files have the tensors as they are to be written, else convert them there and back."""
    group, places = output.group, plan.checkpoint.places
    same = group.sources if group.converter is None else output.specs
    pairs = dict(zip(output.specs, same, strict=False))
    if (
        len(pairs) == len(group.sources)
        and not plan.low.keys() & set(group.targets)
        and all(source in places and places[source].spec == output.specs[name] for name, source in pairs.items())
    ):
        for name, source in pairs.items():
            writer.copy(name, places[source])
        return
    tensors = _load(plan, group)
    for name, tensor in layout.revert(plan.layout.model, tensors).items():
        writer.write(name, tensor)
