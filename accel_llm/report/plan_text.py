"""What a run says before it starts: settings, data, steps, evaluations, checkpoints, as lines with a name on the left."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.table import Table
from rich.text import Text

from accel_llm.config.options import SCHEDULES_BY_OPTION, Options, TrainOptions, count_decay_steps, count_warmup_steps
from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.data.rows import Rows
from accel_llm.data.stream import TrainingPlan, padding_share
from accel_llm.report.display import show_ledger
from accel_llm.report.ledger_text import one_line
from accel_llm.report.metrics import console
from accel_llm.system.secrecy import hide_secrets

Lines = list[tuple[str, str]]  # name and text of each line
# They have lines of their own, or say what is shown and not how the run is.
_NOT_LISTED = {
    *("model_name_or_path", "config_name", "train_files", "eval_files", "output_dir", "cache_dir"),
    *("dry_run", "check_only", "verbose", "gpu", "config_file"),
}
_SOURCES_SHOWN = 6
_NOT_TO_BREAK = "\N{NO-BREAK SPACE}"


def show_lines(lines: Lines) -> None:
    """Print lines with their names on the left. On a terminal long ones are wrapped beside their name, else never."""
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        room = max(console.width - width, 20) if console.is_terminal else len(text) + 1
        wrapped = textwrap.wrap(text, room, break_on_hyphens=False, break_long_words=False) or [""]
        for k, part in enumerate(wrapped):
            head = Text(name.ljust(width) if k == 0 else " " * width, style="bold")
            console.print(head.append(part.replace(_NOT_TO_BREAK, " "), style="not bold"), soft_wrap=True)


def show_settings(options: Options) -> None:
    """Print all options, with those in bold that the person has set."""
    table = Table(title="Settings", show_header=False, box=None)
    for name, value in options.model_dump().items():
        style = "bold" if name in options.model_fields_set else "bright_black"
        table.add_row(name, Text(one_line(hide_secrets(str(value)))), style=style)
    console.print(table)


def changed_settings(options: Options) -> str:
    """Return the options that the person has set to another value than their default, as `name=value, ...`.

    Places are left out: the lines above say where model, data and output are.
    """
    changed = []
    for name, field in type(options).model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        value = getattr(options, name)
        if name in options.model_fields_set and name not in _NOT_LISTED and value != default:
            changed.append(f"{field.alias or name}={one_line(hide_secrets(_as_typed(value)))}")
    return ", ".join(item.replace(" ", _NOT_TO_BREAK) for item in changed) or "all as by default"


def _as_typed(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return " ".join(f"{name}={part}" for name, part in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool | None) else str(value)


def describe_ledger(ledger: Ledger) -> str:
    """Say in one sentence what became of the rows of each source that lost none."""
    sources = []
    for source, total in ledger.inputs.items():
        bins = {name: amount["rows"] for name, amount in ledger.bins.get(source, {}).items()}
        if not _is_lossy(ledger, source):
            parts = [f"{count:,} {name}" for name, count in bins.items() if count]
            what = "" if len(parts) == 1 else f" ({', '.join(parts)})"
            sources.append(f"{one_line(source)}: {count_of(total['rows'], 'row')}{what}".replace(" ", _NOT_TO_BREAK))
    more = len(sources) - _SOURCES_SHOWN
    listed = "; ".join(sources[:_SOURCES_SHOWN]) + (f"; and {more:,} more sources" if more > 0 else "")
    lossy = count_of(sum(_is_lossy(ledger, source) for source in ledger.inputs), "source")
    if not sources:
        return f"{lossy} with losses, above"
    return (
        f"{listed}; nothing lost" if len(sources) == len(ledger.inputs) else f"{listed}; and {lossy} with losses, above"
    )


def show_lost_rows(ledger: Ledger) -> None:
    """Print the ledger of the sources that lost rows or tokens, and all that a ledger says beside its numbers."""
    lossy = [source for source in ledger.inputs if _is_lossy(ledger, source)]
    kept = {"inputs": {s: ledger.inputs[s] for s in lossy}, "bins": {s: ledger.bins[s] for s in lossy}}
    show_ledger(replace(ledger, **kept))


def _is_lossy(ledger: Ledger, source: str) -> bool:
    empty: Counter[str] = Counter()
    return any(is_lost(name) and (amount - empty) for name, amount in ledger.bins.get(source, {}).items())


def describe_rows(rows: Rows, plan: TrainingPlan, options: TrainOptions) -> str:
    """Describe documents and tokens of an epoch, and how full its packed rows are, in one sentence.

    If rows are not packed, it says how much padding they get instead. Virtual tokens of each document take their room in
    the rows. Without them a prompt that two answers share in a packed row counts once.
    """
    virtual, max_length = options.virtual_tokens, options.max_length
    tokens, units = int(rows.offsets[-1]), count_of(len(rows), "document")
    if plan.bins is None:
        mean = f"{tokens / len(rows):,.0f} tokens on average in the first {len(rows):,}"
        return f"streamed; {mean}, in rows of at most {max_length:,}"
    supervised = f" ({rows.trained_tokens:,} trained)"
    if rows.shared is not None:
        units = count_of(len(rows) // 2, "pair")
        tokens -= 0 if virtual or not options.packing else int(rows.shared[::2].sum())
    elif rows.targets is not None:
        units, supervised = count_of(len(rows), "text"), ""
    fill = f"{(tokens + virtual * len(rows)) / (plan.bins * max_length):.1%} full"
    if plan.full is not None:
        fill = f"{plan.full:.1%} full"
    if not options.packing:
        share = padding_share(rows, options, plan.rows_per_step)
        fill = f"padding: {share:.1%} of the tokens that are computed"
    epochs = {one_line(name): f"{times:.3g} times" for name, times in plan.epochs_of_sources(plan.bins).items()}
    passed = [f"{name} {'once' if times == '1 times' else times}" for name, times in epochs.items()]
    fill += f"; an epoch passes through {_listed(passed)}" if passed else ""
    beside = f" beside {virtual:,} virtual ones each" if virtual else ""
    return (
        f"{units}, {tokens:,} tokens{supervised}{beside} in {count_of(plan.bins, 'row')} of at most "
        f"{max_length:,} ({fill})"
    )


def describe_steps(plan: TrainingPlan) -> str:
    """Say how many steps the run takes from here on, of how many rows, and how many epochs that is."""
    total, left = plan.total_steps, plan.total_steps - plan.first_step
    of = count_of(plan.rows_per_step, "row")
    grow = min(total, plan.batch_warmup_steps)
    grow_text = f" (the first {grow:,} grow up to that, from {plan.rows_in(0):,})" if grow > plan.first_step else ""
    steps = f"{total:,} of {of} each{grow_text}"
    if plan.bins is not None:
        epochs = f"{plan.epoch(total):g}"
        steps += f", {epochs} epoch{'' if epochs == '1' else 's'}"
    if plan.total_rows is None:
        steps += ", as max_steps says"
    if plan.first_step:
        steps = f"{left:,} left after step {plan.first_step:,}, of {steps}"
    return steps


def describe_evaluations(plan: TrainingPlan, options: TrainOptions, rows: int) -> str:
    """Say how often the run evaluates, after which steps, and on how many `rows`; 0: there are none."""
    if not rows:
        return "none: there are no rows for it (eval_files, eval_share)"
    every = options.eval_steps
    due = _due_steps(plan, every)
    at_start = options.eval_on_start and plan.first_step == 0
    parts = ["before the first step"] if at_start else []
    parts += [_every(every, due), "at the end"] if due else ["at the end"]
    generated = f", with {min(options.eval_generate, rows):,} generated answers" if options.eval_generate else ""
    early = options.early_stopping_patience
    stops = f"; {early:,} in a row without a new best stop the run" if early else ""
    return f"{at_start + len(due) + 1:,}: {_listed(parts)}, on {count_of(rows, 'row')}{generated}{stops}"


def describe_saves(plan: TrainingPlan, options: TrainOptions) -> str:
    """Say how often the run saves a checkpoint, after which steps, and how many of them are kept."""
    due = _due_steps(plan, options.save_steps)
    parts = [_every(options.save_steps, due), "at the end"] if due else ["at the end"]
    best = options.metric_for_best_model
    if best:
        parts.insert(0, "at each new best")
    kept = checkpoints_kept(plan, options)
    newest = f"the newest {kept - bool(best):,}" if kept - bool(best) > 1 else "the newest one"
    return f"{len(due) + 1:,}{' or more' if best else ''}: {_listed(parts)}; {newest}{' and the best one' if best else ''} kept"


def checkpoints_kept(plan: TrainingPlan, options: TrainOptions) -> int:
    """Return how many checkpoints are on the disk when the run ends, with the best one if there is a metric for it."""
    best = options.metric_for_best_model is not None
    saves = len(_due_steps(plan, options.save_steps)) + 1 + (len(_due_steps(plan, options.eval_steps)) if best else 0)
    return min(saves, options.save_total_limit) + best


def checkpoints_at_once(plan: TrainingPlan, options: TrainOptions) -> int:
    """Return how many checkpoints are on the disk at once: an old one goes when the new one is complete."""
    saves = len(_due_steps(plan, options.save_steps)) + 1
    kept = checkpoints_kept(plan, options)
    return kept + (saves > options.save_total_limit or options.metric_for_best_model is not None)


def _due_steps(plan: TrainingPlan, every: int | None) -> range:
    """Return the steps from here on, before the last one, after which something is due that is due `every` so many."""
    if not every:
        return range(0)
    return range(plan.first_step // every * every + every, plan.total_steps, every)


def _every(every: int | None, due: Sequence[int]) -> str:
    if len(due) == 1:
        return f"after step {due[0]:,}"
    return "every step" if every == 1 else f"every {every:,} steps"


def _listed(parts: list[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural where it is one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def describe_size(size: float) -> str:
    """Return a number of bytes in words; a GB has 2^30, as everywhere here."""
    for unit, name in ((2**30, "GB"), (2**20, "MB")):
        if size >= unit:
            return f"{size / unit:,.1f} {name}" if size < 100 * unit else f"{size / unit:,.0f} {name}"
    return f"{size / 1024:,.1f} kB"


def describe_time(seconds: float) -> str:
    """Return a time in its two largest units."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def plan_warnings(options: TrainOptions, plan: TrainingPlan) -> list[str]:
    """Return a sentence for each way in which so short a run differs from what its options say."""
    warnings = []
    # A step that is larger than an epoch.
    rows, bins = plan.rows_per_step, plan.bins
    if bins is None:
        pass
    elif bins < rows and (plan.total_rows is None or bins < plan.total_rows):
        warnings.append(
            f"total_batch_size: a step takes {rows:,} rows, but an epoch has {bins:,}; each row is trained "
            f"{rows / bins:.3g} times in a step on average."
        )
    elif bins < rows:
        warnings.append(
            f"total_batch_size: a step takes {rows:,} rows, but the run has {plan.total_rows:,}; its only step has fewer."
        )

    # Too few evaluations to stop early: the first one is always a new best, and the last one comes after the last step.
    patience, evaluations = options.early_stopping_patience, (plan.total_steps - 1) // (options.eval_steps or 1)
    if patience and evaluations <= patience:
        warnings.append(
            f"early_stopping_patience: the run has {evaluations:,} evaluations before its last step, too few for "
            f"{patience:,} in a row after a best one; it never stops early."
        )

    # A warmup without a peak, or one that reaches into the decay.
    total, warmup = plan.total_steps, count_warmup_steps(options.warmup_steps, plan.total_steps)
    if options.lr_scheduler_type not in SCHEDULES_BY_OPTION["warmup_steps"]:
        return warnings
    decay = count_decay_steps(options.decay_share, options.decay_steps, total)
    if warmup >= total:
        warnings.append(
            f"warmup_steps: the warmup lasts to step {warmup:,}, and the run to step {total:,}; the learning rate "
            f"reaches {total / (warmup + 1):.1%} of its peak, at the last step."
        )
    elif options.lr_scheduler_type == "warmup_stable_decay" and warmup + decay > total:
        warnings.append(
            f"{'decay_steps' if options.decay_steps else 'decay_share'}: after {warmup:,} of {total:,} steps of warmup the decay has {total - warmup:,} steps instead "
            f"of {decay:,}, and the learning rate is never stable."
        )
    return warnings
