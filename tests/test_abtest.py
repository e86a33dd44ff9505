"""``lncompile.ABTest``: who answers, what is counted, what a failure does, what it says. Times decide nothing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import io
import json
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import lncompile
from lncompile.abtest import Interval, Outcome, rounded_shape_bucket, shape_bucket, timers
from lncompile.abtest.comparison import compare
from lncompile.abtest.sketch import LatencySketch
from lncompile.lowering import torch_private

ONE = torch.ones(2, 3)


def double(value: Tensor) -> Tensor:
    return value * 2


def broken(value: Tensor) -> Tensor:
    raise RuntimeError("no such kernel")


def arms(baseline: Callable[..., Any] = double, candidate: Callable[..., Any] = double) -> dict[str, Any]:
    return {"old": baseline, "new": candidate}


class Recorder:
    """An arm that remembers what it was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, value: Any = None, **kwargs: Any) -> Any:
        self.calls.append(value)
        return value


class SimulatedTime:
    """A clock that arms set, so that latencies are what a test says."""

    def __init__(self) -> None:
        self.now = 0.0

    def arm(self, seconds: Callable[[Any], float]) -> Callable[[Any], Any]:
        def answer(value: Any) -> Any:
            self.now += seconds(value)
            return value

        return answer


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    clock = SimulatedTime()
    monkeypatch.setattr(timers.time, "perf_counter", lambda: clock.now)
    return clock


def noisy(random: numpy.random.Generator, factor: float = 1.0) -> Callable[[Any], float]:
    return lambda _: factor * float(numpy.exp(random.normal(0, 0.2))) * 0.01


# --- who answers ------------------------------------------------------------------------------------------------------


def test_requests_are_assigned_by_the_ratio() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new), ratio=0.25)
    for number in range(2000):
        assert ab(number) == number
    assert sorted(old.calls + new.calls) == list(range(2000))
    assert 430 <= len(new.calls) <= 570


def test_a_key_keeps_its_arm_in_every_process() -> None:
    old, new = Recorder(), Recorder()
    first = lncompile.ABTest(arms=arms(old, new), ratio=0.3)
    users = [f"user {number}" for number in range(300)]
    for _ in range(3):
        for user in users:
            first(user, ab_key=user)
    assert not set(old.calls) & set(new.calls)
    assert 60 <= len(set(new.calls)) <= 120
    again = Recorder()
    second = lncompile.ABTest(arms=arms(Recorder(), again), ratio=0.3)
    for user in reversed(users):
        second(user, ab_key=user)
    assert set(again.calls) == set(new.calls)
    for different in ({"seed": 1}, {"name": "another"}):
        elsewhere = Recorder()
        another = lncompile.ABTest(arms=arms(Recorder(), elsewhere), ratio=0.3, **different)  # type: ignore[arg-type]
        for user in users:
            another(user, ab_key=user)
        assert set(elsewhere.calls) != set(new.calls)


def test_who_batches_requests_can_ask_where_a_key_goes() -> None:
    recorders: dict[str, list[str]] = {"old": [], "new": []}
    ab = lncompile.ABTest(arms={name: calls.append for name, calls in recorders.items()}, ratio=0.3, seed=5)
    for number in range(50):
        user = f"user {number}"
        arm = ab.assigned_to(user)
        ab(user, ab_key=user)
        assert recorders[arm][-1] == user
    assert min(map(len, recorders.values())) > 5


def test_keys_of_different_types_are_different_and_unstable_ones_refused() -> None:
    from lncompile.abtest.assignment import share_of

    assert len({share_of("1", "0"), share_of(1, "0"), share_of(2, "0"), share_of("1", "1")}) == 4
    with pytest.raises(TypeError, match=r"str\(key\)"):
        lncompile.ABTest(arms=arms())(ONE, ab_key=object())  # type: ignore[arg-type]


def test_settle_sends_everything_to_one_arm_until_resumed() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new))
    with pytest.raises(ValueError, match="no winner"):
        ab.settle()
    assert ab.settle("new") == "new"
    for number in range(50):
        ab(number)
    assert (len(old.calls), len(new.calls)) == (0, 50)
    assert "All requests go to new." in str(ab.verdict())
    assert ab.to_dict()["assigned"] == 0
    ab.resume()
    for number in range(50):
        ab(number)
    assert len(old.calls) > 10


