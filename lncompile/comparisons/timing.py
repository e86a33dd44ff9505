"""Paired latency: several ways to run one thing, interleaved in one process, so that drift hits all of them alike."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from scipy import stats

#: Runs a callable and returns how many seconds it took.
Stopwatch = Callable[[Callable[[], Any]], float]
#: A call that takes more than this many seconds is not made twice: what ran before it makes no difference to it.
LONG_CALL = 0.05


@dataclass(frozen=True)
class Estimate:
    """A number read off samples, with its 95% interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Ratio(Estimate):
    """A ratio of latencies with its 95% interval; above 1 the candidate is faster than the baseline."""


@dataclass(frozen=True)
class PairedTimings:
    """Seconds of each timed call, by candidate; the i-th calls of all candidates were made in one round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of a candidate."""
        return float(numpy.median(self.seconds[name]))

    def latency(self, name: str) -> Estimate:
        """Median seconds of a candidate, with a bootstrap interval.

        Args:
            name: the candidate.
        """
        return Estimate(*_bootstrapped_median(self._samples(name)))

    def speedup(self, name: str, baseline: str) -> Ratio:
        """Median of the per-round ratios ``baseline / name``, with a bootstrap interval.

        Args:
            name: the candidate.
            baseline: what it is compared with.
        """
        return Ratio(*_bootstrapped_median(self._samples(baseline) / self._samples(name)))

    def median_ratio(self, name: str, baseline: str) -> float:
        """Median of the per-round ratios ``baseline / name``."""
        return float(numpy.median(self._samples(baseline) / self._samples(name)))

    def median_difference(self, name: str, baseline: str) -> float:
        """Median of the per-round differences ``baseline - name``, in seconds."""
        return float(numpy.median(self._samples(baseline) - self._samples(name)))

    def share_removed(self, name: str, baseline: str, limit: str) -> Estimate | None:
        """How much of the way from a baseline to its limit a candidate goes, with a bootstrap interval over rounds.

        .. math:: median(T_{baseline} - T_{name}) / median(T_{baseline} - T_{limit})

        With the same model without norms for the limit it is the share of the norms' cost that is gone: 1 where
        nothing of it is left, 0 where nothing was gained, below 0 where something was lost.

        Args:
            name: the candidate.
            baseline: where the way begins.
            limit: where it ends.

        Returns:
            None where these rounds do not show that the limit is faster than the baseline: its cost is then smaller
            than the noise, and a share of it means nothing.

        Example:
            >>> timings.share_removed("lnfold", "inductor", "no norm")
            Estimate(median=0.71, low=0.66, high=0.77)
        """
        whole = self._samples(baseline) - self._samples(limit)
        part = self._samples(baseline) - self._samples(name)
        if _bootstrapped_median(whole)[1] <= 0:
            return None
        interval = _interval((part, whole), lambda a, b, axis: numpy.median(a, axis) / numpy.median(b, axis))
        return Estimate(float(numpy.median(part) / numpy.median(whole)), *interval)

    def to_dict(self) -> dict[str, Any]:
        """Return medians and all samples, ready for JSON."""
        return {name: {"median_s": self.median(name), "samples_s": list(v)} for name, v in self.seconds.items()}

    def _samples(self, name: str) -> Any:
        return numpy.asarray(self.seconds[name])


def _bootstrapped_median(samples: Any) -> tuple[float, float, float]:
    return float(numpy.median(samples)), *_interval((samples,), numpy.median)


