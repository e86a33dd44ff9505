"""How many times as fast, from ratios of times of the same rounds: Hodges and Lehmann's estimate and its interval.

The logarithm of a ratio of two times that were taken in one round, in an order drawn by lot, has a distribution that is
symmetric about the true value where noise hits both alike. The estimate is the median of the means of all pairs of
logarithms (Hodges and Lehmann, 1963). Its interval is the one that Wilcoxon's signed-rank test does not reject: under
symmetry the sum of the ranks of the positive ones has a distribution that depends on their number alone. Of normal
noise it is as narrow as the median's interval by the sign test is with half as many rounds again, and an outlier moves
it as little as it moves a median.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy

from lncompile.comparisons.timing import Estimate


def speedup_of(ratios: Sequence[float], alpha: float) -> Estimate:
    """Return the centre of what ratios are drawn from, with an interval.

    .. math::

        \\exp(median_{i \\le j} (\\ln x_i + \\ln x_j) / 2), \\quad [w_{(k)}, w_{(N + 1 - k)}],
        \\quad k = max \\{k: 2 P(T_n < k) \\le α\\}

    where ``w`` are the ``N = n (n + 1) / 2`` means in order, and ``T_n`` is the sum of those of the ranks 1 to ``n``
    that fall on heads.

    Args:
        ratios: independent draws, all above 0.
        alpha: the chance that the interval does not hold the centre.

    Returns:
        The centre and both ends, which are ``0`` and ``inf`` of too few ratios for so small a chance.

    Example:
        >>> print(speedup_of([1.01, 1.02, 1.03, 1.04, 1.05, 1.06], 0.05))
        1.035 [1.010, 1.060]
    """
    logarithms = numpy.log(numpy.asarray(ratios, dtype=float))
    first, second = numpy.triu_indices(len(logarithms))
    means = numpy.sort((logarithms[first] + logarithms[second]) / 2)
    rank = _rank(len(logarithms), alpha)
    low, high = (0.0, math.inf) if rank == 0 else (math.exp(means[rank - 1]), math.exp(means[-rank]))
    return Estimate(math.exp(numpy.median(means)), low, high)


def _rank(count: int, alpha: float) -> int:
    """The largest ``k`` with ``2 P(T < k) <= alpha``; 0 where there is none."""
    return int(numpy.searchsorted(_below(count), alpha / 2, side="right"))


@functools.lru_cache(maxsize=64)
def _below(count: int) -> numpy.ndarray:
    """``P(T < k)`` for ``k`` = 1, 2, ...: of the sum of those of the ranks 1 to ``count`` that fall on heads."""
    chances = numpy.zeros(count * (count + 1) // 2 + 1)
    chances[0] = 1.0
    for rank in range(1, count + 1):
        shifted = numpy.concatenate([numpy.zeros(rank), chances[:-rank]])
        chances = (chances + shifted) / 2
    return numpy.cumsum(chances)
