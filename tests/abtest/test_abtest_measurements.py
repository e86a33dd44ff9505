"""``lncompile.ABTest``: what is counted, what it says, and where it says it. Times decide nothing."""

from __future__ import annotations

import concurrent.futures
import json
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from abtesting import ONE, Recorder, SimulatedTime, arms, noisy
from torch import Tensor

import lncompile
from lncompile.abtest import Interval, Outcome, rounded_shape_bucket, shape_bucket
from lncompile.abtest.sketch import LatencySketch

# --- what is counted --------------------------------------------------------------------------------------------------


def test_warmup_of_each_arm_and_shape_is_kept_out(time: SimulatedTime) -> None:
    seen: dict[tuple[str, tuple[int, ...]], int] = {}

    def arm(name: str) -> Callable[[Tensor], Tensor]:
        def answer(value: Tensor) -> Tensor:
            key = (name, tuple(value.shape))
            seen[key] = seen.get(key, 0) + 1
            time.now += 100.0 if seen[key] <= 3 else 0.5
            return value

        return answer

    ab = lncompile.ABTest(arms=arms(arm("old"), arm("new")), warmup=3)
    for _ in range(40):
        for size in (3, 100):
            ab(torch.ones(size))
    assert [bucket["name"] for bucket in ab.to_dict()["buckets"]] == ["float32[4]", "float32[128]"]
    for bucket in ab.to_dict()["buckets"]:
        assert bucket["warmup"] == {"old": 3, "new": 3}
        for seconds in bucket["seconds"].values():
            assert seconds["p99"] == pytest.approx(0.5, rel=0.01)
    assert sum(sketch.count for sketch in ab.latencies().values()) == 80 - 12


def test_nothing_is_counted_while_something_compiles() -> None:
    """In the call that compiles, and in calls that others make meanwhile."""
    compiling, finish = threading.Event(), threading.Event()

    def slow_backend(graph_module: Any, example_inputs: Any) -> Any:
        compiling.set()
        assert finish.wait(60)
        return graph_module.forward

    compiled = torch.compile(lambda value: value.sin() * 3, backend=slow_backend)
    ab = lncompile.ABTest(arms=arms(lambda value: value.cos(), lambda value: value.cos()), warmup=0)
    ab(ONE)
    assert ab.to_dict()["during_compilation"] == 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        compilation = pool.submit(compiled, ONE)
        assert compiling.wait(60)
        for _ in range(4):
            ab(ONE)
        finish.set()
        compilation.result()
    assert ab.to_dict()["during_compilation"] == 4
    ab(ONE)
    torch._dynamo.reset()  # forgets who wants to be told
    finish.set()
    recompiled = lncompile.ABTest(arms=arms(compiled, compiled), warmup=0)
    recompiled(ONE)
    recompiled(ONE)
    state = recompiled.to_dict()
    assert (state["during_compilation"], sum(arm["seconds"]["requests"] for arm in state["arms"])) == (1, 1)
    assert ab.to_dict()["during_compilation"] == 4


def test_shapes_beyond_the_number_of_buckets_are_served_and_not_in_the_verdict(time: SimulatedTime) -> None:
    random = numpy.random.default_rng(0)
    ab = lncompile.ABTest(
        arms=arms(time.arm(noisy(random)), time.arm(noisy(random, 5.0))), buckets=2, warmup=0, bucket=shape_bucket
    )
    for number in range(400):
        ab(torch.empty(number % 4 + 1))
    state = ab.to_dict()
    assert [bucket["name"] for bucket in state["buckets"]] == ["float32[1]", "float32[2]", "other"]
    assert [bucket["batches"] for bucket in state["buckets"]] == [6, 6, 0]
    assert state["verdict"]["requests"] == 192
    assert state["verdict"]["elsewhere"] == 208
    assert "200 requests of 400 have shapes beyond the first and do not count." in str(ab.verdict())


def test_memory_is_constant() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value: value, lambda value: value), buckets=8, warmup=0)
    for number in range(300):
        ab(number)
    for number in range(3000):
        ab(number % 7)
    state = ab.to_dict()
    assert len(state["buckets"]) == 9
    assert len(state["history"]) == state["test"]["batches"] < 256
    for number in range(3000):
        ab(number % 7)
    state = ab.to_dict()
    assert len(state["buckets"]) == 9
    assert len(state["history"]) <= 256 < state["test"]["batches"]
    assert state["history"][-1]["requests"] > 16 * 256


