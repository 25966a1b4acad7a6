"""What a ledger says beside its table, a line for each fact: the same on the screen and in report.html."""

import re
from collections import Counter

from accel_llm.chat.values import SUCH_AS
from accel_llm.data.ledger import QUANTITIES, Ledger, Unused

_SHOWN_UNUSED = 20  # names that have a line of their own
_SHOWN_EXAMPLES = 3  # of names in a line that sums up
_LARGE_RECORD = 0.05  # share of all characters above which a record has a line of its own

# Line breaks, other control characters, and halves of surrogate pairs, which UTF-8 cannot hold.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return `text` as one line that can be printed everywhere: control characters as `\\n` or `\\x1b`, for example."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def ledger_headings(ledger: Ledger) -> dict[str, str]:
    """Return the quantities of a ledger's table with their headings; where no token is trained by itself, all are alike."""
    if not any(amount["supervised"] for amount in ledger.inputs.values()):
        return {"rows": "Rows", "context": "Tokens"}
    return dict(zip(QUANTITIES, ("Rows", "Supervised tokens", "Context tokens"), strict=True))


def ledger_lines(ledger: Ledger) -> list[str]:
    """Return a line for each fact of a ledger that is no number of its table; a line holds no line break."""
    lines = [f"{turns:,} turns without a label: {reason}" for reason, turns in ledger.turns.items()]
    lines += _lines_on_lost(ledger)
    lines += _lines_on_remarks(ledger)
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


def _lines_on_remarks(ledger: Ledger) -> list[str]:
    """Return a line for each remark; those that differ only in an example, of which a row has one, share a line."""
    rows: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    for sentence, count in ledger.remarks.items():
        beginning, _, example = sentence.partition(SUCH_AS)
        rows[beginning] += count
        examples.setdefault(beginning, []).extend([example] if example else [])
    lines = []
    for beginning, names in examples.items():
        more = f" and {len(names) - _SHOWN_EXAMPLES:,} more" if len(names) > _SHOWN_EXAMPLES else ""
        shown = SUCH_AS + ", ".join(names[:_SHOWN_EXAMPLES]) + more if names else ""
        lines.append(f"{_count_rows(rows[beginning])}: {beginning}{shown}")
    return lines


def _lines_on_unused(ledger: Ledger) -> list[str]:
    """Return a line for each column or key that nothing reads, the largest first; small records share one line."""
    by_size = sorted(ledger.unused.items(), key=lambda item: -item[1].characters)
    small = {name: v for name, v in by_size if v.is_record and v.characters <= _LARGE_RECORD * ledger.characters}
    others = [(name, values) for name, values in by_size if name not in small]
    # A bad row is not read to its end, so nobody counts what is in it.
    characters = "all characters outside dropped rows" if ledger.examples else "all characters"
    lines = [
        f"Nothing reads {name}: {_count_rows(values.rows)}, {_share(ledger, values)} of {characters}, "
        f"for example: {values.example}"
        for name, values in others[:_SHOWN_UNUSED]
    ]
    if rest := others[_SHOWN_UNUSED:]:
        total = Unused(characters=sum(values.characters for _, values in rest))
        names = f"{len(rest):,} more names, such as {', '.join(name for name, _ in rest[:_SHOWN_EXAMPLES])}"
        lines.append(f"Nothing reads {names}: {_share(ledger, total)} of {characters}")
    if small:
        shown = list(small.items())[:_SHOWN_UNUSED]
        names = ", ".join(f"{name} ({_count_rows(values.rows)}, {_share(ledger, values)})" for name, values in shown)
        more = f", and {len(small) - _SHOWN_UNUSED:,} more" if len(small) > _SHOWN_UNUSED else ""
        lines.append(f"Records that nothing reads, with their rows and share of {characters}: {names}{more}")
    return lines


def _share(ledger: Ledger, values: Unused) -> str:
    return f"{values.characters / max(ledger.characters, 1):.1%}"


def _count_rows(rows: int) -> str:
    return f"{rows:,} row" if rows == 1 else f"{rows:,} rows"
