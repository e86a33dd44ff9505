"""What a test has measured, in constant memory: from stopwatches, by bucket, to one sequential test."""

from __future__ import annotations

from collections import deque
from typing import Any

from lncompile.abtest.buckets import Bucket, Buckets
from lncompile.abtest.results import Outcome, outcome_of
from lncompile.abtest.sketch import LatencySketch
from lncompile.abtest.statistics import Interval, SequentialTest, batch_size
from lncompile.abtest.timers import Stopwatch

#: Measurements a GPU has not answered yet; older ones are given up.
_PENDING = 4096
#: Points of the speed-up's history; beyond, every other one is dropped.
_HISTORY = 256
#: Seconds a call by which two equal programs differ in one process, by where their code and data lie in memory: of 70
#: tests with calls of 102 µs the estimates at the end lay between -1.9 and 1.8 µs (``benchmarks/equal_programs.py``).
BY_PLACE = 3e-6
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


class Measurements:
    """Latencies of requests that were assigned at random. Not thread-safe: call it under a lock.

    Args:
        names: of the arms, the baseline first.
        ratio: the candidate's share of requests.
        warmup: first calls of each arm and bucket that are not counted.
        buckets: how many kinds of requests are told apart.
        alpha: how often a test may be wrong.

    Attributes:
        test: the sequential test over all buckets but that for all others.
        during_compilation: requests not counted because something was compiled meanwhile.
    """

    def __init__(self, names: tuple[str, str], ratio: float, warmup: int, buckets: int, alpha: float) -> None:
        self.test = SequentialTest()
        self.during_compilation = 0
        self._names, self._warmup, self._alpha = names, warmup, alpha
        self._batch_size = batch_size(ratio)
        self._buckets = Buckets(buckets, self._batch_size)
        self._pending: deque[tuple[Stopwatch, Bucket, int]] = deque(maxlen=_PENDING)
        self._history: list[tuple[int, Interval]] = []
        self._history_step = 1

    def bucket(self, name: str) -> Bucket:
        """The bucket for requests of this kind."""
        return self._buckets.find(name)

    def add(self, stopwatch: Stopwatch, bucket: Bucket, arm: int, undisturbed: bool) -> None:
        """Count a request that has been answered.

        Args:
            stopwatch: stopped; a GPU may not be through with it.
            bucket: its kind.
            arm: 0 for the baseline, 1 for the candidate.
            undisturbed: whether nothing was compiled meanwhile.
        """
        if not undisturbed:
            self.during_compilation += 1
        elif bucket.warm[arm] < self._warmup:
            bucket.warm[arm] += 1
        else:
            self._pending.append((stopwatch, bucket, arm))
            self.collect()

    def collect(self) -> None:
        """Take in the measurements that are there by now."""
        while self._pending:
            stopwatch, bucket, arm = self._pending[0]
            seconds = stopwatch.seconds()
            if seconds is None:
                return
            self._pending.popleft()
            bucket.latencies[arm].add(seconds)
            if bucket is self._buckets.other:
                continue
            batch = bucket.add(arm, seconds)
            if batch is not None:
                self.test.add(*batch)
                self._remember()

    def _remember(self) -> None:
        if self.test.batches % self._history_step == 0:
            self._history.append((self.requests, self.speedup))
        if len(self._history) == _HISTORY:
            self._history = self._history[1::2]
            self._history_step *= 2

    @property
    def requests(self) -> int:
        """How many requests are in the test."""
        return self.test.batches * self._batch_size

    @property
    def speedup(self) -> Interval:
        """The candidate's speed-up, over all buckets."""
        return self.test.interval(self._alpha)

    def counts(self) -> dict[str, int]:
        """How many requests were measured, how many of them have shapes beyond the buckets, and the buckets tested."""
        return {
            "measured": sum(self.latencies(arm).count for arm in (0, 1)),
            "other": sum(sketch.count for sketch in self._buckets.other.latencies),
            "buckets": sum(bucket.test.batches > 0 for bucket in self._buckets),
        }

    def effect_that_counts(self, minimum_effect: float) -> float:
        """The smallest relative difference that makes a winner.

        It is ``minimum_effect`` or, of short calls, what may come from the places of code and data in memory.
        """
        (median,) = self.latencies(0).quantiles([0.5])
        return minimum_effect if median is None else max(minimum_effect, BY_PLACE / median)

    def opposites(self) -> list[tuple[str, Interval]]:
        """Buckets in which the contrary of what holds overall is known, at a level for all of them at once."""
        overall = outcome_of(self.speedup, 0.0)
        tested = [bucket for bucket in self._buckets if bucket.test.batches]
        intervals = [(bucket.name, bucket.test.interval(self._alpha / len(tested))) for bucket in tested]
        contrary = {Outcome.FASTER: Outcome.SLOWER, Outcome.SLOWER: Outcome.FASTER}.get(overall)
        return [(name, speedup) for name, speedup in intervals if outcome_of(speedup, 0.0) is contrary]

    def latencies(self, arm: int) -> LatencySketch:
        """Latencies of one arm after warm-up, all buckets."""
        return LatencySketch.merged(bucket.latencies[arm] for bucket in self._buckets.everything())

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values, ready for JSON."""
        return {
            "during_compilation": self.during_compilation,
            "waiting_for_device": len(self._pending),
            "test": self.test.to_dict(self._alpha),
            "buckets": [
                {
                    "name": bucket.name,
                    "in_verdict": bucket is not self._buckets.other,
                    **bucket.test.to_dict(self._alpha),
                    "warmup": dict(zip(self._names, bucket.warm, strict=True)),
                    "seconds": {
                        name: summary(sketch) for name, sketch in zip(self._names, bucket.latencies, strict=True)
                    },
                }
                for bucket in self._buckets.everything()
            ],
            "history": [{"requests": requests, **speedup.to_dict()} for requests, speedup in self._history],
        }


def summary(sketch: LatencySketch) -> dict[str, float | int | None]:
    """Return number, mean and quantiles of latencies, in seconds, ready for JSON."""
    mean = sketch.total / sketch.count if sketch.count else None
    values = sketch.quantiles(list(_QUANTILES.values()))
    return {"requests": sketch.count, "mean": mean, **dict(zip(_QUANTILES, values, strict=True))}
