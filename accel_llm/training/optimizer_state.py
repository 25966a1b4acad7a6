"""How much memory each optimizer keeps for the weights that it trains, known before it is built."""

from typing import get_args

from torch import nn

from accel_llm.adapters.budget import budget_bytes
from accel_llm.config.options import OptimOptions
from accel_llm.training.own_optimizers import embedding_weight_ids, is_vector

SMALLEST_8BIT, SMALLEST_PAGED = 4096, 100_000  # numbers in a weight; bitsandbytes treats smaller ones in the plain way
NUMBERS_PER_SCALE = 256  # 8-bit numbers with one float32 scale
# Float32 numbers that a step holds for each number of the largest weight, besides the state.
IN_A_STEP = {"adafactor": 2, "muon": 3}


def optimizer_bytes(model: nn.Module, device_type: str) -> dict[str, int]:
    """Return for each optimizer the bytes of its state on the device, and of what a step adds to it for a moment.

    The names are those of the option `optim`, and these with " step" for the second kind. Weights and gradients are
    float32. A paged state on a GPU lies in host memory, from where CUDA brings what is needed: the names with " paged".
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    ends = embedding_weight_ids(model)
    largest = max((parameter.numel() for parameter in trained), default=0)
    figures: dict[str, int] = {}
    for name in optimizer_names():
        on_device, at_all = (
            sum(_state_bytes(name, p, id(p) in tables, id(p) in ends, device) for p in trained)
            for device in (device_type, "cpu")
        )
        figures[name], figures[f"{name} paged"] = budget_bytes(model) + on_device, at_all - on_device
        figures[f"{name} step"] = 4 * IN_A_STEP.get(name, 0) * largest
    return figures


def optimizer_names() -> tuple[str, ...]:
    """Return all values of the option `optim`."""
    return get_args(OptimOptions.model_fields["optim"].annotation)


def _state_bytes(name: str, parameter: nn.Parameter, is_table: bool, is_end: bool, device_type: str) -> int:
    """Return the bytes for one weight. `is_table`: of an embedding; `is_end`: of an embedding or of the output head."""
    numbers, moments = parameter.numel(), 2
    if name == "sgd":
        return 0
    if name == "adafactor" and parameter.ndim > 1:  # sums over rows and over columns
        return 4 * (numbers // parameter.shape[-1] + numbers // parameter.shape[-2])
    if name in ("adafactor", "lion") or (
        name == "muon" and parameter.ndim == 2 and not (is_end or is_vector(parameter))
    ):
        moments = 1
    in_8_bits = name.endswith("8bit") and numbers >= SMALLEST_8BIT and not is_table
    scales = 4 * -(-numbers // NUMBERS_PER_SCALE) if in_8_bits else 0
    paged = name.startswith("paged") and device_type == "cuda" and numbers >= SMALLEST_PAGED
    return moments * ((0 if paged else numbers * (1 if in_8_bits else 4)) + scales)
