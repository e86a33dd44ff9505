"""Paired latency: who is called when, what the stopwatches wait for, and what is read off the samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest

from lncompile.comparisons.timing import CudaEvents, PairedTimings, Ratio, measure, wall_clock


def nothing() -> None:
    return None


# --- Rounds ----------------------------------------------------------------------------------------------------------


def test_progress_waits_for_the_minimum_of_rounds() -> None:
    """The time is up at once, the rounds are not: the share done is the lesser of the two."""
    shares: list[float] = []
    timings = measure({"a": nothing}, seconds=1e-9, minimum_rounds=4, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert len(timings.seconds["a"]) == 4


def test_progress_waits_for_the_time() -> None:
    shares: list[float] = []
    measure({"a": nothing}, seconds=0.02, minimum_rounds=1, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert all(share < 1.0 for share in shares[:-1])


def test_the_maximum_of_rounds_ends_it() -> None:
    shares: list[float] = []
    timings = measure({"a": nothing}, seconds=1e9, minimum_rounds=1, maximum_rounds=5, progress=shares.append)
    assert len(timings.seconds["a"]) == 5
    assert shares[-1] == 1.0


def test_the_order_is_random_and_each_call_is_prepared_untimed() -> None:
    log: list[str] = []

    def stopwatch(call: Callable[[], Any]) -> float:
        log.append("start")
        call()
        log.append("stop")
        return 1.0

    measure(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b")},
        seconds=1e-9,
        minimum_rounds=40,
        warmup=0,
        prepare={"b": lambda: log.append("prepare b")},
        stopwatch=stopwatch,
    )
    a, b = ["start", "a", "stop"], ["prepare b", "start", "b", "stop"]
    size = 2 * len(a + b)
    rounds = [log[start : start + size] for start in range(0, len(log), size)]
    assert all(order in (a + a + b + b, b + b + a + a) for order in rounds)
    assert 10 <= rounds.count(a + a + b + b) <= 30


def test_what_ran_before_makes_no_difference() -> None:
    """A call is slower behind another program's, and slower still behind bookkeeping; the programs are equal."""
    last, calls = "", 0

    def program(name: str) -> Callable[[], None]:
        def call() -> None:
            nonlocal last
            last = name

        return call

    def stopwatch(call: Callable[[], Any]) -> float:
        nonlocal calls
        calls += 1
        before = last
        call()
        return 1.0 + 0.02 * (before != last) + 0.1 * (calls % 4 == 1)

    candidates = {"a": program("a"), "b": program("b")}
    timings = measure(candidates, seconds=1e-9, minimum_rounds=25, warmup=0, stopwatch=stopwatch)
    assert set(timings.seconds["a"]) == set(timings.seconds["b"]) == {1.0}


@pytest.mark.parametrize(("seconds", "calls"), [(0.049, 2), (0.051, 1)])
def test_long_calls_are_made_once_a_round(seconds: float, calls: int) -> None:
    made: list[str] = []

    def stopwatch(call: Callable[[], Any]) -> float:
        call()
        return seconds

    candidates = {"a": lambda: made.append("a"), "b": lambda: made.append("b")}
    timings = measure(candidates, seconds=1e-9, minimum_rounds=7, warmup=1, stopwatch=stopwatch)
    assert len(timings.seconds["a"]) == len(timings.seconds["b"]) == 7
    assert made.count("a") == made.count("b") == 1 + calls * 7


def test_wall_clock_times_the_call() -> None:
    called: list[int] = []
    assert wall_clock(lambda: called.append(1)) > 0
    assert called == [1]


def test_cuda_events_stand_around_the_call_and_the_device_is_idle_before_and_after() -> None:
    log: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.position = -1

        def record(self) -> None:
            self.position = len(log)
            log.append("event")

        def elapsed_time(self, end: Event) -> float:
            log.append("read")
            return 1000.0 * (end.position - self.position)

    watch = CudaEvents("cuda:0", events=Event, synchronise=lambda device: log.append(f"wait for {device}"))
    assert watch(lambda: log.append("call")) == 2.0
    assert log == ["wait for cuda:0", "event", "call", "event", "wait for cuda:0", "read"]


# --- Statistics ------------------------------------------------------------------------------------------------------


@pytest.fixture
def timings() -> PairedTimings:
    """Rounds that drift by a factor of three. The norms are a tenth of each, and lnfold removes three quarters."""
    generator = numpy.random.default_rng(0)
    drift = numpy.linspace(1.0, 3.0, 200)

    def samples(seconds: float) -> tuple[float, ...]:
        return tuple(drift * (seconds + 0.001 * generator.standard_normal(200)))

    return PairedTimings({"inductor": samples(1.0), "lnfold": samples(0.925), "no norm": samples(0.9)})


def test_speedup_and_latency_hold_the_truth(timings: PairedTimings) -> None:
    ratio = timings.speedup("lnfold", "inductor")
    assert isinstance(ratio, Ratio)
    assert ratio.low <= ratio.median <= ratio.high
    assert ratio.low < 1 / 0.925 < ratio.high
    latency = timings.latency("inductor")
    assert latency.low < latency.median == timings.median("inductor") < latency.high


def test_share_removed_is_paired(timings: PairedTimings) -> None:
    share = timings.share_removed("lnfold", "inductor", "no norm")
    assert share is not None
    assert share.low <= share.median <= share.high
    assert share.median == pytest.approx(0.75, abs=0.03)
    # Unpaired, the drift alone would leave the cost of a norm unresolved.
    assert share.high - share.low < 0.2
    limit = timings.share_removed("no norm", "inductor", "no norm")
    assert limit is not None
    assert (limit.low, limit.median, limit.high) == pytest.approx((1.0, 1.0, 1.0))


def test_a_slower_candidate_removes_less_than_nothing(timings: PairedTimings) -> None:
    worse = PairedTimings({**timings.seconds, "lnfold": tuple(1.01 * s for s in timings.seconds["inductor"])})
    share = worse.share_removed("lnfold", "inductor", "no norm")
    assert share is not None
    assert share.high < 0


def test_no_share_of_a_cost_within_the_noise(timings: PairedTimings) -> None:
    seconds = timings.seconds["inductor"]
    shuffled = tuple(numpy.random.default_rng(1).permutation(seconds))
    noisy = PairedTimings({**timings.seconds, "no norm": shuffled})
    assert noisy.share_removed("lnfold", "inductor", "no norm") is None