def test_an_arm_is_taken_out_and_restored_by_hand() -> None:
    old, new = Recorder(), Recorder()
    ab = lncompile.ABTest(arms=arms(old, new))
    ab.take_out("new", "a suspicion")
    for number in range(50):
        ab(number)
    assert (len(old.calls), len(new.calls)) == (50, 0)
    assert ab.verdict().out_of_service == {"new": "a suspicion"}
    assert not ab.verdict().regression  # nothing is known against it
    with pytest.raises(ValueError, match="last one in service"):
        ab.take_out("old")
    with pytest.raises(ValueError, match="restore it first"):
        ab.settle("new")
    with pytest.raises(ValueError, match="no arm is called 'newer'"):
        ab.restore("newer")
    ab.restore("new")
    for number in range(50):
        ab(number)
    assert new.calls


# --- arms that fail ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["old", "new"])
def test_an_arm_that_raises_is_taken_out_and_nothing_is_lost(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    calls = {"old": 0, "new": 0}

    def arm(name: str) -> Callable[[int], int]:
        def answer(value: int) -> int:
            calls[name] += 1
            if name == failing and calls[name] > 10:
                raise RuntimeError("no such kernel")
            return value + 1

        return answer

    ab = lncompile.ABTest(arms=arms(arm("old"), arm("new")))
    assert [ab(number) for number in range(200)] == list(range(1, 201))
    assert calls[failing] == 11
    verdict = ab.verdict()
    assert verdict.failed == (failing,)
    assert verdict.regression == (failing == "new")
    assert f"{failing} is out of service: it raised RuntimeError: no such kernel." in str(verdict)
    assert f"arm '{failing}' is taken out of service" in caplog.text
    state = {arm["name"]: arm for arm in ab.to_dict()["arms"]}
    assert state[failing]["failures"] == 1
    assert sum(arm["requests"] for arm in state.values()) == 200
    assert ab.settle() == ("old" if failing == "new" else "new")


def test_an_arm_may_be_given_several_chances() -> None:
    ab = lncompile.ABTest(arms=arms(double, broken), max_failures=3)
    for _ in range(50):
        torch.testing.assert_close(ab(ONE), ONE * 2)
    state = ab.to_dict()
    assert state["arms"][1]["failures"] == 3
    assert not state["arms"][1]["in_service"]
    ab.restore("new")
    for _ in range(50):
        ab(ONE)
    assert ab.to_dict()["arms"][1]["failures"] == 6


def test_a_request_that_both_refuse_is_at_fault() -> None:
    ab = lncompile.ABTest(arms=arms(broken, broken))
    for _ in range(10):
        with pytest.raises(RuntimeError, match="no such kernel") as caught:
            ab(ONE)
        assert "raised too" in caught.value.__notes__[0]
    assert ab.verdict().out_of_service == {}


def test_the_last_arm_stays_in_service_and_its_callers_get_the_exception() -> None:
    ab = lncompile.ABTest(arms=arms(broken, double))
    ab.take_out("new")
    with pytest.raises(RuntimeError, match="no such kernel"):
        ab(ONE)
    assert list(ab.verdict().out_of_service) == ["new"]


@pytest.mark.parametrize(
    "cancelled", [KeyboardInterrupt, asyncio.CancelledError, concurrent.futures.CancelledError, SystemExit]
)
def test_being_cancelled_is_no_failure(cancelled: type[BaseException]) -> None:
    def interrupted(value: Tensor) -> Tensor:
        raise cancelled

    ab = lncompile.ABTest(arms=arms(interrupted, interrupted))
    with pytest.raises(cancelled):
        ab(ONE)
    assert ab.verdict().out_of_service == {}
    assert [arm["failures"] for arm in ab.to_dict()["arms"]] == [0, 0]


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


# --- shadow mode ------------------------------------------------------------------------------------------------------


def test_shadow_compares_a_sample() -> None:
    ab = lncompile.ABTest(
        arms=arms(lambda value: {"logits": value * 2}, lambda value: {"logits": value + value}), shadow=0.2
    )
    for _ in range(300):
        torch.testing.assert_close(ab(ONE)["logits"], ONE * 2)
    verdict = ab.verdict()
    assert 30 <= verdict.comparisons <= 90
    assert verdict.outputs_agree
    assert ab.to_dict()["comparisons"]["largest_relative_errors"] == {"['logits']": 0.0}
    assert f"Outputs agree ({verdict.comparisons} compared)." in str(verdict)


def test_outputs_that_differ_make_a_regression(caplog: pytest.LogCaptureFixture) -> None:
    ab = lncompile.ABTest(arms=arms(double, lambda value: value * 2.01), shadow=1.0)
    for _ in range(20):
        ab(ONE)
    verdict = ab.verdict()
    assert (verdict.outputs_agree, verdict.regression, verdict.improvement) == (False, True, False)
    assert "Outputs DIFFER (20 compared)." in str(verdict)
    assert "output differs by 5.00e-03 (float32) (inputs float32[2,4])" in str(verdict)
    assert caplog.text.count("answer differently") == 1
    assert ab.settle() == "old"
    tolerant = lncompile.ABTest(
        arms=arms(double, lambda value: value * 2.01), shadow=1.0, tolerances={torch.float32: 0.01}
    )
    tolerant(ONE)
    assert tolerant.verdict().outputs_agree


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.00001]), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), ""),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "differs by inf"),
        (torch.tensor([1.0, INFINITY]), torch.tensor([1.0, -INFINITY]), "differs by inf"),
        (torch.tensor([1.0, INFINITY]), torch.tensor([1.0, NAN]), "differs by inf"),
        (torch.tensor([0.0]), torch.tensor([0.0]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), ""),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), "differs by 5.00e-01 (int64)"),
        (torch.ones(2, dtype=torch.float16), torch.ones(2), "is float16[2] and float32[2]"),
        (torch.ones(2, 1), torch.ones(2), "is float32[2, 1] and float32[2]"),
        (torch.ones(1) * (1 + 1j), torch.ones(1) * (1 + 2j), "differs by"),
        ([torch.ones(1)], [torch.ones(1), torch.ones(1)], "different forms: [0] and [0], [1]"),
        ("a", "b", "is 'a' and 'b'"),
        (None, 1, "is of type NoneType and int"),
        (torch.empty(0), torch.empty(0), ""),
        (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), ""),
        (object(), object(), ""),
    ],
)
def test_what_counts_as_equal(one: Any, other: Any, words: str) -> None:
    _, differences = compare(one, other, {torch.float32: 1e-4})
    assert bool(differences) == bool(words)
    assert words in "".join(differences)


