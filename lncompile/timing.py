"""Paired latency: several ways to run one thing, interleaved in one process, so that drift hits all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from scipy import stats


@dataclass(frozen=True)
class Ratio:
    """A ratio of latencies with its 95% interval; above 1 the candidate is faster than the baseline."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class PairedTimings:
    """Seconds of each call, by candidate; the i-th calls of all candidates were made in one round."""

    seconds: Mapping[str, tuple[float, ...]]

    def median(self, name: str) -> float:
        """Median seconds of a candidate."""
        return float(numpy.median(self.seconds[name]))

    def speedup(self, name: str, baseline: str) -> Ratio:
        """Median of the per-round ratios ``baseline / name``, with a bootstrap interval.

        Args:
            name: the candidate.
            baseline: what it is compared with.
        """
        ratios = numpy.asarray(self.seconds[baseline]) / numpy.asarray(self.seconds[name])
        interval = stats.bootstrap(
            (ratios,), numpy.median, confidence_level=0.95, method="percentile", rng=numpy.random.default_rng(0)
        ).confidence_interval
        return Ratio(float(numpy.median(ratios)), float(interval.low), float(interval.high))

    def to_dict(self) -> dict[str, Any]:
        """Return medians and all samples, ready for JSON."""
        return {name: {"median_s": self.median(name), "samples_s": list(v)} for name, v in self.seconds.items()}


def measure(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 10.0,
    minimum_rounds: int = 15,
    warmup: int = 3,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> PairedTimings:
    """Time several callables in turn, round after round, the order turning each round.

    Args:
        candidates: what to time, by name. They do the same work.
        seconds: how long to go on, warm-up not counted.
        minimum_rounds: go on at least this long.
        warmup: calls of each before any is timed.
        device: where the work happens; calls on CUDA are synchronised.
        progress: called with the share done, between 0 and 1.

    Returns:
        The seconds of every call.

    Example:
        >>> timings = measure({"inductor": lambda: a(x), "lnfold": lambda: b(x)})
        >>> print(timings.speedup("lnfold", "inductor"))
    """
    synchronise = torch.cuda.synchronize if torch.device(device).type == "cuda" else _nothing
    for _ in range(warmup):
        for call in candidates.values():
            call()
            synchronise()
    names = list(candidates)
    samples: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    rounds = 0
    while rounds < minimum_rounds or time.perf_counter() - started < seconds:
        # Turning the order keeps "who ran after whom" from favouring one of them.
        turn = rounds % len(names)
        for name in names[turn:] + names[:turn]:
            before = time.perf_counter()
            candidates[name]()
            synchronise()
            samples[name].append(time.perf_counter() - before)
        rounds += 1
        if progress is not None:
            progress(min(1.0, max((time.perf_counter() - started) / seconds, rounds / minimum_rounds - 1)))
    return PairedTimings({name: tuple(values) for name, values in samples.items()})


def _nothing() -> None:
    """Nothing to wait for: CPU work is done when the call returns."""
