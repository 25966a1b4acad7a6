"""The ledger: how many rows and tokens each source holds, and the bin in which every one of them ends."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

TRAINED, CUT, DROPPED = "trained", "cut", "dropped"
EXAMPLES_PER_REASON = 3  # rows shown for each reason to drop one
QUANTITIES = ("rows", "supervised", "context")


def is_lost(bin: str) -> bool:
    """Tell whether the rows and tokens of `bin` are lost: they were cut or dropped, for whatever reason."""
    return bin.split(":")[0] in (CUT, DROPPED)


@dataclass
class Unused:
    """A column, or a key of messages, that nothing reads: what the rows lose by it."""

    rows: int = 0
    characters: int = 0
    example: str = ""
    is_record: bool = False  # plainly a record of where the row comes from: an id, a source, a score

    def add(self, other: "Unused") -> None:
        """Add what another part of the rows has under the same name. Values of one row that are no record decide."""
        self.rows += other.rows
        self.characters += other.characters
        self.is_record = other.is_record if not self.example else self.is_record and other.is_record
        self.example = self.example or other.example


@dataclass
class Ledger:
    """Counts of rows and tokens for each source. `supervised` tokens carry a label, `context` tokens do not.

    `read` records what a source holds after encoding, `count` records in which bin it ended; `balance` checks that the
    two agree. A bin is `trained`, `cut: <reason>` or `dropped: <reason>`. Any other name is a bin of rows that are not
    lost, such as `held out`. A row that was shortened counts as trained; the tokens it lost count as `cut`, with 0
    rows.
    """

    inputs: dict[str, Counter[str]] = field(default_factory=dict)  # source -> amounts
    bins: dict[str, dict[str, Counter[str]]] = field(default_factory=dict)  # source -> bin -> amounts
    turns: Counter[str] = field(default_factory=Counter)  # reason -> turns without a label
    notes: list[str] = field(default_factory=list)
    remarks: Counter[str] = field(default_factory=Counter)  # sentence -> rows that it is true of
    left_out: Counter[str] = field(default_factory=Counter)  # what the template does not write -> rows that have it
    remedies: Counter[str] = field(default_factory=Counter)  # setting -> lost conversations, tried, that it would train
    tried: int = 0  # lost conversations that were tried with other settings
    unused: dict[str, Unused] = field(default_factory=dict)  # column, or key of messages, that nothing reads
    characters: int = 0  # of all rows, everything in them
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> a sentence for each of the first rows

    def read(self, source: str, rows: int = 1, supervised: int = 0, context: int = 0) -> None:
        """Add rows that a source holds, with their tokens before anything is cut."""
        _add(self.inputs.setdefault(source, Counter()), rows, supervised, context)

    def count(self, source: str, bin: str, rows: int = 1, supervised: int = 0, context: int = 0) -> None:
        """Add rows and tokens that ended in `bin`."""
        _add(self.bins.setdefault(source, {}).setdefault(bin, Counter()), rows, supervised, context)

    def skip_turns(self, reason: str, turns: int = 1) -> None:
        """Add turns that should train but carry no label. Their row is trained; their tokens count as context."""
        self.turns[reason] += turns

    def note(self, sentence: str) -> None:
        """Add a remark on the numbers; the same remark is kept once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def remark(self, sentence: str, rows: int = 1) -> None:
        """Count rows that a remark is true of."""
        self.remarks[sentence] += rows

    def leave_unused(self, name: str, values: Unused) -> None:
        """Count a column, or a key of messages, that nothing reads."""
        self.unused.setdefault(name, Unused()).add(values)

    def example(self, reason: str, sentence: str) -> None:
        """Add a sentence about a row that was dropped; the first three of each reason are kept."""
        sentences = self.examples.setdefault(reason, [])
        if len(sentences) < EXAMPLES_PER_REASON:
            sentences.append(sentence)

    def balance(self) -> None:
        """Check that each row and token of each source is in exactly one bin.

        Raises:
            RuntimeError: the amounts that were read and those in the bins differ.
        """
        for source in sorted(self.inputs.keys() | self.bins.keys()):
            amount = self.inputs.get(source, Counter())
            in_bins = _sum(self.bins.get(source, {}).values())
            differences = [
                f"{amount[quantity]} {quantity} read, {in_bins[quantity]} in bins"
                for quantity in QUANTITIES
                if amount[quantity] != in_bins[quantity]
            ]
            if differences:
                raise RuntimeError(f"the ledger of {source} does not balance: {'; '.join(differences)}")

    def lost_share(self) -> tuple[float, float]:
        """Return the lost share of all rows and the lost share of all supervised tokens, each from 0 to 1."""
        total = _sum(self.inputs.values())
        lost = _sum(amount for bins in self.bins.values() for bin, amount in bins.items() if is_lost(bin))
        return lost["rows"] / max(total["rows"], 1), lost["supervised"] / max(total["supervised"], 1)

    def merge(self, other: "Ledger") -> None:
        """Add everything that another ledger counted."""
        for source, amount in other.inputs.items():
            self.read(source, **amount)
        for source, bins in other.bins.items():
            for bin, amount in bins.items():
                self.count(source, bin, **amount)
        self.turns.update(other.turns)
        for sentence in other.notes:
            self.note(sentence)
        self.remarks.update(other.remarks)
        self.left_out.update(other.left_out)
        self.remedies.update(other.remedies)
        self.tried += other.tried
        self.characters += other.characters
        for name, values in other.unused.items():
            self.leave_unused(name, values)
        for reason, sentences in other.examples.items():
            for sentence in sentences:
                self.example(reason, sentence)

    def to_dict(self) -> dict[str, Any]:
        """Return the ledger as plain values for JSON; `from_dict` reads them back."""
        return {
            "inputs": {source: dict(amount) for source, amount in self.inputs.items()},
            "bins": {source: {bin: dict(c) for bin, c in bins.items()} for source, bins in self.bins.items()},
            "turns_without_label": dict(self.turns),
            "notes": list(self.notes),
            "remarks": dict(self.remarks),
            "left_out": dict(self.left_out),
            "remedies": dict(self.remedies),
            "tried": self.tried,
            "unused": {name: asdict(values) for name, values in self.unused.items()},
            "characters": self.characters,
            "examples": {reason: list(sentences) for reason, sentences in self.examples.items()},
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Ledger":
        """Rebuild a ledger from the plain values of `to_dict`."""
        return cls(
            inputs={source: Counter(amount) for source, amount in values["inputs"].items()},
            bins={s: {bin: Counter(c) for bin, c in bins.items()} for s, bins in values["bins"].items()},
            turns=Counter(values["turns_without_label"]),
            notes=list(values["notes"]),
            # The ledger of an older run has none of these.
            remarks=Counter(values.get("remarks", {})),
            left_out=Counter(values.get("left_out", {})),
            remedies=Counter(values.get("remedies", {})),
            tried=values.get("tried", 0),
            unused={name: Unused(**fields) for name, fields in values.get("unused", {}).items()},
            characters=values.get("characters", 0),
            examples={reason: list(sentences) for reason, sentences in values.get("examples", {}).items()},
        )


def _add(amount: Counter[str], rows: int, supervised: int, context: int) -> None:
    amount["rows"] += rows
    amount["supervised"] += supervised
    amount["context"] += context


def _sum(amounts: Iterable[Counter[str]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for amount in amounts:
        total.update(amount)
    return total
