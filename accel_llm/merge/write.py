"""Writes the merged weights: adapted modules are merged one at a time, all other weights are copied byte by byte."""

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
from accel_llm.merge.skeleton import WeightGroup, file_tensors, load_group
from accel_llm.merge.verify import merge_module_checked
from accel_llm.model.loading import short_reason
from accel_llm.model.quantization import round_to_4_bits
from accel_llm.system.memory import release_pages
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import WeightWriter


class WriteResult(NamedTuple):
    """Number of merged modules, their largest relative error (None: not verified), and the CRC-32 of each tensor."""

    modules: int
    largest_error: float | None
    checksums: dict[str, int]


def write_merged(
    plan: MergePlan, folder: Path, options: MergeOptions, progress: Callable[[int, int], None]
) -> WriteResult:
    """Write the weights of the merged model into `folder`. `progress` is called with bytes written and bytes in all.

    Raises:
        ConfigError: a module cannot be merged, or computes something else once it is merged.
    """
    outputs = _plan_outputs(plan)
    specs = {name: spec for output in outputs.values() for name, spec in output.specs.items()}
    writer = WeightWriter(folder, specs, options.max_shard_size, options.verify != "none")
    total, errors = sum(spec.size for spec in specs.values()), []
    ready: dict[str, torch.Tensor] = {}  # merged, but not written: other weights of the same group are still missing
    try:
        # Merge the adapted modules, and write each as soon as its group is complete.
        modules = adapted_modules(plan.attached.wrapped)
        count = len(modules)
        while modules:
            key, module = modules.pop(0)  # drops the reference, so that a merged module is freed
            names = [name for name in plan.specs if name.startswith(f"{key}.")]
            if not any(name in outputs for name in names):
                continue  # tied head: its new rows are written with the embedding
            merged, error = _merge_module(plan, key, module, names, options, writer.wait)
            errors += [error] if error is not None else []
            ready |= {name: tensor for name, tensor in merged.items() if name in outputs}
            del module, merged
            _write_complete_groups(plan, outputs, ready, writer)
            progress(writer.bytes_written, total)

        # Write whole base weights that an adapter's file holds, and merged weights that share a tensor in the files
        # with weights that were not merged: those are loaded from the base.
        replacements = plan.attached.replacements
        ready |= {name: tensor.to(plan.specs[name].dtype) for name, tensor in replacements.items()}
        while ready:
            group = outputs[next(iter(ready))].group
            ready = _load_weights(plan, group) | ready
            _write_complete_groups(plan, outputs, ready, writer)

        # Copy everything that no adapter changes.
        for output in list(outputs.values()):
            if not writer.has(output.specs):
                _copy_or_convert(plan, output, writer)
                progress(writer.bytes_written, total)
        writer.finish()
        progress(writer.bytes_written, total)
    finally:
        writer.close()
    return WriteResult(count, max(errors, default=None), writer.checksums)


class OutputGroup(NamedTuple):
    """A group of parameters, and the tensors that they become in the files."""

    group: WeightGroup
    specs: dict[str, TensorSpec]


def _plan_outputs(plan: MergePlan) -> dict[str, OutputGroup]:
    """Return the output group of each saved parameter, by the parameter's name.

    Raises:
        ConfigError: a parameter is neither in the base nor in the adapter.
    """
    skeleton = plan.skeleton
    outputs: dict[str, OutputGroup] = {}
    whole_module_prefixes = tuple(
        f"{key}." for key, module in adapted_modules(plan.attached.wrapped) if isinstance(module, ModulesToSaveWrapper)
    )
    for name in plan.names:
        if name in outputs or (name not in skeleton.groups and name not in skeleton.missing):
            continue  # absent from the files, and from_pretrained does not miss it
        group = skeleton.groups.get(name) or WeightGroup((), (), (name,), None)
        if not group.sources and not name.startswith(whole_module_prefixes) and name not in plan.attached.replacements:
            missing = sorted(key for key in skeleton.missing if not key.startswith(whole_module_prefixes))
            raise ConfigError(
                f"base: {plan.source} does not fill the model: {len(missing)} weights are missing "
                f"({', '.join(missing[:3])})."
            )
        # Convert empty tensors to learn the names and shapes in the files.
        model_specs = {key: plan.specs[key] for key in group.targets}
        empty = {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for key, spec in model_specs.items()}
        files = file_tensors(skeleton.model, empty)
        specs = {key: TensorSpec(tensor.dtype, tuple(tensor.shape)) for key, tensor in files.items()}
        outputs |= dict.fromkeys(group.targets, OutputGroup(group, specs))
    return outputs


