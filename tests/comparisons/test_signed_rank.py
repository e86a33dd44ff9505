"""Hodges and Lehmann's estimate and the interval of Wilcoxon's signed-rank test, against scipy's and by simulation."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from lncompile.comparisons.signed_rank import speedup_of


@pytest.mark.parametrize("count", [6, 12, 27, 40])
def test_the_interval_is_what_the_test_does_not_reject(count: int) -> None:
    """A shift just outside the interval is rejected by scipy's exact test, and one just inside is not."""
    draw = random.Random(count)
    logarithms = [draw.gauss(0.1, 0.2) for _ in range(count)]
    found = speedup_of([math.exp(value) for value in logarithms], 0.05)

    def chance(centre: float) -> float:
        return float(stats.wilcoxon([value - math.log(centre) for value in logarithms], method="exact").pvalue)

    for end, outwards in ((found.low, -1e-6), (found.high, 1e-6)):
        assert chance(end * (1 + outwards)) <= 0.05 < chance(end * (1 - outwards))
    assert found.low < found.median < found.high


def test_the_estimate_is_the_median_of_the_means_of_pairs() -> None:
    # Means of the exponents: 0, 0.5, 1, 1, 1.5, 2 of those of 0, 1, 2; with 10 added: 5, 5.5, 6, 10.
    assert speedup_of([1, math.e, math.e**2], 0.5).median == pytest.approx(math.e)
    assert speedup_of([1, math.e, math.e**2, math.e**10], 0.5).median == pytest.approx(math.exp(1.75))


def test_too_few_for_so_small_a_chance() -> None:
    found = speedup_of([1.1, 1.2, 1.3, 1.4, 1.5], 0.05)  # 2 / 2^5 is more than 0.05
    assert (found.low, found.high) == (0.0, math.inf)
    assert found.median == pytest.approx(1.3, rel=0.01)
    assert speedup_of([1.1, 1.2, 1.3, 1.4, 1.5], 0.07).low == pytest.approx(1.1)


@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_the_interval_holds_the_centre_as_often_as_it_says(outliers: float) -> None:
    """Also where one round in ten is hit by something else, which may slow down the one or the other."""
    draw = random.Random(1)
    held = 0
    for _ in range(1000):
        logarithms = [draw.gauss(0.3, 3.0 if draw.random() < outliers else 0.1) for _ in range(27)]
        found = speedup_of([math.exp(value) for value in logarithms], 0.05)
        held += found.low <= math.exp(0.3) <= found.high
    assert 0.935 <= held / 1000 <= 0.975


def test_ratios_that_are_all_the_same() -> None:
    found = speedup_of([1.02] * 20, 0.001)
    assert (found.low, found.median, found.high) == pytest.approx((1.02, 1.02, 1.02))
