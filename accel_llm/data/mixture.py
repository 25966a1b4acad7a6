"""Sources mixed by weight: whose turn it is at each row, and how often each source was passed through."""

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from heapq import heappop, heappush

import numpy as np

# The turns repeat after so many rows at most. Weights that need more are rounded, each share by less than one row in this
# many.
LONGEST_PERIOD = 2**17


class Turns:
    """Which source gives each row of a mixture: after n rows each has given its share of n, within one row.

    The turns are a pure function of the weights, and repeat. So the turn of any row is found at once.
    """

    def __init__(self, weights: Sequence[float]):
        """`weights` are positive numbers, one for each source; only their proportions matter."""
        self.shares = whole_shares(weights)  # rows of each source in a period
        self.period = sum(self.shares)

    @cached_property
    def _order(self) -> np.ndarray:
        """The source of each row of a period, int64 [period]."""
        return take_turns(self.shares)

    @cached_property
    def _earlier(self) -> np.ndarray:
        """How many earlier rows of the period have the same source, int64 [period]."""
        earlier = np.empty(self.period, np.int64)
        for source, share in enumerate(self.shares):
            earlier[self._order == source] = np.arange(share)
        return earlier

    def place(self, row: int) -> tuple[int, int]:
        """Return which source gives `row` (from 0), and which of its rows that is (from 0)."""
        periods, rest = divmod(row, self.period)
        source = int(self._order[rest])
        return source, periods * self.shares[source] + int(self._earlier[rest])

    def counts(self, rows: int) -> list[int]:
        """Return how many of the first `rows` rows each source gives."""
        periods, rest = divmod(rows, self.period)
        given = np.bincount(self._order[:rest], minlength=len(self.shares))
        return [periods * share + int(count) for share, count in zip(self.shares, given, strict=True)]

    def rows_until(self, needed: Sequence[int]) -> int:
        """Return the smallest number of rows after which each source has given as many as `needed` says."""
        last = zip(needed, self.shares, strict=True)
        rows = max(1, *(math.floor((count - 1) * self.period / share) for count, share in last))
        while any(given < count for given, count in zip(self.counts(rows), needed, strict=True)):
            rows += 1
        return rows


def whole_shares(weights: Sequence[float]) -> list[int]:
    """Return the smallest whole numbers in proportion to `weights`; rounded if they add up to over LONGEST_PERIOD."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    fractions = [weight / sum(exact) for weight in exact]
    common = math.lcm(*(fraction.denominator for fraction in fractions))
    common = min(common, LONGEST_PERIOD)
    shares = [max(1, math.floor(fraction * common + Fraction(1, 2))) for fraction in fractions]
    return [share // math.gcd(*shares) for share in shares]


def take_turns(shares: Sequence[int]) -> np.ndarray:
    """Return which source gives each row of a period, int64 [sum of shares].

    Its share of the rows so far decides in which span of rows a source gives its next one: not before it lacks some part
    of a row, and not so late that it lacks a whole one. Of the sources that may give a row, the one whose span ends first
    does. Then all keep to their spans (Steiner and Yeomans 1993, "Level schedules for mixed-model, just-in-time
    processes"; taking the source that lacks most is not enough: with weights of 6, 6, 1, 1, 1, 6 and 1 it is off by 1.09).
    """
    period, order = sum(shares), np.empty(sum(shares), np.int64)
    given = [0] * len(shares)
    waiting = [
        (0, source) for source in range(len(shares))
    ]  # by the row from which on the source may give its next one
    ready: list[tuple[int, int]] = []  # by the row at which that has to have happened
    for row in range(period):
        while waiting and waiting[0][0] <= row:
            _, source = heappop(waiting)
            heappush(ready, (-(-(given[source] + 1) * period // shares[source]), source))
        _, source = heappop(ready)
        order[row] = source
        given[source] += 1
        heappush(waiting, (given[source] * period // shares[source], source))
    return order
