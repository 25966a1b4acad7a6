"""Plan a training: what it would take of GPUs and hosts under each launch YAML, and how large its rows may be.

    python launch/plan.py sft --model_name_or_path Qwen/Qwen3-8B --method qlora --max_length 4096 --gpu 24GB x 2
    python launch/plan.py sft --config launch/recipes/qwen3_24gb.yaml --gpu 40GB \
        --config_file accelerate_configs/zero3_offload.yaml

The first word names a training script: sft (the default), pretrain, dpo, kto, reward or classify; the rest are its own
options, --gpu and --config_file. Of the model it reads config.json alone: no weights, no data, and no GPU is needed.
"""

import sys
from pathlib import Path
from typing import Any

import accel_llm.config.early

from rich.console import Console
from rich.table import Table

from accel_llm.config.classify_options import ClassifyOptions
from accel_llm.config.options import SftOptions
from accel_llm.config.plan_options import PlanOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.report.plan_text import Lines, count_of, show_lines
from accel_llm.system.exit import run_script
from accel_llm.training import plan_only
from accel_llm.training.memory_search import ROOM, StrategyPlan, plan_strategies


class Options(PlanOptions, SftOptions):
    """The options of sft.py and of this script."""


class OptionsForPretrain(PlanOptions, PretrainOptions):
    """The same of pretrain.py."""


class OptionsForDpo(PlanOptions, DpoOptions):
    """The same of dpo.py."""


class OptionsForKto(PlanOptions, KtoOptions):
    """The same of kto.py."""


class OptionsForReward(PlanOptions, RewardOptions):
    """The same of reward.py."""


class OptionsForClassify(PlanOptions, ClassifyOptions):
    """The same of classify.py."""


SCRIPTS: dict[str, Any] = {"sft": Options, "pretrain": OptionsForPretrain, "dpo": OptionsForDpo, "kto": OptionsForKto}
SCRIPTS |= {"reward": OptionsForReward, "classify": OptionsForClassify}


def main() -> None:
    name = Path(sys.argv.pop(1)).stem if sys.argv[1:2] and Path(sys.argv[1]).stem in SCRIPTS else "sft"
    options, config, cards = plan_only.read_plan_options(SCRIPTS[name], name)
    chosen = Path(options.config_file) if options.config_file else None
    plans = plan_strategies(options, config, cards, chosen)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    show_lines(plan_only.describe_model(options, config, plans, cards))
    console.print(f"\nGB of each GPU{'' if cards.count == 1 else f' of {cards.count}'}, and of the host for all")
    console.print(memory_table(plans, cards.count, chosen))
    console.print(
        f"\nLargest micro-batch, in rows of {options.max_length:,} tokens, that fills {ROOM:.0%} of such a card"
    )
    console.print(size_table(plans, "rows"))
    rows = count_of(options.per_device_train_batch_size, "row")
    console.print(f"\nLargest row, in tokens, with micro-batches of {rows}")
    console.print(size_table(plans, "lengths"))
    console.print()
    remarks: Lines = [(plan.name, f"cannot run: {plan.refused}") for plan in plans if plan.refused]
    show_lines([*remarks, *plan_only.advise_plan(options, config, plans, cards, chosen, name)])


def memory_table(plans: list[StrategyPlan], count: int, chosen: Path | None) -> Table:
    """Return a line of terms for each launch YAML that can run; the chosen one is bold."""
    usable = [(plan, plan.estimate) for plan in plans if plan.estimate is not None]
    terms = list(dict.fromkeys(name for _, estimate in usable for name in estimate.terms))
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bright_black")
    table.add_column("launch YAML")
    for heading in ("total", *terms, "host"):
        table.add_column(heading, justify="right")
    for plan, estimate in usable:
        values = [estimate.total, *(estimate.terms.get(name, 0) for name in terms), count * sum(estimate.host.values())]
        style = "bold" if chosen is not None and plan.path.resolve() == chosen.resolve() else None
        table.add_row(plan.name, *(f"{value / 2**30:,.1f}" for value in values), style=style)
    return table


def size_table(plans: list[StrategyPlan], name: str) -> Table:
    """Return a line for each launch YAML that can run, with `rows` or `lengths` for each size of a card."""
    usable = [plan for plan in plans if plan.estimate is not None]
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bright_black")
    table.add_column("launch YAML")
    for card in getattr(usable[0], name) if usable else ():
        table.add_column(f"{card:g} GB", justify="right")
    for plan in usable:
        table.add_row(plan.name, *(f"{size:,}" if size else "-" for size in getattr(plan, name).values()))
    return table


if __name__ == "__main__":
    run_script(main)
