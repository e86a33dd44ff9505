"""A race by successive elimination: the ways are timed in turn, and those that are clearly slower drop out.

In each round every way that is left is called, in a random order, and timed at its second call
(:mod:`lncompile.comparisons.timing` says why). What is compared are ratios of times of one round, so that drift hits
all ways alike. The interval of their median is that of the sign test: of ``n`` independent ratios, fewer than ``k`` lie
below the median of their distribution with a probability that depends on ``n`` and ``k`` alone (a binomial of ½), so
that the k-th smallest and the k-th largest are an interval for it, whatever the distribution. There are a few looks at
the data, and several comparisons at each: by Bonferroni's inequality all intervals of a race hold together with 95%.

Stock stays to the end, as what all others are compared with.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lncompile.comparisons.timing import Stopwatch

#: Rounds after which it is looked who drops out. Each is half as many again as the one before.
LOOKS = (12, 18, 27, 40, 60, 90, 135, 200)
#: The chance that any interval of a race, at any look, does not hold.
ALPHA = 0.05
#: A way counts as being as good as the fastest if it is at least this many times as fast.
AS_GOOD = 0.995
#: The race is over when all that are left are at least this many times as fast as the fastest.
PRACTICALLY_EQUAL = 0.99
#: A call that takes this many seconds is not made twice: what ran before it makes no difference to it.
LONG_CALL = 0.05


@dataclass(frozen=True)
class Standing:
    """How one way did, against stock.

    Attributes:
        speedup: median over rounds of stock's time through its own.
        low: lower end of the interval.
        high: upper end.
        rounds: in which it was timed.
        dropped: why it dropped out, or "".
    """

    speedup: float
    low: float
    high: float
    rounds: int
    dropped: str = ""


@dataclass(frozen=True)
class Finish:
    """The end of a race.

    Attributes:
        standings: of all ways, stock not among them.
        winner: the way that is taken; stock where no other is shown to be faster than what was asked for.
        rounds: of the race.
        enough: whether there were rounds enough for a look.
    """

    standings: Mapping[str, Standing]
    winner: str
    rounds: int
    enough: bool


def run_race(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    stopwatch: Stopwatch,
    seconds: float,
    minimum_speedup: float = 1.0,
    prepare: Callable[[], None] = lambda: None,
    drop: Callable[[str], None] = lambda name: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Finish:
    """Time several ways to the same end until it is known which one to take.

    Args:
        calls: the ways, by name, in the order in which they are preferred where they are equally fast.
        baseline: the one among them that the others have to beat.
        stopwatch: how a call is timed.
        seconds: how long the race may take; the round that is under way is finished.
        minimum_speedup: another than the baseline wins only if the lower end of its interval is above this.
        prepare: called before every call, not timed.
        drop: called with the name of a way that has dropped out.
        clock: seconds since some moment.

    Returns:
        The winner, and how each did.

    Example:
        >>> run_race({"stock": a, "fold alone": b}, "stock", stopwatch=wall_clock, seconds=10.0).winner
        'fold alone'
    """
    pairs = max(1, 2 * (len(calls) - 1))  # each way against stock, and against the fastest
    alpha = ALPHA / (len(LOOKS) * pairs)
    end = clock() + seconds
    samples: dict[str, list[float]] = {name: [] for name in calls}
    standings: dict[str, Standing] = {}
    left = [name for name in calls if name != baseline]
    order = random.Random(0)
    is_long = False

    def once(name: str) -> float:
        prepare()
        return stopwatch(calls[name])

    for name in calls:
        is_long |= once(name) > LONG_CALL  # the first call is a warm-up
    rounds = 0
    while left and rounds < LOOKS[-1] and clock() < end:
        turn = [baseline, *left]
        order.shuffle(turn)
        for name in turn:
            if not is_long:
                once(name)
            samples[name].append(once(name))
        rounds += 1
        if rounds in LOOKS:
            standings.update({name: _standing(samples[name], samples[baseline], alpha) for name in left})
            for name, why in _dropouts(left, samples, standings, alpha, minimum_speedup).items():
                standings[name] = Standing(*_numbers(standings[name]), f"dropped out after {rounds} rounds: {why}")
                left.remove(name)
                drop(name)
            if _is_decided(left, samples, standings, alpha, minimum_speedup):
                break
    enough = rounds >= LOOKS[0]
    if enough:
        standings.update({name: _standing(samples[name], samples[baseline], alpha) for name in left})
    winner = _winner(left, samples, standings, minimum_speedup) if enough else None
    return Finish({name: standings[name] for name in calls if name in standings}, winner or baseline, rounds, enough)


def _numbers(standing: Standing) -> tuple[float, float, float, int]:
    return standing.speedup, standing.low, standing.high, standing.rounds


def _standing(samples: Sequence[float], baseline: Sequence[float], alpha: float) -> Standing:
    ratios = _ratios(samples, baseline)
    low, high = median_interval(ratios, alpha)
    return Standing(statistics.median(ratios), low, high, len(ratios))


def _ratios(samples: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """How many times as fast as the baseline, in each round in which both were called."""
    tiny = 1e-12  # a clock may be too coarse for a call
    return [max(base, tiny) / max(own, tiny) for own, base in zip(samples, baseline, strict=False)]


def median_interval(values: Sequence[float], alpha: float) -> tuple[float, float]:
    """Return the interval of the sign test for the median of what values are drawn from.

    .. math:: [x_{(k)}, x_{(n+1-k)}], \\quad k = max \\{k: 2 P(Bin(n, ½) < k) \\le α\\}

    Args:
        values: independent draws.
        alpha: the chance that the interval does not hold the median.

    Returns:
        Both ends; ``(0, inf)`` of too few values.

    Example:
        >>> median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.05)
        (1.0, 6.0)
    """
    count, below, rank = len(values), 0, 0
    while rank < count:
        below += math.comb(count, rank)
        if 2 * below > alpha * 2**count:
            break
        rank += 1
    if rank == 0:
        return 0.0, math.inf
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def _fastest(left: Collection[str], standings: Mapping[str, Standing]) -> str:
    return max(left, key=lambda name: standings[name].speedup)


def _dropouts(
    left: Sequence[str],
    samples: Mapping[str, Sequence[float]],
    standings: Mapping[str, Standing],
    alpha: float,
    minimum_speedup: float,
) -> dict[str, str]:
    """Those that are left and cannot win any more, with why."""
    leader = _fastest(left, standings)
    found: dict[str, str] = {}
    for name in left:
        if standings[name].high <= minimum_speedup:
            found[name] = "not faster than stock" if minimum_speedup == 1 else f"not {minimum_speedup:g} times as fast"
        elif name != leader and median_interval(_ratios(samples[name], samples[leader]), alpha)[1] < AS_GOOD:
            found[name] = f"slower than '{leader}'"
    return found


def _is_decided(
    left: Sequence[str],
    samples: Mapping[str, Sequence[float]],
    standings: Mapping[str, Standing],
    alpha: float,
    minimum_speedup: float,
) -> bool:
    """Whether more rounds would change nothing that matters."""
    if not left:
        return True
    leader = _fastest(left, standings)
    if standings[leader].low <= minimum_speedup:
        return False
    others = [name for name in left if name != leader]
    lows = [median_interval(_ratios(samples[name], samples[leader]), alpha)[0] for name in others]
    return all(low >= PRACTICALLY_EQUAL for low in lows)


def _winner(
    left: Sequence[str],
    samples: Mapping[str, Sequence[float]],
    standings: Mapping[str, Standing],
    minimum_speedup: float,
) -> str | None:
    """The first of those that are shown to be fast enough that is as good as the fastest of them; None without any."""
    shown = [name for name in left if standings[name].low > minimum_speedup]
    if not shown:
        return None
    fastest = _fastest(shown, standings)
    return next(name for name in shown if statistics.median(_ratios(samples[name], samples[fastest])) >= AS_GOOD)
