"""The endless sequence of packed rows of documents that are encoded ahead: one epoch after the other."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from accel_llm.config.options import TrainOptions
from accel_llm.data.mixture import Turns
from accel_llm.data.order import arrange_epoch
from accel_llm.data.packing import Bins

# A source that is repeated within an epoch of the mixture anyway is packed so many rows at a time: the last row of a few
# short documents would be half empty each time.
ROWS_TO_FILL = 64


class Epochs:
    """The rows of some documents, epoch after epoch, without end; any row is found at once.

    `passes` epochs are packed together, and are called a round here.
    """

    def __init__(
        self,
        documents: np.ndarray,
        lengths: np.ndarray,
        options: TrainOptions,
        source: int = 0,
        passes: int = 1,
        packed: Callable[[int], Bins] | None = None,
    ):
        """`documents` int64 [n] are indices into `lengths`, the tokens of every document; `source` has draws of its own.

        `packed` gives the rows of a round (from 0) if they are packed already.
        """
        self.passes, self.lengths = passes, lengths
        together = np.tile(documents, passes)
        arrange = packed or (lambda number: arrange_epoch(together, lengths, options, number, source))
        # Two rounds stay in memory, because a step may reach into the next one.
        self._round = lru_cache(maxsize=2)(arrange)
        self.rows = len(self._round(0).offsets) - 1  # in a round

    def documents(self, row: int) -> list[int]:
        """Return the documents of row `row` (from 0)."""
        number, index = divmod(row, self.rows)
        order, offsets = self._round(number)
        return order[offsets[index] : offsets[index + 1]].tolist()

    def first_round(self) -> tuple[Bins, np.ndarray]:
        """Return the rows of the first round, and the tokens of their documents in that order."""
        bins = self._round(0)
        return bins, self.lengths[bins.order]

    def epoch(self, rows: int) -> float:
        """Return how often the documents were passed through after so many rows."""
        return rows / self.rows * self.passes

    def forget_before(self, row: int) -> None:
        """Do nothing: rows of documents in memory need no room."""


def weighted_epochs(
    all_documents: np.ndarray, source: np.ndarray, weights: Sequence[float], lengths: np.ndarray, options: TrainOptions
) -> tuple[list[Epochs], Turns]:
    """Return the rows of each source by itself, and whose turn it is; `source` int64 [n] is that of each document."""
    turns, numbers = Turns(weights), range(len(weights))
    documents = [all_documents[source == number] for number in numbers]
    alone = [Epochs(documents[k], lengths, options, k) for k in numbers]
    if not options.packing:
        return alone, turns

    # The source that is repeated least is passed through once in an epoch; others are so several times.
    epoch = max(alone[k].rows * turns.period / turns.shares[k] for k in numbers)
    repeats = [int(epoch * turns.shares[k] / turns.period / alone[k].rows) for k in numbers]
    passes = [max(1, min(repeats[k], -(-ROWS_TO_FILL // alone[k].rows))) for k in numbers]
    return [
        alone[k] if passes[k] == 1 else Epochs(documents[k], lengths, options, k, passes[k]) for k in numbers
    ], turns
