"""The memory of a training under each launch YAML, and the largest micro-batch and row that fit cards of some sizes.

The estimate is that of every start (memory_estimate.py). A step is followed for two or three sizes of a micro-batch, and
the figures of others lie on straight lines through them: what a step takes grows in proportion to its tokens. Packed
rows are one long row, so only the tokens of a micro-batch count; padded ones have a mask that grows with the square of
their length.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from accel_llm.adapters.refusals import backend_problems
from accel_llm.backend.launch_yaml import YAMLS, as_launched
from accel_llm.backend.strategy import engine
from accel_llm.config.options import TrainOptions
from accel_llm.config.plan_options import Cards
from accel_llm.errors import ConfigError
from accel_llm.model.option_problems import model_option_problems
from accel_llm.model.positions import position_limit
from accel_llm.training.empty_model import StepSettings
from accel_llm.training.empty_step import BatchSize, follow_steps
from accel_llm.training.memory_estimate import GB, MemoryEstimate, estimate_from, step_settings
from accel_llm.training.memory_layout import Layout, launched_layout
from accel_llm.training.optimizers import check_optimizer

CARD_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB of the common cards
ROOM = 0.95  # share of a card that the estimate may take; the rest is for gaps between tensors, and for the driver
MOST_ROWS, MOST_TOKENS = 4096, 2**20
LARGER = 16  # the other size that is followed, times that of the options
LEAST_LENGTH, STEP_OF_LENGTH = 256, 64  # of a row that is worth to be shown, and by which it is rounded down
ONE_CARD, SEVERAL_CARDS = ("single_gpu", "zero3_offload"), ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2")


@dataclass
class StrategyPlan:
    """A launch YAML: its estimate with the sizes of the options, or why it is refused; and what fits which card.

    `rows` and `lengths` are by the size of a card in GB: the largest number of rows of `max_length` in a micro-batch,
    and the largest row in micro-batches of the options; 0: nothing fits. `figures` are those of the followed step.
    """

    name: str
    path: Path
    refused: str = ""
    estimate: MemoryEstimate | None = None
    rows: dict[float, int] = field(default_factory=dict)
    lengths: dict[float, int] = field(default_factory=dict)
    figures: dict[str, int] = field(default_factory=dict)

    def fits(self, gigabytes: float) -> bool:
        """Return whether the estimate fits a card."""
        return self.estimate is not None and self.estimate.total <= ROOM * gigabytes * GB


def plan_strategies(
    options: TrainOptions, config: PreTrainedConfig, cards: Cards, chosen: Path | None = None
) -> list[StrategyPlan]:
    """Plan each launch YAML of this project that makes sense for so many cards, and the `chosen` one.

    Raises:
        ConfigError: the chosen YAML cannot be read, or the model or method cannot be followed.
    """
    names = ONE_CARD if cards.count == 1 else SEVERAL_CARDS
    paths = [YAMLS / f"{name}.yaml" for name in names]
    if chosen is not None and chosen.resolve() not in paths:
        paths.append(chosen)
    sizes = sorted({*CARD_SIZES, cards.gigabytes})
    followed: dict[StepSettings, dict[BatchSize, dict[str, int]]] = {}
    plans = []
    for path in paths:
        with as_launched(path, cards.count):
            plan = StrategyPlan(path.stem, path, refused=_refusal(options))
            plans.append(plan)
            if not plan.refused:
                layout = launched_layout(cards.count, "cuda")
                settings = step_settings(options, layout)
                if settings not in followed:
                    followed[settings] = follow_steps(options, config, settings, _sizes_to_follow(options, config))
                _fill_plan(plan, options, config, layout, followed[settings], sizes)
    return plans


def _refusal(options: TrainOptions) -> str:
    """Return why the options cannot run under the launch YAML in force; empty if they can."""
    problems = backend_problems(options) + model_option_problems(options)
    try:
        check_optimizer(options, "cuda", engine())
    except ConfigError as error:
        problems += error.problems
    return problems[0].rstrip(".") if problems else ""


def _sizes_to_follow(options: TrainOptions, config: PreTrainedConfig) -> list[BatchSize]:
    rows, length = options.per_device_train_batch_size, options.max_length
    sizes = [(rows, length), (LARGER * rows, length)]
    return sizes if options.packing else [*sizes, (rows, min(LARGER * length, position_limit(config) or MOST_TOKENS))]


def _fill_plan(
    plan: StrategyPlan,
    options: TrainOptions,
    config: PreTrainedConfig,
    layout: Layout,
    followed: dict[BatchSize, dict[str, int]],
    cards: Sequence[float],
) -> None:
    rows, length = options.per_device_train_batch_size, options.max_length
    layers = {"layers": config.get_text_config().num_hidden_layers}
    points = {size: figures | layers for size, figures in followed.items()}
    by_rows = {n * length: figures for (n, tokens), figures in points.items() if tokens == length}
    by_length = {rows * tokens: figures for (n, tokens), figures in points.items() if n == rows}
    if options.packing:
        by_length = by_rows

    def fits(known: dict[int, dict[str, int]], card: float, unit: int, number: int) -> bool:
        return estimate_from(options, layout, between(known, unit * number)).total <= ROOM * card * GB

    plan.figures = points[rows, length]
    plan.estimate = estimate_from(options, layout, plan.figures)
    longest, least = position_limit(config) or MOST_TOKENS, max(LEAST_LENGTH, options.virtual_tokens + 2)
    for card in cards:
        plan.rows[card] = _largest(partial(fits, by_rows, card, length), 1, MOST_ROWS)
        found = _largest(partial(fits, by_length, card, rows), least, longest)
        plan.lengths[card] = found if found == longest else found // STEP_OF_LENGTH * STEP_OF_LENGTH


def between(points: dict[int, dict[str, int]], size: int) -> dict[str, int]:
    """Return the figures of a size on straight lines between those that were followed, and beyond them."""
    known = sorted(points)
    if size in points or len(known) == 1:
        return points.get(size) or points[known[0]]
    k = min(max(bisect_left(known, size), 1), len(known) - 1)
    low, high = known[k - 1], known[k]
    share = (size - low) / (high - low)
    first, second = points[low], points[high]
    return {name: max(0, round(value + share * (second[name] - value))) for name, value in first.items()}


def _largest(fits: Callable[[int], bool], least: int, most: int) -> int:
    """Return the largest number from `least` to `most` that fits, 0 if none does; less always fits if more does."""
    if not fits(least):
        return 0
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if fits(middle) else (least, middle - 1)
    return least
