"""What became of every row and token: what each source held, and the one bin in which each part of it ended."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rich.markup import escape
from rich.table import Table

TRAINED, CUT, DROPPED = "trained", "cut", "dropped"
EXAMPLES = 3  # rows shown for each reason to drop one
QUANTITIES = ("rows", "supervised", "context")


def _lost(bin: str) -> bool:
    return bin.split(":")[0] in (CUT, DROPPED)


@dataclass
class Ledger:
    """Counts by source of rows and of tokens: `supervised` ones that carry a label, `context` ones that do not.

    `read` records what a source holds once it is encoded, `count` where that ended; the two must agree in `balance`.
    Bins are `trained`, `cut: <reason>` and `dropped: <reason>`, of which the last two are lost, or any other name for
    what is kept elsewhere (`held out`). A shortened row counts as trained, its missing tokens as `cut` with no row.
    `examples` are the first rows that were dropped for each reason, a sentence each.
    """

    inputs: dict[str, Counter[str]] = field(default_factory=dict)
    bins: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)
    turns: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def read(self, source: str, rows: int = 1, supervised: int = 0, context: int = 0) -> None:
        """Rows that a source holds, and the tokens they encode to before anything is cut."""
        _add(self.inputs.setdefault(source, Counter()), rows, supervised, context)

    def count(self, source: str, bin: str, rows: int = 1, supervised: int = 0, context: int = 0) -> None:
        """Rows and tokens that ended in `bin`."""
        _add(self.bins.setdefault(source, {}).setdefault(bin, Counter()), rows, supervised, context)

    def skip_turns(self, reason: str, turns: int = 1) -> None:
        """Turns of kept rows that were to be trained and carry no label; their tokens count as context."""
        self.turns[reason] += turns

    def note(self, sentence: str) -> None:
        """Something a reader of the numbers should know, kept once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def example(self, reason: str, sentence: str) -> None:
        """A row that was dropped; the first three of a reason are kept to be shown."""
        kept = self.examples.setdefault(reason, [])
        if len(kept) < EXAMPLES:
            kept.append(sentence)

    def balance(self) -> None:
        """Raises RuntimeError if some row or token of a source is in no bin, or in two."""
        for source in sorted(self.inputs.keys() | self.bins.keys()):
            held = self.inputs.get(source, Counter())
            binned = _sum(self.bins.get(source, {}).values())
            if wrong := [
                f"{held[quantity]} {quantity} read, {binned[quantity]} in bins"
                for quantity in QUANTITIES
                if held[quantity] != binned[quantity]
            ]:
                raise RuntimeError(f"the ledger of {source} does not balance: {'; '.join(wrong)}")

    def lost_share(self) -> tuple[float, float]:
        """Shares of all rows and of all supervised tokens that were cut or dropped."""
        held = _sum(self.inputs.values())
        lost = _sum(amount for bins in self.bins.values() for bin, amount in bins.items() if _lost(bin))
        return lost["rows"] / max(held["rows"], 1), lost["supervised"] / max(held["supervised"], 1)

    def merge(self, other: "Ledger") -> None:
        """Adds what another process or file counted."""
        for source, amount in other.inputs.items():
            self.read(source, **amount)
        for source, bins in other.bins.items():
            for bin, amount in bins.items():
                self.count(source, bin, **amount)
        self.turns.update(other.turns)
        for sentence in other.notes:
            self.note(sentence)
        for reason, sentences in other.examples.items():
            for sentence in sentences:
                self.example(reason, sentence)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `from_dict` reads it back."""
        return {
            "inputs": {source: dict(amount) for source, amount in self.inputs.items()},
            "bins": {source: {bin: dict(c) for bin, c in bins.items()} for source, bins in self.bins.items()},
            "turns_without_label": dict(self.turns),
            "notes": list(self.notes),
            "examples": {reason: list(sentences) for reason, sentences in self.examples.items()},
        }

    @classmethod
    def from_dict(cls, written: dict[str, Any]) -> "Ledger":
        return cls(
            inputs={source: Counter(amount) for source, amount in written["inputs"].items()},
            bins={s: {bin: Counter(c) for bin, c in bins.items()} for s, bins in written["bins"].items()},
            turns=Counter(written["turns_without_label"]),
            notes=list(written["notes"]),
            examples={reason: list(sentences) for reason, sentences in written.get("examples", {}).items()},
        )

    def table(self) -> Table:
        """Sources by bins, lost ones in red; turns without a label and notes below."""
        table = Table(title="Ledger", caption_justify="left")
        table.add_column("Source", overflow="fold")
        table.add_column("Bin")
        for heading in ("Rows", "Supervised tokens", "Context tokens"):
            table.add_column(heading, justify="right")
        for source, held in self.inputs.items():
            table.add_row(source, "read", *_cells(held), style="bold")
            for bin, amount in sorted(self.bins.get(source, {}).items(), key=lambda item: (_lost(item[0]), item[0])):
                table.add_row("", bin, *_cells(amount), style="red" if _lost(bin) else None)
        turns = [f"{turns:,} turns without a label: {reason}" for reason, turns in self.turns.items()]
        dropped = [f"dropped, {reason}: {one}" for reason, some in self.examples.items() for one in some]
        table.caption = "\n".join(map(escape, turns + self.notes + dropped)) or None
        return table


def _add(amount: Counter[str], rows: int, supervised: int, context: int) -> None:
    amount["rows"] += rows
    amount["supervised"] += supervised
    amount["context"] += context


def _sum(amounts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for amount in amounts:
        total.update(amount)
    return total


def _cells(amount: Counter[str]) -> list[str]:
    return [f"{amount[quantity]:,}" for quantity in QUANTITIES]