def _interval(samples: tuple[Any, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    """The 95% interval of a statistic of samples that are drawn together, round by round."""
    interval = stats.bootstrap(
        samples,
        statistic,
        paired=len(samples) > 1,
        confidence_level=0.95,
        method="percentile",
        batch=500,  # resamples held at a time: all of them at once would take a gigabyte for some thousands of rounds
        rng=numpy.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def wall_clock(call: Callable[[], Any]) -> float:
    """Seconds that a call takes, for work that is done when it returns: a :data:`Stopwatch` for the CPU.

    Args:
        call: what to time.
    """
    before = time.perf_counter()
    call()
    return time.perf_counter() - before


@dataclass(frozen=True)
class CudaEvents:
    """A :data:`Stopwatch` for CUDA: from an idle device to the end of what a call queued, by events on its stream.

    The device is idle at the start, so what a call spends in Python and on launches counts where the device has to
    wait for it, as it does for a user who asks for one answer after the other.

    Attributes:
        device: where the work is queued, on its current stream.
        events: makes an event; another than CUDA's only in tests.
        synchronise: waits for the device; likewise.

    Example:
        >>> CudaEvents("cuda")(lambda: model(x))
        0.0123
    """

    device: torch.device | str = "cuda"
    events: Callable[[], Any] = field(default=functools.partial(torch.cuda.Event, enable_timing=True))
    synchronise: Callable[[Any], None] = torch.cuda.synchronize

    def __call__(self, call: Callable[[], Any]) -> float:
        """Time one call, in seconds."""
        start, end = self.events(), self.events()
        self.synchronise(self.device)
        start.record()
        call()
        end.record()
        self.synchronise(self.device)
        return float(start.elapsed_time(end)) / 1e3  # milliseconds


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    minimum_rounds: int = 15,
    maximum_rounds: int | None = None,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    prepare: Mapping[str, Callable[[], Any]] | None = None,
    stopwatch: Stopwatch | None = None,
    progress: Callable[[float], None] | None = None,
) -> PairedTimings:
    """Time several callables in turn, round after round.

    A round calls the candidates in a random order, each twice, and times the second call. What ran before decides what
    is in the cache, and in front of each timed call that is the same candidate. Timed at once, a call is slower behind
    another candidate's, and slower still behind the bookkeeping of a round. The ratios of equal programs then lie in
    two heaps, one for each order, and their median is in whichever is larger. That made the second of two equal
    programs 0.8% slower.

    Args:
        candidates: what to time, by name. They do the same work.
        seconds: how long to go on, warm-up not counted.
        minimum_rounds: go on at least this long.
        maximum_rounds: do not go on longer than this, whatever ``seconds`` says.
        warmup: calls of each before any is timed.
        device: where the work happens.
        prepare: called before each call of a candidate, not timed.
        stopwatch: how a call is timed; by default :class:`CudaEvents` on CUDA and :func:`wall_clock` elsewhere.
        progress: called after each round with the share done; 1 after the last, and only then.

    Returns:
        The seconds of every timed call.

    Example:
        >>> timings = measure({"inductor": lambda: a(x), "lnfold": lambda: b(x)})
        >>> print(timings.speedup("lnfold", "inductor"))
    """
    if stopwatch is None:
        stopwatch = CudaEvents(device) if torch.device(device).type == "cuda" else wall_clock
    preparations = prepare or {}

    def once(name: str) -> float:
        if name in preparations:
            preparations[name]()
        return stopwatch(candidates[name])

    names = list(candidates)
    last: list[float] = []
    for _ in range(warmup):
        last = [once(name) for name in names]
    is_long = bool(last) and min(last) > LONG_CALL
    order = numpy.random.default_rng(0)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    rounds, share = 0, 0.0
    while share < 1.0:
        for index in order.permutation(len(names)):
            if not is_long:
                once(names[index])
            samples[names[index]].append(once(names[index]))
        rounds += 1
        # Both the time and the rounds asked for have to be spent.
        share = min((time.perf_counter() - started) / seconds if seconds > 0 else 1.0, rounds / max(minimum_rounds, 1))
        if maximum_rounds is not None:
            share = max(share, rounds / maximum_rounds)
        if progress is not None:
            progress(min(1.0, share))
    return PairedTimings({name: tuple(values) for name, values in samples.items()})