def test_shadow_runs_see_the_inputs_as_they_were() -> None:
    """An arm that writes into its inputs, a cache in an object among them, does so once."""

    def writes(value: Tensor, cache: SimpleNamespace) -> Tensor:
        cache.steps += 1
        cache.keys += 1
        return value.add_(1) * cache.steps + cache.keys

    ab = lncompile.ABTest(arms=arms(writes, writes), shadow=1.0)
    value, cache = torch.zeros(3), SimpleNamespace(steps=0, keys=torch.zeros(3))
    for number in range(1, 11):
        ab(value, cache)
        assert cache.steps == number
        torch.testing.assert_close(value, torch.full((3,), float(number)))
    assert (ab.verdict().comparisons, ab.verdict().outputs_agree) == (10, True)


def test_inputs_that_cannot_be_copied_are_not_compared() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value, lock: value, lambda value, lock: value), shadow=1.0)
    ab(ONE, threading.Lock())
    verdict = ab.verdict()
    assert (verdict.comparisons, verdict.outputs_agree) == (0, None)
    assert "1 requests could not be compared: the inputs cannot be copied: TypeError" in str(verdict)


def test_a_model_that_counts_is_not_run_twice() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, value: Tensor) -> Tensor:
            self.steps += 1
            return value * self.steps

    model = Counter()
    ab = lncompile.ABTest(model, arms={"old": model, "new": model}, shadow=1.0)
    for number in range(1, 6):
        torch.testing.assert_close(ab(ONE), ONE * number)
    assert "the model writes to its own buffers" in str(ab.verdict())
    model = Counter()
    compiled = lncompile.ABTest(
        model, arms={name: torch.compile(model, backend="aot_eager") for name in ("old", "new")}, shadow=1.0
    )
    for number in range(1, 6):
        torch.testing.assert_close(compiled(ONE), ONE * number)
    assert (compiled.verdict().comparisons, compiled.verdict().outputs_agree) == (0, None)


