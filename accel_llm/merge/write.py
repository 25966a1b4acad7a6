"""The walk over a model's weights: what an adapter changes is merged module by module, all else is copied as it lies."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accel_llm.system.chatter

import torch
from peft.utils import ModulesToSaveWrapper

from accel_llm.adapters.compat import PEFT_PREFIX
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import adapted_modules, fill_pending, put_tensor
from accel_llm.merge.one_module import merge_module, plain_module, scale_module
from accel_llm.merge.plan import MergePlan
from accel_llm.merge.skeleton import WeightGroup, load_group, revert_names
from accel_llm.merge.verify import merge_module_checked
from accel_llm.model.loading import short_reason
from accel_llm.model.quantization import round_to_4_bits
from accel_llm.system.memory import release_pages
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightWriter


class Written(NamedTuple):
    """`modules` were merged, `worst` is the largest relative error of one (None: none was looked at)."""

    modules: int
    worst: float | None
    sums: dict[str, int]


def write_merged(plan: MergePlan, folder: Path, options: MergeOptions, progress: Callable[[int, int], None]) -> Written:
    """Write the weights of the merged model into `folder`, telling `progress` the bytes written and in all.

    Raises:
        ConfigError: a module cannot be merged, or merged it computes something else.
    """
    outputs = _outputs(plan)
    specs = {name: spec for output in outputs.values() for name, spec in output.specs.items()}
    writer = WeightWriter(folder, specs, options.max_shard_size, options.verify != "none")
    total, errors, ready = sum(spec.size for spec in specs.values()), [], {}
    try:
        found = adapted_modules(plan.made.wrapped)
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

    group: WeightGroup
    specs: dict[str, TensorSpec]


def _outputs(plan: MergePlan) -> dict[str, Output]:
    """By the name of each parameter that is saved.

    Raises:
        ConfigError: neither the base nor the adapter has it.
    """
    outputs: dict[str, Output] = {}
    saved = tuple(
        f"{key}." for key, module in adapted_modules(plan.made.wrapped) if isinstance(module, ModulesToSaveWrapper)
    )
    for name in plan.names:
        if name in outputs or (name not in plan.layout.groups and name not in plan.layout.missing):
            continue  # what no loading misses is not needed
        group = plan.layout.groups.get(name) or WeightGroup((), (), (name,), None)
        if not group.sources and not name.startswith(saved) and name not in plan.made.replaced:
            missing = sorted(name for name in plan.layout.missing if not name.startswith(saved))
            raise ConfigError(
                f"base: {plan.source} does not fill the model: {len(missing)} weights are missing ({', '.join(missing[:3])})."
            )
        shapes = {target: plan.specs[target] for target in group.targets}
        empty = {target: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for target, spec in shapes.items()}
        results = revert_names(plan.layout.model, empty)
        specs = {result: TensorSpec(tensor.dtype, tuple(tensor.shape)) for result, tensor in results.items()}
        outputs |= dict.fromkeys(group.targets, Output(group, specs))
    return outputs


def _merge_module(
    plan: MergePlan, key: str, module: Any, names: list[str], options: MergeOptions, until_free: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """The weights of one merged module by name, and how far it is from the adapted one (None: not looked at).

    `names` are those of its weights in the base. Merging is what takes most memory, so `until_free` is called before it.

    Raises:
        ConfigError: PEFT cannot merge it, or what it computes has changed.
    """
    made = plan.made
    if not isinstance(module, ModulesToSaveWrapper):
        _fill_base(plan, names)
        _fill_computed(plan, plain_module(module))
    fill_pending(made, [name for name in made.pending if name.startswith(f"{PEFT_PREFIX}{key}.")])
    if options.scale != 1:
        scale_module(module, options.scale)
    error = None
    until_free()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if options.verify == "none":
                plain = merge_module(module, options.unmerge)
            else:
                plain, error = merge_module_checked(module, key, options.unmerge)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as reason:
        raise ConfigError(
            f"adapter: {key} cannot be {'un' * options.unmerge}merged, a {made.wrapped.peft_type.value} layer of PEFT "
            f"refuses it ({short_reason(reason)})."
        ) from None
    results = {f"{key}.{name}": tensor for name, tensor in plain.state_dict().items()}
    if {name: tuple(tensor.shape) for name, tensor in results.items()} != {
        name: plan.specs[name].shape for name in names
    }:
        raise ConfigError(f"adapter: {key} cannot be merged, it becomes a module of other weights than the base's.")
    parent, _, attribute = key.rpartition(".")
    setattr(plan.layout.model.get_submodule(parent), attribute, plain.to("meta"))
    return {name: tensor.to(plan.specs[name].dtype) for name, tensor in results.items()}, error


def _fill_base(plan: MergePlan, names: list[str]) -> None:
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
            release_pages(old)
        for target in left & loaded.keys():
            put_tensor(*made.owners[target], loaded.pop(target))
            left.remove(target)


def _fill_computed(plan: MergePlan, base: Any) -> None:
    """Buffers that no file holds, such as the scale of Gemma 3's embeddings: by the code that transformers has for them."""
    empty = [name for name, buffer in base.named_buffers(recurse=False) if buffer.device.type == "meta"]
    for name in empty:
        base._buffers[name] = torch.empty_like(base._buffers[name], device="cpu")
    if empty:
        weights = dict(base._parameters)
        base._parameters.update({name: weight.to("meta") for name, weight in weights.items() if weight is not None})
        plan.layout.model._init_weights(base)
        base._parameters.update(weights)


def _load(plan: MergePlan, group: WeightGroup) -> dict[str, torch.Tensor]:
    """The base's weights of a group, by name, as the adapter is merged into them."""
    made = load_group(plan.layout.model, group, plan.checkpoint, plan.specs)
    return {
        name: round_to_4_bits(tensor, plan.low[name]) if name in plan.low else tensor for name, tensor in made.items()
    }


def _write_whole(
    plan: MergePlan, outputs: dict[str, Output], ready: dict[str, torch.Tensor], writer: WeightWriter
) -> None:
    """Write and drop the parameters in `ready` whose whole group is there."""
    for name in list(ready):
        targets = outputs[name].group.targets
        if name in ready and all(target in ready for target in targets):
            tensors = revert_names(plan.layout.model, {target: ready.pop(target) for target in targets})
            for result in list(tensors):
                writer.write(result, tensors.pop(result))


def _write_untouched(plan: MergePlan, output: Output, writer: WeightWriter) -> None:
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
    for name, tensor in revert_names(plan.layout.model, tensors).items():
        writer.write(name, tensor)
