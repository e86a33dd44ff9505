"""The sequential test: not more false positives than promised however often one looks, and no difference overlooked.

Traffic is simulated (``traffic.py``), the statistics are the package's own. ``benchmarks/abtest.py`` runs more of it.
"""

from __future__ import annotations

import math

import numpy
import pytest
import torch
import traffic
from numpy.testing import assert_allclose

import lncompile
from lncompile.abtest import statistics, timers

ALPHA = 0.05
REQUESTS = 5000


def simulated(kind: str, seed: int, ratio: float = 0.5, speedup: float = 1.0) -> traffic.Looks:
    random = numpy.random.default_rng([seed, *kind.encode()])
    stream = traffic.KINDS[kind](random, REQUESTS)
    log_seconds, candidate = traffic.with_arms(random, stream, ratio, speedup)
    return traffic.sequential_test(stream, log_seconds, candidate, ratio)


# --- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_equal_arms_are_hardly_ever_told_apart(kind: str) -> None:
    """A/A: 1,000 runs of 5,000 requests of each kind, a look after every request."""
    rejections = [simulated(kind, seed).first_rejection(ALPHA) < math.inf for seed in range(1000)]
    assert sum(rejections) <= ALPHA * len(rejections)


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_equal_arms_with_an_unfair_coin(kind: str) -> None:
    """Where the guarantee is approximate."""
    rejections = [simulated(kind, seed, ratio=0.2).first_rejection(ALPHA) < math.inf for seed in range(200)]
    assert sum(rejections) <= ALPHA * len(rejections)


@pytest.mark.parametrize("kind", traffic.KINDS)
def test_a_t_test_after_every_request_finds_differences_that_are_not_there(kind: str) -> None:
    """The negative control: the traffic above would betray a test that must not be repeated."""
    rejections = 0
    for seed in range(60):
        random = numpy.random.default_rng([seed, *kind.encode()])
        rejections += traffic.welch_rejects(
            *traffic.with_arms(random, traffic.KINDS[kind](random, REQUESTS), 0.5, 1.0), ALPHA
        )
    assert rejections > 0.25 * 60


@pytest.mark.parametrize("kind", traffic.KINDS)
@pytest.mark.parametrize("speedup", [1.05, 1 / 1.05])
def test_five_percent_are_found(kind: str, speedup: float) -> None:
    """By nine runs in ten within 3,000 requests, and never the wrong way round."""
    looks = [simulated(kind, seed, speedup=speedup) for seed in range(60)]
    found = [look.first_rejection(ALPHA) for look in looks]
    assert sum(requests <= 3000 for requests in found) >= 54
    for look, requests in zip(looks, found, strict=True):
        if requests < math.inf:
            total = numpy.cumsum(look.differences)[numpy.searchsorted(look.requests, requests)]
            assert (total > 0) == (speedup > 1)


@pytest.mark.parametrize("kind", traffic.KINDS)
@pytest.mark.parametrize("speedup", [1.0, 1.3])
def test_the_interval_holds_the_true_speedup_at_every_look(kind: str, speedup: float) -> None:
    misses = 0
    for seed in range(40):
        looks = simulated(kind, seed, speedup=speedup)
        test = statistics.SequentialTest()
        missed = False
        for count, (difference, error) in enumerate(zip(looks.differences, looks.squared_errors, strict=True)):
            test.add(difference, error)
            if count % 8 == 0 and (interval := test.interval(ALPHA)).low is not None:
                assert interval.high is not None
                missed |= not interval.low <= speedup <= interval.high
        misses += missed
        assert interval.low is not None
        assert interval.high is not None
        assert interval.high / interval.low < 1.15
    assert misses <= 4


# --- its parts --------------------------------------------------------------------------------------------------------


def batches(seed: int, count: int = 50, size: int = 16) -> tuple[traffic.Floats, traffic.Booleans]:
    random = numpy.random.default_rng(seed)
    return random.standard_t(3, (count, size)) - 5, random.random((count, size)) < 0.5


def test_exchanging_the_arms_turns_the_difference_round() -> None:
    """What the guarantee rests on. The squared error, which the prior comes from, must not tell the arms apart."""
    log_seconds, candidate = batches(0)
    difference, error = statistics.batch_difference(log_seconds, candidate)
    turned, same_error = statistics.batch_difference(log_seconds, ~candidate)
    assert_allclose(turned, -difference, rtol=1e-12)
    assert_allclose(same_error, error, rtol=1e-12)


def test_a_factor_on_one_arm_is_found_exactly() -> None:
    log_seconds, candidate = batches(1)
    difference, error = statistics.batch_difference(log_seconds, candidate)
    slower, same_error = statistics.batch_difference(log_seconds + math.log(3) * candidate, candidate)
    assert_allclose(slower, difference - math.log(3), rtol=1e-12)
    assert_allclose(same_error, error, rtol=1e-9)


def test_without_outliers_the_difference_is_that_of_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "CLIP", 100.0)
    random = numpy.random.default_rng(2)
    log_seconds, candidate = random.uniform(0, 1, (50, 16)), batches(2)[1]
    difference, error = statistics.batch_difference(log_seconds, candidate)
    for row, mask, actual, squared in zip(log_seconds, candidate, difference, error, strict=True):
        assert_allclose(actual, row[~mask].mean() - row[mask].mean(), rtol=1e-9)
        pooled = sum(((row[m] - row[m].mean()) ** 2).sum() for m in (mask, ~mask)) / 14
        assert_allclose(squared, pooled * (1 / mask.sum() + 1 / (~mask).sum()), rtol=1e-9)