def test_shadow_runs_draw_the_same_random_numbers() -> None:
    def drawing(value: Tensor) -> Tensor:
        return value + torch.rand(3)

    expected = []
    torch.manual_seed(7)
    for _ in range(10):
        expected.append(drawing(torch.zeros(3)))
    ab = lncompile.ABTest(arms=arms(drawing, drawing), shadow=0.5)
    torch.manual_seed(7)
    for value in expected:
        torch.testing.assert_close(ab(torch.zeros(3)), value)
    assert ab.verdict().outputs_agree
    assert ab.verdict().comparisons > 0


def test_an_arm_that_fails_in_a_shadow_run_is_taken_out() -> None:
    ab = lncompile.ABTest(arms=arms(double, broken), shadow=1.0)
    torch.testing.assert_close(ab(ONE), ONE * 2)
    assert ab.verdict().failed == ("new",)


# --- threads and tasks ------------------------------------------------------------------------------------------------


def test_many_threads_lose_nothing() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, lambda value: value + 1), warmup=2, shadow=0.1)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ab, range(4000))) == list(range(1, 4001))
    state = ab.to_dict()
    assert sum(arm["requests"] for arm in state["arms"]) == state["assigned"] == 4000
    counted = sum(arm["seconds"]["requests"] for arm in state["arms"])
    warm = sum(sum(bucket["warmup"].values()) for bucket in state["buckets"])
    assert counted + warm + state["during_compilation"] == 4000
    assert state["comparisons"]["differing"] == 0


def test_many_threads_lose_nothing_when_an_arm_fails() -> None:
    started = threading.Semaphore(0)

    def failing(value: int) -> int:
        started.release()
        raise RuntimeError("no such kernel")

    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, failing))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ab, range(500))) == list(range(1, 501))
    assert ab.verdict().failed == ("new",)
    assert sum(arm["requests"] for arm in ab.to_dict()["arms"]) == 500


def test_tasks_await_answers_under_their_own_torch_state() -> None:
    user = contextvars.ContextVar("user", default="nobody")

    def state(value: Tensor) -> tuple[bool, bool, torch.dtype, bool]:
        product = value @ value.T
        assert user.get() == "somebody"
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            product.dtype,
            threading.current_thread() is main,
        )

    main = threading.current_thread()
    ab = lncompile.ABTest(arms=arms(state, state), workers=2)

    async def serve() -> list[Any]:
        answers = []
        user.set("somebody")
        with torch.enable_grad():
            answers.append(await ab.acall(ONE))
        with torch.no_grad():
            answers.append(await ab.acall(ONE, ab_key="user"))
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            answers.append(await ab.acall(ONE))
        return answers

    assert asyncio.run(serve()) == [
        (True, False, torch.float32, False),
        (False, False, torch.float32, False),
        (False, True, torch.bfloat16, False),
    ]
    ab.close()


def test_a_task_that_is_cancelled_harms_nobody() -> None:
    running, finish = threading.Event(), threading.Event()

    def slow(value: int) -> int:
        running.set()
        assert finish.wait(60)
        return value

    ab = lncompile.ABTest(arms=arms(slow, slow))

    async def serve() -> int:
        task = asyncio.create_task(ab.acall(1))
        await asyncio.to_thread(running.wait, 60)
        waiting = asyncio.create_task(ab.acall(2))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        finish.set()
        return await waiting

    assert asyncio.run(serve()) == 2
    ab.close()
    assert ab.verdict().out_of_service == {}
    assert sum(arm["requests"] for arm in ab.to_dict()["arms"]) == 2


def test_many_tasks() -> None:
    ab = lncompile.ABTest(arms=arms(lambda value: value + 1, lambda value: value + 1))

    async def serve() -> list[int]:
        return await asyncio.gather(*(ab.acall(number) for number in range(500)))

    assert asyncio.run(serve()) == list(range(1, 501))
    ab.close()


# --- time on a GPU ----------------------------------------------------------------------------------------------------


class FakeEvent:
    """A CUDA event of a device that is two measurements behind."""

    recorded: list[FakeEvent]

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: Any) -> None:
        self.recorded.append(self)

    def query(self) -> bool:
        return len(self.recorded) - self.recorded.index(self) > 4

    def elapsed_time(self, end: FakeEvent) -> float:
        assert end.query()
        return 250.0


