"""Compares the weights in a model's files with the model that was loaded from them.

transformers leaves out each weight that has no place in the model, and casts each one to the dtype of its parameter,
whatever it means. It logs that as information. Some of it is harmless; the rest makes another model.
"""

from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from accel_llm.errors import ConfigError
from accel_llm.system.launcher import process_rank
from accel_llm.system.tensors import TensorSpec
from accel_llm.system.weights import open_weights

# Constants that old releases of transformers saved with the weights; they are computed now.
CONSTANTS = ("inv_freq", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "position_ids")


def compare_with_files(
    model: PreTrainedModel, unused: set[str], name: str, field: str, revision: str, as_stored: bool
) -> None:
    """Refuse a model that computes something else than its files say, and print what else differs from the files.

    `unused` are the weights that transformers left out. `as_stored`: the dtypes of the files should have been kept,
    because they are not quantized and nobody asked for another dtype.

    Raises:
        ConfigError: a weight was left out of a layer that the model has, or quantized numbers were read as weights.
    """
    _check_layers_complete(model, unused, name, field)
    specs, notes = _file_specs(name, revision), []
    notes.append(_describe_unused(unused, specs))
    if as_stored:
        _check_not_quantized(model, specs, name, field)
        notes.append(_describe_rounding(model, specs))
    if process_rank() == 0:
        for note in filter(None, notes):
            print(f"{name}: {note}", flush=True)


def _check_layers_complete(model: PreTrainedModel, unused: set[str], name: str, field: str) -> None:
    """Refuse a file with a further weight for a layer of the model: a bias, a scale, an adapter.

    Raises:
        ConfigError: there is one.
    """
    with_weights = {key for key, module in model.named_modules() if any(True for _ in module.parameters(recurse=False))}
    buffers = {key for key, _ in model.named_buffers()}
    parts = sorted(key for key in unused - buffers if _enclosing_modules(key) & with_weights)
    if parts:
        raise ConfigError(
            f"{field}: the files of {name} hold {len(parts)} weights ({', '.join(parts[:3])}) of layers that the model "
            "computes without them; correct its config.json (a bias or a quantization is switched off there), or merge "
            "the adapter that the files hold."
        )


def _enclosing_modules(key: str) -> set[str]:
    """Return every prefix of a dotted name, without the name itself."""
    parts = key.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def _file_specs(name: str, revision: str) -> dict[str, TensorSpec]:
    """Return dtype and shape of each tensor in the files of a loaded model; empty if they are pickles."""
    config = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    try:
        return open_weights(Path(config).parent).specs if config else {}
    except (OSError, ValueError, SafetensorError):
        return {}


def _check_not_quantized(model: PreTrainedModel, specs: dict[str, TensorSpec], name: str, field: str) -> None:
    """Refuse integers and 8-bit floats as weights of a model whose config does not say how they were quantized.

    Raises:
        ConfigError: there are some.
    """
    weights = {key for key, parameter in model.named_parameters() if parameter.is_floating_point()}
    for key in sorted(weights & specs.keys()):
        dtype = specs[key].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ConfigError(
                f"{field}: {key} of {name} is stored as {str(dtype).removeprefix('torch.')}, but its config.json has no "
                "quantization_config that gives these numbers a meaning; name the model in 16 or 32 bits."
            )


def _describe_unused(unused: set[str], specs: dict[str, TensorSpec]) -> str:
    """Say which weights of the files have no place in the model, and their share of all bytes."""
    names = sorted(key for key in unused if not key.endswith(CONSTANTS))
    if not names:
        return ""
    size, total = sum(specs[key].size for key in names if key in specs), sum(spec.size for spec in specs.values())
    share = f", {size / total:.1%} of their bytes," if size else ""
    return (
        f"{len(names)} tensors of its files ({', '.join(names[:3])}){share} have no place in this model and are left "
        "out, also of what is exported"
    )


def _describe_rounding(model: PreTrainedModel, specs: dict[str, TensorSpec]) -> str:
    """Say which weights were rounded to a shorter dtype, the one that config.json names."""
    parameters = {key: parameter for key, parameter in model.named_parameters() if key in specs}
    wider = [
        key
        for key, parameter in parameters.items()
        if parameter.is_floating_point() and specs[key].dtype.itemsize > parameter.dtype.itemsize
    ]
    if not wider:
        return ""
    stored, dtype = (str(value.dtype).removeprefix("torch.") for value in (specs[wider[0]], parameters[wider[0]]))
    return (
        f"{len(wider)} of {len(parameters)} weights, such as {wider[0]}, are {stored} in its files and were rounded to "
        f"{dtype}, the dtype in its config.json"
    )
