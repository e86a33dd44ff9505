"""A race by successive elimination: the ways are timed in turn, and those that are slower drop out.

In each round every way that is left is called, in a random order, and timed at its second call, or at its only one if
it is long (:mod:`lncompile.comparisons.timing` says why). What is compared are ratios of times of one round, so that
drift hits all ways alike (:mod:`lncompile.comparisons.signed_rank`).

Ways drop out for two reasons. At each of a few looks at the times those go that are shown to be slower. And as time
runs out, those go that are behind, shown or not: after a quarter of it the slower half, after a half of it all but the
leader (sequential halving: Karnin, Koren and Somekh, 2013). A gain of a percent shows only in a hundred rounds and
more. With five ways in each, time is over before, and nothing is known well; with two in each it is known of the one
that matters.

Stock stays to the end, as what all others are compared with. The intervals against stock, of all ways and at all looks,
hold together with 95%, by Bonferroni's inequality, whoever goes on: half of the chance to be wrong is for the last
look, which time brings, the other half is for those before it.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lncompile.comparisons.signed_rank import speedup_of
from lncompile.comparisons.timing import LONG_CALL, Estimate, Stopwatch

#: Rounds after which it is looked who drops out. Each is half as many again as the one before.
LOOKS = (12, 18, 27, 40, 60, 90, 135, 200, 300, 450)
#: The share of the time after which only some go on, and their share of those that are left, but one at least.
HALVINGS = ((0.25, 0.5), (0.5, 0.0))
#: The chance that any interval of a race, at any look, does not hold.
ALPHA = 0.05
#: A way counts as being as good as the fastest if it is at least this many times as fast.
AS_GOOD = 0.995
#: The race is over when all that are left are at least this many times as fast as the fastest.
PRACTICALLY_EQUAL = 0.99
#: A race for which time is too short for this many calls may take twice as long.
CALLS = 250


@dataclass(frozen=True)
class Standing:
    """How one way did, against stock.

    Attributes:
        speedup: how many times as fast as stock.
        low: lower end of the interval.
        high: upper end.
        rounds: those in which it was timed.
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
        seconds: how long the race may take, twice that where calls are long; the round under way is finished.
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
    race = _Race(calls, baseline, minimum_speedup)
    order = random.Random(0)
    started = clock()

    def once(name: str) -> float:
        prepare()
        return stopwatch(calls[name])

    first = [once(name) for name in calls]  # the first call is a warm-up
    is_long = max(first) > LONG_CALL
    seconds = max(seconds, min(2 * seconds, CALLS * min(first)))
    decided = False
    while race.left and race.rounds < LOOKS[-1] and clock() - started < seconds and not decided:
        turn = [baseline, *race.left]
        order.shuffle(turn)
        for name in turn:
            if not is_long:
                once(name)
            race.samples[name].append(once(name))
        gone = race.look() if race.rounds in LOOKS else []
        decided = race.rounds in LOOKS and race.is_decided()
        if not decided:
            gone += race.halve((clock() - started) / seconds)
        for name in gone:
            drop(name)
    return race.finish(decided)


class _Race:
    """What has been timed so far, and who is left."""

    def __init__(self, names: Collection[str], baseline: str, minimum_speedup: float) -> None:
        self.baseline, self.minimum_speedup = baseline, minimum_speedup
        self.samples: dict[str, list[float]] = {name: [] for name in names}
        #: In the order in which they are preferred.
        self.left = [name for name in names if name != baseline]
        self.standings: dict[str, Standing] = {}
        self._behind: list[str] = []
        self._halvings = list(HALVINGS)
        ways = max(1, len(self.left))
        self._alpha = ALPHA / 2 / ways / (len(LOOKS) + len(HALVINGS))
        self._last_alpha = ALPHA / 2 / ways

    @property
    def rounds(self) -> int:
        """Rounds so far: stock is in all of them."""
        return len(self.samples[self.baseline])

    def look(self) -> list[str]:
        """Drop those that are shown to be slower than the fastest, or than stock."""
        self._measure(self._alpha)
        fastest = self._fastest(self.left)
        gone = []
        for name in tuple(self.left):
            if self.standings[name].high <= self.minimum_speedup:
                least = self.minimum_speedup
                gone.append(self._drop(name, "not faster than stock" if least == 1 else f"not {least:g} times as fast"))
            elif name != fastest and self._against(name, fastest).high < AS_GOOD:
                gone.append(self._drop(name, f"slower than '{fastest}'"))
        return gone

    def halve(self, share: float) -> list[str]:
        """Drop those that are behind, if it is time."""
        gone: list[str] = []
        while self.rounds >= LOOKS[0] and self._halvings and share >= self._halvings[0][0]:
            _, part = self._halvings.pop(0)
            if len(self.left) <= 1:
                continue
            self._measure(self._alpha)
            stay: list[str] = []
            while len(stay) < max(1, part * len(self.left)):
                stay.append(self._preferred([name for name in self.left if name not in stay]))
            for name in [name for name in self.left if name not in stay]:
                self._behind.append(self._drop(name, f"behind '{stay[0]}'"))
                gone.append(name)
        return gone

    def is_decided(self) -> bool:
        """Whether more rounds would change nothing that matters."""
        if not self.left:
            return True
        fastest = self._fastest(self.left)
        return self.standings[fastest].low > self.minimum_speedup and all(
            self._against(name, fastest).low >= PRACTICALLY_EQUAL for name in self.left if name != fastest
        )

    def finish(self, decided: bool) -> Finish:
        """Say who wins: of those shown to be fast enough, the first that is as good as the fastest of them."""
        enough = self.rounds >= LOOKS[0]
        if enough and not decided:
            self._measure(self._last_alpha)
        winner = self.baseline
        for group in (self._behind, self.left) if enough else ():
            shown = [name for name in group if self.standings[name].low > self.minimum_speedup]
            winner = self._preferred(shown) if shown else winner
        standings = {name: self.standings[name] for name in self.samples if name in self.standings}
        return Finish(standings, winner, self.rounds, enough)

    def _measure(self, alpha: float) -> None:
        for name in self.left:
            found = speedup_of(self._ratios(name, self.baseline), alpha)
            self.standings[name] = Standing(found.median, found.low, found.high, len(self.samples[name]))

    def _drop(self, name: str, why: str) -> str:
        why = f"dropped out after {self.rounds} rounds: {why}"
        self.standings[name] = dataclasses.replace(self.standings[name], dropped=why)
        self.left.remove(name)
        return name

    def _ratios(self, name: str, other: str) -> list[float]:
        """How many times as fast as another, in each round in which both were called."""
        tiny = 1e-12  # a clock may be too coarse for a call
        pairs = zip(self.samples[name], self.samples[other], strict=False)
        return [max(others, tiny) / max(own, tiny) for own, others in pairs]

    def _against(self, name: str, other: str) -> Estimate:
        return speedup_of(self._ratios(name, other), self._alpha)

    def _fastest(self, names: Sequence[str]) -> str:
        return max(names, key=lambda name: self.standings[name].speedup)

    def _preferred(self, names: Sequence[str]) -> str:
        """The first that is as good as the fastest."""
        fastest = self._fastest(names)
        return next(name for name in names if self._against(name, fastest).median >= AS_GOOD)
