"""Checks that not more is lost than `max_lost` allows, and says what would help."""

from collections import Counter

from accel_llm.config.data_options import DataOptions
from accel_llm.data.encode import NOTHING_TRAINED
from accel_llm.data.ledger import Ledger, is_lost
from accel_llm.errors import ConfigError


def check_lost_share(
    ledger: Ledger, lengths: dict[str, int], options: DataOptions, cuts: str = "truncate or split", which: str = ""
) -> None:
    """Check that at most `max_lost` of the rows and of the supervised tokens are lost. `lengths`: percentile -> tokens.

    `cuts` are the values of `overlong` that shorten a row; empty if none may be. `which` are words that say which rows.

    Raises:
        ConfigError: more would be lost; the message names the reasons and a remedy.
    """
    rows, supervised = ledger.lost_share()
    if max(rows, supervised) <= options.max_lost:
        return

    # The reasons, with the number of rows over all sources.
    lost: dict[str, int] = {}
    for bins in ledger.bins.values():
        for name, amount in bins.items():
            if is_lost(name):
                lost[name] = lost.get(name, 0) + amount["rows"]
    reasons = [f"{name} ({count:,} rows)" if count else name for name, count in lost.items()]
    reasons += [f"{turns:,} turns without a label because {reason}" for reason, turns in ledger.turns.items()]

    if lost.keys() == {NOTHING_TRAINED}:
        remedy = _advise(ledger) if ledger.tried else "look at train_on, chat_template and the rows themselves"
    elif ledger.examples and not any("longer than" in name for name in lost):
        remedy = f"for example {next(iter(ledger.examples.values()))[0]}; mend such rows"
    else:
        remedy = (
            f"half of the rows have at most {lengths['50']:,} tokens, 95% {lengths['95']:,}, 99% {lengths['99']:,}, "
            f"the longest {lengths['100']:,}; raise max_length{f', set overlong: {cuts}' if cuts else ''}"
        )
    trains_tokens = any(amount["supervised"] for amount in ledger.inputs.values())  # not so texts with labels
    tokens = f" and {supervised:.1%} of the supervised tokens" if trains_tokens else ""
    raise ConfigError(
        f"max_lost: {rows:.1%} of the rows{which}{tokens} would be lost; allowed is "
        f"{options.max_lost:.1%}: {', '.join(reasons)}; {remedy}, or raise max_lost."
    )


def describe_losses(ledger: Ledger) -> str:
    """Return the bins of all sources with their rows, and the first row that was dropped as bad."""
    rows: Counter[str] = Counter()
    for bins in ledger.bins.values():
        for name, amount in bins.items():
            rows[name] += amount["rows"]
    bins = [f"{name} ({count:,} {'row' if count == 1 else 'rows'})" for name, count in rows.most_common() if count]
    examples = [sentence for sentences in ledger.examples.values() for sentence in sentences]
    return (", ".join(bins) or "nothing was read") + (f"; for example {examples[0]}" if examples else "")


def check_lost_turns(ledger: Ledger, turns: int, options: DataOptions) -> None:
    """Check that the template leaves at most `max_lost` of the assistant turns, `turns` in all, without a label.

    Raises:
        ConfigError: more turns would train nothing.
    """
    lost = ledger.turns
    share = sum(lost.values()) / max(turns, 1)
    if share > options.max_lost:
        reasons = ", ".join(f"{reason} ({count:,} turns)" for reason, count in lost.items())
        raise ConfigError(
            f"max_lost: {share:.1%} of the assistant turns would train nothing; allowed is {options.max_lost:.1%}: "
            f"{reasons}; {_advise(ledger)}, or raise max_lost."
        )


def _advise(ledger: Ledger) -> str:
    """Return which settings would train the lost turns; some of their conversations were tried with each."""
    cures = [setting for setting, count in ledger.remedies.items() if count == ledger.tried]
    if cures:
        return f"set {' or '.join(cures)}"
    helpful = [f"{setting} (helps {count} of {ledger.tried})" for setting, count in ledger.remedies.items() if count]
    return f"set {' or '.join(helpful)}, or another chat_template" if helpful else "set another chat_template"


def check_left_out(ledger: Ledger, options: DataOptions) -> None:
    """Check that the template leaves nothing out in more than `max_lost` of the rows.

    Raises:
        ConfigError: it does; the message names what.
    """
    rows = sum(amount["rows"] for amount in ledger.inputs.values())
    lost = {kind: count for kind, count in ledger.left_out.items() if count > options.max_lost * rows}
    if lost:
        kinds = ", ".join(f"{kind} (in {count:,} of {rows:,} rows)" for kind, count in lost.items())
        raise ConfigError(
            f"chat_template: the template does not write everything that the rows say; missing are {kinds}; allowed is "
            f"{options.max_lost:.1%} of the rows; use a template that writes them, or raise max_lost."
        )