def test_events_are_read_when_the_device_gets_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "recorded", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ab = lncompile.ABTest(arms=arms(), device="cuda", warmup=0)
    for _ in range(30):
        ab(ONE)
    state = ab.to_dict()
    assert state["waiting_for_device"] == 2
    assert sum(arm["seconds"]["requests"] for arm in state["arms"]) == 28
    assert state["arms"][0]["seconds"]["p50"] == pytest.approx(0.25, rel=0.01)


def test_a_device_that_never_answers_costs_constant_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEvent, "recorded", [], raising=False)
    monkeypatch.setattr(FakeEvent, "query", lambda self: False)
    monkeypatch.setattr(FakeEvent, "record", lambda self, stream: None)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    ab = lncompile.ABTest(arms=arms(lambda value: value, lambda value: value), device="cuda", warmup=0)
    for number in range(5000):
        ab(number)
    assert ab.to_dict()["waiting_for_device"] == 4096


# --- metrics and plots ------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    ab = lncompile.ABTest(arms=arms(), warmup=1, shadow=0.5, name="encoder")

    def samples() -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        text = generate_latest(ab.metrics).decode()
        families = text_string_to_metric_families(text)
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in families
            for sample in family.samples
        }

    def value(name: str, **labels: str) -> float:
        return samples()[(f"lncompile_ab_{name}", tuple(sorted({"test": "encoder", **labels}.items())))]

    assert numpy.isnan(value("speedup", bound="low"))
    for _ in range(800):
        ab(ONE)
    assert value("requests_total", arm="old") + value("requests_total", arm="new") == 800
    assert value("latency_seconds_count", arm="old") == value("requests_total", arm="old") - 1
    assert value("latency_seconds_bucket", arm="old", le="+Inf") == value("latency_seconds_count", arm="old")
    assert value("latency_seconds_sum", arm="new") == pytest.approx(ab.latencies()["new"].total)
    assert value("speedup", bound="low") == ab.verdict().speedup.low
    assert value("comparisons_total", result="agree") == ab.verdict().comparisons
    assert value("in_service", arm="new") == 1
    assert sum(value("outcome", outcome=outcome.value) for outcome in Outcome) == 1
    ab.take_out("new")
    assert value("in_service", arm="new") == 0


def test_several_tests_in_one_registry() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from lncompile.abtest.metrics import ABTestCollector

    registry = CollectorRegistry(auto_describe=True)
    one, two = (lncompile.ABTest(arms=arms(), name=name) for name in ("one", "two"))
    registry.register(ABTestCollector(one, two))
    text = generate_latest(registry).decode()
    assert 'lncompile_ab_requests_total{arm="old",test="one"} 0.0' in text
    assert 'lncompile_ab_requests_total{arm="old",test="two"} 0.0' in text
    assert text.count("# TYPE lncompile_ab_requests_total") == 1
    with pytest.raises(ValueError, match="different names, not 'one', 'one'"):
        ABTestCollector(one, one)


def test_plot(time: SimulatedTime, tmp_path: Any) -> None:
    random = numpy.random.default_rng(0)
    ab = lncompile.ABTest(arms=arms(time.arm(noisy(random)), time.arm(noisy(random, 0.9))))
    for panel in ab.plot().axes:
        assert [text.get_text() for text in panel.texts] == ["too few requests yet"]
    for number in range(3000):
        ab(torch.empty(1 if number % 3 else 50))
    figure = ab.plot(tmp_path / "ab.png", dpi=50)
    assert (tmp_path / "ab.png").read_bytes().startswith(b"\x89PNG")
    latencies, buckets, history = figure.axes
    assert [line.get_label().split(":")[0] for line in latencies.get_lines()] == ["old", "new"]
    assert [label.get_text() for label in buckets.get_yticklabels()] == ["float32[1]", "float32[64]", "all"]
    estimates = history.get_lines()[0].get_ydata()
    assert float(estimates[-1]) == pytest.approx(1 / 0.9, rel=0.05)
    assert not any(panel.texts for panel in figure.axes)
    picture = io.BytesIO()
    ab.plot(picture, format="svg")
    assert b"<svg" in picture.getvalue()