def test_a_bucket_function_that_raises_loses_no_request(caplog: pytest.LogCaptureFixture) -> None:
    def bucket(args: Any, kwargs: Any) -> str:
        raise KeyError("length")

    ab = lncompile.ABTest(arms=arms(), bucket=bucket, warmup=0)
    for _ in range(5):
        torch.testing.assert_close(ab(ONE), ONE * 2)
    assert caplog.text.count("has no bucket") == 1
    assert [bucket["name"] for bucket in ab.to_dict()["buckets"]] == ["other"]


def test_names_of_buckets() -> None:
    tensor = torch.ones(3, 100, dtype=torch.bfloat16)
    assert shape_bucket((tensor,), {}) == "bfloat16[3,100]"
    assert rounded_shape_bucket((tensor,), {}) == "bfloat16[4,128]"
    assert rounded_shape_bucket((), {"b": 5, "a": [tensor, tensor]}) == "bfloat16[4,128] ×2, 8"
    assert shape_bucket((), {"a": 1, "b": 2}) == shape_bucket((), {"b": 2, "a": 1})
    assert (
        shape_bucket((torch.tensor(1.0), None, True, 0.5, "text", -3), {}) == "float32[], None, True, float, str[4], -3"
    )
    assert shape_bucket((), {}) == "no arguments"
    assert rounded_shape_bucket((torch.empty(0, 1),), {}) == "float32[0,1]"
    long = shape_bucket(tuple(torch.ones(number) for number in range(50)), {})
    longer = shape_bucket(tuple(torch.ones(number) for number in range(51)), {})
    assert len(long) <= 100
    assert long != longer


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factor", "outcome"), [(0.9, Outcome.FASTER), (1.1, Outcome.SLOWER), (1.0, Outcome.EQUIVALENT)]
)
def test_outcomes(time: SimulatedTime, factor: float, outcome: Outcome) -> None:
    random = numpy.random.default_rng(3)
    ab = lncompile.ABTest(
        arms=arms(time.arm(noisy(random)), time.arm(noisy(random, factor))),
        minimum_effect=0.05,
        bucket=lambda *_: "all",
    )
    assert ab.verdict().outcome is Outcome.UNDECIDED
    assert "too few" in str(ab.verdict())
    for number in range(6000):
        ab(number)
    verdict = ab.verdict()
    assert verdict.outcome is outcome, str(verdict)
    assert verdict.speedup.low is not None
    assert verdict.speedup.high is not None
    assert verdict.speedup.low < 1 / factor < verdict.speedup.high
    assert (verdict.improvement, verdict.regression) == (outcome is Outcome.FASTER, outcome is Outcome.SLOWER)
    assert f"{verdict.speedup.estimate:.3f} [{verdict.speedup.low:.3f}" in str(verdict)
    if outcome is not Outcome.EQUIVALENT:
        assert ab.settle() == ("new" if outcome is Outcome.FASTER else "old")


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_a_difference_below_minimum_effect_never_makes_a_winner(time: SimulatedTime, factor: float) -> None:
    """However many requests show it: one percent, of which two matter. It is looked at after every batch."""
    random = numpy.random.default_rng(3)

    def latency(scale: float) -> Callable[[Any], float]:
        return lambda _: 0.1 * scale * (1.0 + 0.01 * float(random.standard_normal()))

    ab = lncompile.ABTest(
        arms=arms(time.arm(latency(1.0)), time.arm(latency(factor))), minimum_effect=0.02, bucket=lambda *_: "all"
    )
    for number in range(3000):
        ab(number)
        if number % 16 == 0:
            verdict = ab.verdict()
            assert verdict.winner is None, str(verdict)
            assert not verdict.regression
    verdict = ab.verdict()
    assert verdict.outcome is Outcome.EQUIVALENT
    assert verdict.speedup.low is not None
    assert verdict.speedup.high is not None
    # The control: that there is a difference is known.
    assert not verdict.speedup.low <= 1 <= verdict.speedup.high


@pytest.mark.parametrize(("seconds", "outcome"), [(1e-4, Outcome.EQUIVALENT), (1e-2, Outcome.FASTER)])
def test_of_short_calls_a_difference_that_places_in_memory_make_is_no_winner(
    time: SimulatedTime, seconds: float, outcome: Outcome
) -> None:
    """2.5% is more than ``minimum_effect``. Of a call of 100 µs it is 2.5 µs; the control is a call of 10 ms."""
    random = numpy.random.default_rng(5)

    def latency(scale: float) -> Callable[[Any], float]:
        return lambda _: seconds * scale * (1.0 + 0.01 * float(random.standard_normal()))

    ab = lncompile.ABTest(arms=arms(time.arm(latency(1.025)), time.arm(latency(1.0))), bucket=lambda *_: "all")
    for number in range(3000):
        ab(number)
        assert number % 16 or ab.verdict().winner in (None, "new")
    verdict = ab.verdict()
    assert verdict.outcome is outcome
    assert verdict.minimum_effect == pytest.approx(max(0.02, 3e-6 / (1.025 * seconds)), rel=0.02)