def test_outliers_are_drawn_in() -> None:
    log_seconds = numpy.tile([0.0, 0.1, -0.1, 0.05, -0.05, 0.02, -0.02, 0.0], 2)
    candidate = numpy.arange(16) >= 8
    log_seconds[3] += 20.0
    difference, _ = statistics.batch_difference(log_seconds, candidate)
    assert 0 < difference < 0.1
    coarse = numpy.zeros(16)
    coarse[0] = 1.0  # nothing to measure outliers by
    assert statistics.batch_difference(coarse, candidate)[0] == pytest.approx(1 / 8)


def test_a_batch_of_one_arm_says_nothing() -> None:
    for mask in (numpy.zeros(16, bool), numpy.ones(16, bool), numpy.arange(16) < 1):
        assert numpy.isnan(statistics.batch_difference(numpy.arange(16.0), mask)[0])


def test_the_evidence_is_a_mixture_over_sizes_of_effects() -> None:
    """The closed form against the integral of exp(λS - λ²V/2) over λ ~ N(0, ρ)."""
    from scipy import integrate, stats

    for total, squares, prior in ((3.0, 2.0, 0.5), (-1.0, 4.0, 10.0), (0.0, 1.0, 1.0)):
        expected, _ = integrate.quad(
            lambda size, total=total, squares=squares, prior=prior: (
                math.exp(size * total - size**2 * squares / 2) * stats.norm.pdf(size, scale=math.sqrt(prior))
            ),
            -40,
            40,
            limit=200,
        )
        actual = statistics.log_evidence(*map(numpy.float64, (total, squares, prior)))
        assert_allclose(actual, math.log(expected), rtol=1e-6)


def test_the_interval_is_what_the_evidence_does_not_reject() -> None:
    random = numpy.random.default_rng(4)
    test = statistics.SequentialTest()
    differences = random.normal(0.1, 0.2, 60)
    for count, difference in enumerate(differences):
        if count < statistics.FIRST_BATCHES:
            assert test.interval(ALPHA).low is None
            assert test.p_value == 1.0
        test.add(difference, 0.04)
    interval = test.interval(ALPHA)
    assert interval.estimate == pytest.approx(math.exp(differences.mean()))
    prior = statistics.prior_variance(numpy.full(4, 0.04))
    assert interval.low is not None
    assert interval.high is not None
    for end, inside, outside in ((interval.low, 1e-4, -1e-4), (interval.high, -1e-4, 1e-4)):
        for shift, rejected in ((inside, False), (outside, True)):
            remaining = differences - math.log(end) - shift
            evidence = statistics.log_evidence(remaining.sum(), (remaining**2).sum(), prior)
            assert (evidence > -math.log(ALPHA)) == rejected
    narrower = test.interval(0.5)
    assert narrower.low is not None
    assert interval.low < narrower.low
    assert test.p_value == pytest.approx(
        1
        / max(
            math.exp(statistics.log_evidence(differences[:n].sum(), (differences[:n] ** 2).sum(), prior))
            for n in range(4, 61)
        )
    )


def test_latencies_without_any_noise() -> None:
    """A simulator, or a clock that is coarse: no division by zero, and the exact ratio."""
    test = statistics.SequentialTest()
    for _ in range(200):
        test.add(math.log(1.25), 0.0)
    interval = test.interval(ALPHA)
    assert interval.estimate == pytest.approx(1.25)
    assert interval.low is not None
    assert interval.low > 1.0
    equal = statistics.SequentialTest()
    for _ in range(200):
        equal.add(0.0, 0.0)
    assert equal.interval(ALPHA).estimate == 1.0
    assert equal.p_value == 1.0


def test_a_test_on_requests_is_the_simulated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the simulations show holds for ``ABTest``: given the same coin, the same numbers come out."""
    stream = traffic.steady(numpy.random.default_rng(5), 3000)
    now = [0.0]
    taken = numpy.zeros(3000, dtype=bool)
    monkeypatch.setattr(timers.time, "perf_counter", lambda: now[0])

    def arm(is_candidate: bool) -> object:
        def answer(shape: torch.Tensor, request: torch.Tensor) -> None:
            taken[int(request)] = is_candidate
            now[0] = math.exp(stream.log_seconds[int(request)] - math.log(1.1) * is_candidate)

        return answer

    ab = lncompile.ABTest(arms={"old": arm(False), "new": arm(True)}, warmup=0)  # type: ignore[dict-item]
    for request in range(3000):
        now[0] = 0.0
        ab(torch.empty(4 ** int(stream.bucket[request])), torch.tensor(request))
    looks = traffic.sequential_test(stream, stream.log_seconds - math.log(1.1) * taken, taken)
    test = ab.to_dict()["test"]
    assert test["batches"] == len(looks.differences)
    assert_allclose(test["sum_of_differences"], looks.differences.sum(), rtol=1e-9)
    assert_allclose(test["sum_of_squared_differences"], (looks.differences**2).sum(), rtol=1e-9)
    assert_allclose(test["p_value"], math.exp(-looks.log_evidence.max()), rtol=1e-6)
    assert ab.verdict().improvement