def _merge_module(
    plan: MergePlan, key: str, module: Any, names: list[str], options: MergeOptions, wait_for_writer: Callable[[], None]
) -> tuple[dict[str, torch.Tensor], float | None]:
    """Merge one module; return its weights by name, and the relative difference of its output (None: not verified).

    `names` are its weights in the base. Merging needs the most memory, so `wait_for_writer` is called first.

    Raises:
        ConfigError: PEFT cannot merge the module, or what it computes has changed.
    """
    # Bring the weights of the base and of the adapter into memory.
    attached = plan.attached
    if not isinstance(module, ModulesToSaveWrapper):
        _load_base_weights(plan, names)
        _fill_computed_buffers(plan, plain_module(module))
    fill_pending(attached, [name for name in attached.pending if name.startswith(f"{PEFT_PREFIX}{key}.")])
    if options.scale != 1:
        scale_module(module, options.scale)

    # Merge with PEFT's own code.
    error = None
    wait_for_writer()
    try:
        with torch.no_grad():
            if options.verify == "none":
                plain = merge_module(module, options.unmerge)
            else:
                plain, error = merge_module_checked(module, key, options.unmerge)
    except (ValueError, NotImplementedError, RuntimeError, TypeError, AttributeError) as reason:
        verb = "unmerged" if options.unmerge else "merged"
        raise ConfigError(
            f"adapter: {key} cannot be {verb}, a {attached.wrapped.peft_type.value} layer of "
            f"PEFT refuses it ({short_reason(reason)})."
        ) from None

    # Check that names and shapes are those of the base.
    merged = {f"{key}.{name}": tensor for name, tensor in plain.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in merged.items()}
    if shapes != {name: plan.specs[name].shape for name in names}:
        raise ConfigError(
            f"adapter: {key} cannot be merged, its merged weights have other names or shapes than the base's."
        )

    # Replace the adapted module by an empty plain one, to free its memory.
    parent, _, attribute = key.rpartition(".")
    setattr(plan.skeleton.model.get_submodule(parent), attribute, plain.to("meta"))
    return {name: tensor.to(plan.specs[name].dtype) for name, tensor in merged.items()}, error


def _load_base_weights(plan: MergePlan, names: list[str]) -> None:
    """Put the base's weights of these names into the model, in memory of their own."""
    attached, unfilled = plan.attached, set(names)
    for name in names:
        if name not in unfilled:
            continue
        module, attribute = attached.owners[name]
        old = getattr(module, attribute)
        if name in attached.replacements:
            weights = {name: attached.replacements.pop(name).to(plan.specs[name].dtype, copy=True)}
        elif old.device.type == "meta":
            weights = _load_weights(plan, plan.skeleton.groups[name])
        else:  # memory-mapped from the file, and perhaps changed when the adapter was initialized
            weights = {name: old.detach().clone()}
            release_pages(old)
        # A group may hold weights of other modules too; they are loaded again when their turn comes.
        for key in unfilled & weights.keys():
            put_tensor(*attached.owners[key], weights.pop(key))
            unfilled.remove(key)


def _fill_computed_buffers(plan: MergePlan, base: Any) -> None:
    """Compute buffers that no file holds, such as the scale of Gemma 3's embeddings, with transformers' own code."""
    empty = [name for name, buffer in base.named_buffers(recurse=False) if buffer.device.type == "meta"]
    for name in empty:
        base._buffers[name] = torch.empty_like(base._buffers[name], device="cpu")
    if empty:
        # `_init_weights` would overwrite the weights as well, so they are put aside on the meta device.
        weights = dict(base._parameters)
        base._parameters.update({name: weight.to("meta") for name, weight in weights.items() if weight is not None})
        plan.skeleton.model._init_weights(base)
        base._parameters.update(weights)


def _load_weights(plan: MergePlan, group: WeightGroup) -> dict[str, torch.Tensor]:
    """Load the base's weights of a group by name, rounded to 4 bits and back where the plan says so."""
    weights = load_group(plan.skeleton.model, group, plan.checkpoint, plan.specs)
    return {
        name: round_to_4_bits(tensor, plan.four_bit[name]) if name in plan.four_bit else tensor
        for name, tensor in weights.items()
    }


def _write_complete_groups(
    plan: MergePlan, outputs: dict[str, OutputGroup], ready: dict[str, torch.Tensor], writer: WeightWriter
) -> None:
    """Write the parameters in `ready` whose group is complete, and remove them from `ready`."""
    for name in list(ready):
        model_names = outputs[name].group.targets
        if name in ready and all(key in ready for key in model_names):
            tensors = file_tensors(plan.skeleton.model, {key: ready.pop(key) for key in model_names})
            for file_name in list(tensors):
                writer.write(file_name, tensors.pop(file_name))


def _copy_or_convert(plan: MergePlan, output: OutputGroup, writer: WeightWriter) -> None:
    """Copy the bytes if the base's files hold the tensors exactly as they are written, else load and convert them."""
    # Bytes can be copied only if dtype, shape and form in the files stay the same.
    group, places = output.group, plan.checkpoint.places
    base_names = group.sources if group.converter is None else output.specs
    # Not strict: if fewer tensors are written than read, the first condition below is false and they are converted.
    pairs = list(zip(output.specs, base_names, strict=False))
    if (
        len(pairs) == len(group.sources)
        and not plan.four_bit.keys() & set(group.targets)
        and all(base_name in places and places[base_name].spec == output.specs[name] for name, base_name in pairs)
    ):
        for name, base_name in pairs:
            writer.copy(name, places[base_name])
        return
    weights = _load_weights(plan, group)
    for name, tensor in file_tensors(plan.skeleton.model, weights).items():
        writer.write(name, tensor)