def test_a_lucky_mix_decides_nothing(time: SimulatedTime) -> None:
    """Keys send all long requests to one arm. Latencies of the arms differ tenfold; of like requests, not at all."""
    random = numpy.random.default_rng(1)
    long_keys = {"old": "", "new": ""}
    probe = {"old": Recorder(), "new": Recorder()}
    ab = lncompile.ABTest(arms=probe)
    for number in range(50):
        ab(str(number), ab_key=str(number))
    for name, recorder in probe.items():
        long_keys[name] = recorder.calls[0]

    def seconds(value: Tensor) -> float:
        return float(value.shape[0] * numpy.exp(random.normal(0, 0.1)))

    ab = lncompile.ABTest(arms=arms(time.arm(seconds), time.arm(seconds)))
    for _ in range(1500):
        long = random.random() < 0.5
        # Mostly long ones to the candidate, mostly short ones to the baseline.
        key = long_keys["new" if long == (random.random() < 0.9) else "old"]
        ab(torch.empty(100 if long else 1), ab_key=key)
    latencies = ab.latencies()
    means = {name: sketch.total / sketch.count for name, sketch in latencies.items()}
    assert means["new"] > 4 * means["old"]
    verdict = ab.verdict()
    assert verdict.outcome in (Outcome.UNDECIDED, Outcome.EQUIVALENT), str(verdict)
    assert verdict.requests > 500
    assert "100% of requests were assigned by key" in str(verdict)


def test_a_shape_for_which_the_opposite_holds_is_named(time: SimulatedTime) -> None:
    random = numpy.random.default_rng(2)

    def candidate(value: Tensor) -> float:
        return noisy(random, 0.8 if value.shape[0] == 1 else 1.3)(value)

    ab = lncompile.ABTest(arms=arms(time.arm(noisy(random)), time.arm(candidate)))
    for number in range(4000):
        ab(torch.empty(1 if number % 4 else 64))
    verdict = ab.verdict()
    assert verdict.outcome is Outcome.FASTER
    assert "Not so for inputs float32[64]: 0.7" in str(verdict)


def test_everything_is_json() -> None:
    ab = lncompile.ABTest(arms=arms(), shadow=0.5, warmup=0)
    assert json.loads(ab.to_json()) == ab.to_dict()
    for _ in range(600):
        ab(ONE)
    state = json.loads(ab.to_json())
    assert state == json.loads(ab.to_json())
    assert state["verdict"]["words"] == str(ab.verdict())
    assert state["verdict"]["outcome"] in {outcome.value for outcome in Outcome}
    assert state["test"]["batches"] == state["buckets"][0]["batches"] == state["history"][-1]["requests"] // 16
    assert str(Interval(None, None, None)) == "unknown"
    assert str(Interval(1.0, None, None)) == "1.000 [unknown]"


def test_quantiles_are_exact_to_one_percent() -> None:
    random = numpy.random.default_rng(0)
    values = numpy.exp(random.normal(-4, 1.5, 5000))
    halves = LatencySketch(), LatencySketch()
    for index, value in enumerate(values):
        halves[index % 2].add(float(value))
    sketch = LatencySketch.merged(halves)
    shares = [0.0, 0.01, 0.5, 0.9, 0.99, 1.0]
    expected = numpy.quantile(values, shares, method="inverted_cdf")
    numpy.testing.assert_allclose(numpy.asarray(sketch.quantiles(shares), dtype=float), expected, rtol=0.0101)
    assert sketch.total == pytest.approx(values.sum())
    counts = sketch.at_most([0.001, 0.02, 1e9])
    for count, limit in zip(counts, (0.001, 0.02), strict=False):
        assert (values <= limit * 0.98).sum() <= count <= (values <= limit * 1.02).sum()
    assert counts[-1] == 5000
    extremes = LatencySketch()
    extremes.add(0.0)
    extremes.add(1e9)
    assert extremes.count == 2
    assert LatencySketch().quantiles([0.5]) == [None]
