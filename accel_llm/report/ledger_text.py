"""What a ledger says beside its table, a line for each fact: the same on the screen and in report.html."""

import re

from accel_llm.data.ledger import Ledger, Unused

# Line breaks, other control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return `text` as one line that can be printed everywhere: control characters as `\\n` or `\\x1b`, for example."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def ledger_lines(ledger: Ledger) -> list[str]:
    """Return a line for each fact of a ledger that is no number of its table; a line holds no line break."""
    lines = [f"{turns:,} turns without a label: {reason}" for reason, turns in ledger.turns.items()]
    lines += _lines_on_lost(ledger)
    lines += [f"{_count_rows(rows)}: {sentence}" for sentence, rows in ledger.remarks.items()]
    lines += _lines_on_unused(ledger)
    lines += ledger.notes
    lines += [f"dropped, {reason}: {row}" for reason, rows in ledger.examples.items() for row in rows]
    return list(map(one_line, lines))


def _lines_on_lost(ledger: Ledger) -> list[str]:
    """Return what the template does not write, and the settings that would train the lost conversations."""
    lines = [f"{_count_rows(rows)}: the template does not write {what}" for what, rows in ledger.left_out.items()]
    lines += [
        f"{setting} would train {count:,} of the {ledger.tried:,} lost conversations that were tried with it"
        for setting, count in ledger.remedies.items()
        if count
    ]
    return lines


def _lines_on_unused(ledger: Ledger) -> list[str]:
    """Return a line for each column or key that nothing reads, the largest first; plain records share one line."""
    by_size = sorted(ledger.unused.items(), key=lambda item: -item[1].characters)
    lines = [
        f"Nothing reads {name}: {_count_rows(values.rows)}, {_share(ledger, values)} of all characters, "
        f"for example: {values.example}"
        for name, values in by_size
        if not values.is_record
    ]
    records = {name: values for name, values in by_size if values.is_record}
    if records:
        names = ", ".join(f"{name} ({_share(ledger, values)})" for name, values in records.items())
        lines.append(f"Records that nothing reads, with their share of all characters: {names}")
    return lines


def _share(ledger: Ledger, values: Unused) -> str:
    return f"{values.characters / max(ledger.characters, 1):.1%}"


def _count_rows(rows: int) -> str:
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"
