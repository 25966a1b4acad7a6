"""The dtypes of the weights in a model's files: an export has the same."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from accel_llm.config.options import ModelOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.model.loading import stored_dtype
from accel_llm.model.stored_quantization import stored_quantization
from accel_llm.system.weights import open_weights


class StoredDtypes:
    """The dtype of each tensor in the files that a run starts from, and `main`, the dtype of most of their bytes.

    The files decide, because config.json may name another dtype or none. Where there are no 16 or 32-bit weights, as
    for a model from random weights or in a quantized format, `main` is the dtype in config.json, or float32.
    """

    def __init__(self, options: ModelOptions, config: PreTrainedConfig):
        self.by_name = {} if stored_quantization(config) else _float_dtypes(options)
        sizes: Counter[torch.dtype] = Counter()
        for dtype, size in self.by_name.values():
            sizes[dtype] += size
        self.main = sizes.most_common(1)[0][0] if sizes else stored_dtype(config)

    def cast(self, model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the weights of `model` in the dtypes of the files. One that the files do not name gets `main`.

        The names in `state` are those in the model; files of a base model have no prefix.
        """
        prefix = f"{model.base_model_prefix}."

        def cast_one(name: str, tensor: torch.Tensor) -> torch.Tensor:
            stored = self.by_name.get(name) or self.by_name.get(name.removeprefix(prefix))
            return tensor.to(stored[0] if stored else self.main) if tensor.is_floating_point() else tensor

        return {name: cast_one(name, tensor) for name, tensor in state.items()}


def _float_dtypes(options: ModelOptions) -> dict[str, tuple[torch.dtype, int]]:
    """Return dtype and size in bytes of each 16 or 32-bit floating-point tensor in the files of the model."""
    name = options.model_name_or_path
    if name is None or (isinstance(options, PretrainOptions) and options.config_name):
        return {}
    config = cached_file(name, "config.json", revision=options.revision, _raise_exceptions_for_missing_entries=False)
    try:
        specs = open_weights(Path(config).parent, options.allow_pickle).specs if config else {}
    except (OSError, ValueError, SafetensorError):  # removed since they were loaded
        return {}
    return {
        name: (spec.dtype, spec.size)
        for name, spec in specs.items()
        if spec.dtype.is_floating_point and spec.dtype.itemsize >= 2
    }
