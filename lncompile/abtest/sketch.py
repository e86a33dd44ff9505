"""Quantiles of latencies in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

#: Shortest latency told apart from none, and longest told apart from forever; seconds.
SHORTEST, LONGEST = 1e-6, 1e4
#: Upper end of a bin over its lower end: quantiles are exact to 1%.
GROWTH = 1.02

_BINS = math.ceil(math.log(LONGEST / SHORTEST) / math.log(GROWTH)) + 1
#: Upper ends of the bins, in seconds.
EDGES: NDArray[Any] = SHORTEST * GROWTH ** numpy.arange(_BINS)


class LatencySketch:
    """A histogram with bins that grow by 2%, as in DDSketch (C. Masson, J. Rim and H. Lee, VLDB 2019). 9 KiB.

    Attributes:
        count: how many latencies it has seen.
        total: their sum, in seconds.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._counts = numpy.zeros(_BINS, dtype=numpy.int64)

    def add(self, seconds: float) -> None:
        """Count a latency."""
        self.count += 1
        self.total += seconds
        index = math.ceil(math.log(max(seconds, SHORTEST) / SHORTEST) / math.log(GROWTH))
        self._counts[min(index, _BINS - 1)] += 1

    def quantiles(self, shares: Sequence[float]) -> list[float | None]:
        """Return the latencies that these shares (0 to 1) of all stay below, exact to 1%; None for an empty sketch."""
        if self.count == 0:
            return [None] * len(shares)
        cumulative = numpy.cumsum(self._counts)
        ranks = numpy.maximum(1, numpy.ceil(numpy.asarray(shares) * self.count))
        return [float(edge / math.sqrt(GROWTH)) for edge in EDGES[numpy.searchsorted(cumulative, ranks)]]

    def at_most(self, limits: Sequence[float]) -> list[int]:
        """How many latencies are at most each of these limits in seconds, exact to 1% of the limit."""
        cumulative = numpy.concatenate([[0], numpy.cumsum(self._counts)])
        return [int(cumulative[numpy.searchsorted(EDGES, limit * math.sqrt(GROWTH))]) for limit in limits]

    @classmethod
    def merged(cls, sketches: Iterable[LatencySketch]) -> LatencySketch:
        """Return one sketch of all that these have seen."""
        result = cls()
        for sketch in sketches:
            result.count += sketch.count
            result.total += sketch.total
            result._counts += sketch._counts
        return result