@pytest.mark.parametrize(
    ("package", "extra", "use"),
    [
        ("prometheus_client", "metrics", lambda ab: ab.metrics),
        ("matplotlib", "plot", lambda ab: ab.plot()),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, use: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'lncompile\[{extra}\]'"):
        use(lncompile.ABTest(arms=arms()))


# --- arguments --------------------------------------------------------------------------------------------------------


async def coroutine(value: Any) -> Any:
    return value


class AsyncCallable:
    async def __call__(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "pass a model"),
        ({"arms": {"one": double}}, "two arms"),
        ({"arms": {"one": double, "two": 3}}, "arm 'two' is no callable but int"),
        ({"arms": {"one": double, "two": coroutine}}, "arm 'two' is a coroutine function"),
        ({"arms": {"one": double, "two": AsyncCallable()}}, "arm 'two' is a coroutine function"),
        ({"arms": arms(), "mode": "max-autotune"}, "give one or other"),
        ({"arms": arms(), "ratio": 0.0}, "ratio is between 0.01 and 0.99, not 0.0"),
        ({"arms": arms(), "shadow": 2.0}, "shadow is between 0 and 1"),
        ({"arms": arms(), "alpha": 0.0}, "alpha is between"),
        ({"arms": arms(), "warmup": -1}, "warmup is between"),
        ({"arms": arms(), "buckets": 0}, "buckets is between"),
        ({"model": nn.Linear(3, 3), "options": {"lnfold.assits": True}}, "lnfold.assist"),
        ({"model": torch.compile(nn.Linear(3, 3))}, "compiled already"),
    ],
)
def test_bad_arguments_say_what_to_do(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lncompile.ABTest(**arguments)


def test_a_module_compiled_in_place_is_refused() -> None:
    module = nn.Linear(3, 3)
    module.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        lncompile.ABTest(module)


# --- compiled models --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Its norm folds."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return self.outer(self.norm(self.inner(value)))


@pytest.fixture
def block() -> Block:
    return randomise(Block()).eval()  # type: ignore[misc]


def test_a_model_in_both_arms(block: Block) -> None:
    """Both compile it, share its weights, agree with eager, before and after the weights change."""
    ab = lncompile.ABTest(block, shadow=1.0, warmup=2)
    value = torch.randn(4, 16)
    for _ in range(12):
        torch.testing.assert_close(ab(value), block(value), rtol=1e-4, atol=1e-5)
    block.inner.weight.mul_(3.0)
    for _ in range(12):
        torch.testing.assert_close(ab(value), block(value), rtol=1e-4, atol=1e-5)
    assert list(ab.arms) == ["inductor", "lnfold"]
    assert [report.folded for report in lncompile.reports(ab.arms["lnfold"])] == [1]
    verdict = ab.verdict()
    assert (verdict.comparisons, verdict.outputs_agree) == (24, True), str(verdict)
    # A second shape may compile again, and takes part in no measurement then.
    state = ab.to_dict()
    assert state["during_compilation"] >= 1
    counted = sum(arm["seconds"]["requests"] for arm in state["arms"])
    assert counted + state["during_compilation"] + sum(state["buckets"][0]["warmup"].values()) == 24


def test_each_arm_has_its_own_recompile_limit(block: Block) -> None:
    """Fixed shapes: every new one is compiled by both arms, up to Dynamo's limit for each."""
    apart = torch_private.separate_recompile_limits()
    if not apart:
        pytest.skip("this torch.compile has one limit for both")
    for arguments, expected in ((apart, 8), ({}, 4)):
        torch._dynamo.reset()
        counters = CompileCounter(), CompileCounter()
        compiled = [torch.compile(block, backend=counter, dynamic=False, **arguments) for counter in counters]
        with torch._dynamo.config.patch(recompile_limit=4):
            for size in range(2, 6):
                for arm in compiled:
                    arm(torch.randn(size, 16))
        assert sum(counter.frame_count for counter in counters) == expected


def test_both_arms_are_compiled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(function: Any, **arguments: Any) -> Any:
        calls.append(arguments)
        return function

    monkeypatch.setattr(torch, "compile", record)
    lncompile.ABTest(double, options={"lnfold.assist": False, "max_autotune": True}, dynamic=True, fullgraph=True)
    alike = {"dynamic": True, "fullgraph": True}
    assert calls == [
        {"backend": "inductor", "options": {"max_autotune": True}, **alike},
        {"backend": "lnfold", "options": {"lnfold.assist": False, "max_autotune": True}, **alike},
    ]
    calls.clear()
    lncompile.ABTest(double, mode="reduce-overhead")
    assert [(call["backend"], call["mode"]) for call in calls] == [
        ("inductor", "reduce-overhead"),
        ("lnfold", "reduce-overhead"),
    ]
    assert not any("options" in call for call in calls)
