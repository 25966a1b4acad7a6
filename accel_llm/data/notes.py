"""Notes in the ledger on all rows together: shares of the sources, lost and common rows to evaluate on."""

import numpy as np

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.data.answers import Pairs
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.order import mix_sources
from accel_llm.data.rows import Rows
from accel_llm.errors import DataError


def note_shares(ledger: Ledger, rows: Rows | Pairs, sources: list[Source], options: DataOptions, seed: int) -> None:
    """Note the share of each source in a mixture by weight; a source with a weight must have a row left.

    Raises:
        DataError: it has none.
    """
    weights, counts = [source.weight for source in sources], np.bincount(rows.source, minlength=len(sources))
    if None in weights:
        return
    for source, count in zip(sources, counts, strict=True):
        if not count:
            raise DataError(
                f"train_files: {source.label} has a weight of {source.weight}, but no row to train on is left."
            )

    if options.order == "shuffle":
        total = sum(float(source.weight or 0) for source in sources)
        parts = [
            f"{source.label} gives {float(source.weight or 0) / total:.1%} of the rows (it has {count:,} "
            f"{'document' if count == 1 else 'documents'}, {rows.lengths[rows.source == k].sum():,} tokens)"
            for k, (source, count) in enumerate(zip(sources, counts, strict=True))
        ]
        ledger.note(f"Mixed by weight: {'; '.join(parts)}.")
        return
    epoch = mix_sources(rows.source, weights, seed)
    source_numbers, lengths = rows.source[epoch], rows.lengths[epoch]
    shares = []
    for k, source in enumerate(sources):
        mask = source_numbers == k
        shares.append(
            f"{source.label} {mask.mean():.1%} of the rows ({mask.sum():,} drawn from {counts[k]:,}) "
            f"and {lengths[mask].sum() / lengths.sum():.1%} of the tokens"
        )
    ledger.note(f"Mixed by weight: an epoch is {'; '.join(shares)}.")


def note_cuts(ledger: Ledger, options: DataOptions, labelled: bool) -> None:
    """Note what `overlong: truncate` does with rows that are too long, if there are any."""
    too_long = any("longer than max_length" in name for bins in ledger.bins.values() for name in bins)
    if options.overlong == "truncate" and too_long:
        ledger.note(
            f"overlong: truncate leaves of a longer text its first {options.max_length:,} tokens."
            if labelled
            else "overlong: truncate leaves of a longer chat its turns up to the last whole answer, and drops it if there "
            "is none; of a longer plain text it leaves the first tokens."
        )


def note_lost_evaluation_rows(ledger: Ledger, evaluation: Ledger) -> None:
    """Note lost evaluation rows in the ledger of training, which does not count rows to evaluate on."""
    for label, bins in evaluation.bins.items():
        for name, amount in bins.items():
            if name != TRAINED:
                tokens = amount["supervised"] or amount["context"]  # of texts with labels no token is trained by itself
                ledger.note(f"Evaluation, {label}: {amount['rows']:,} rows and {tokens:,} tokens {name}.")


def note_common_rows(ledger: Ledger, train: Rows | Pairs, evaluation: Rows | Pairs) -> None:
    """Count and name evaluation rows that are also trained: they make an evaluation look better than it is."""
    common = np.flatnonzero(np.isin(evaluation.digest, train.digest))
    if len(common):
        pairs = []
        for k in common[:3].tolist():
            twin = int(np.flatnonzero(train.digest == evaluation.digest[k])[0])
            pairs.append(f"{evaluation.name(k)} = {train.name(twin)}")
        ledger.note(
            f"{len(common):,} of {len(evaluation):,} rows to evaluate on are trained on as well: {'; '.join(pairs)}"
            + ("; ..." if len(common) > 3 else ".")
        )
