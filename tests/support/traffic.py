"""Simulated traffic: latencies as servers have them, in arrays, so that thousands of tests can be run in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from scipy import signal, stats

from lncompile.abtest import statistics

Floats = NDArray[numpy.float64]
Booleans = NDArray[numpy.bool_]


@dataclass(frozen=True)
class Traffic:
    """Logarithms of latencies of a stream of requests, with the bucket of each, both ``[requests]``."""

    log_seconds: Floats
    bucket: NDArray[numpy.int64]


def steady(random: numpy.random.Generator, requests: int) -> Traffic:
    """Three shapes, noise with a heavy tail (Student's t, 3 degrees of freedom), one request in fifty tenfold."""
    bucket = random.choice(3, size=requests, p=[0.6, 0.3, 0.1])
    log_seconds = numpy.log([0.004, 0.012, 0.05])[bucket] + 0.1 * random.standard_t(3, requests)
    log_seconds += numpy.log(10) * (random.random(requests) < 0.02)
    return Traffic(log_seconds, bucket)


def drifting(random: numpy.random.Generator, requests: int) -> Traffic:
    """Load that swings and wanders (autocorrelation 0.98), bursts that take twice as long, a mix that changes."""
    time = numpy.linspace(0, 1, requests)
    swing = 0.3 * numpy.sin(2 * numpy.pi * (3 * time + random.random()))
    wander = signal.lfilter([0.06], [1, -0.98], random.standard_normal(requests))
    bursts = numpy.repeat(random.random(requests // 50 + 1) < 0.1, 50)[:requests]
    bucket = (random.random(requests) < 0.2 + 0.6 * time).astype(numpy.int64)
    noise = 0.15 * random.gamma(2.0, size=requests)  # skewed: nothing is faster than its best time
    return Traffic(numpy.log([0.004, 0.03])[bucket] + swing + wander + numpy.log(2) * bursts + noise, bucket)


KINDS = {"steady": steady, "drifting": drifting}


def with_arms(
    random: numpy.random.Generator, traffic: Traffic, ratio: float, speedup: float
) -> tuple[Floats, Booleans]:
    """Assign the requests at random; those of the candidate take ``1 / speedup`` times as long."""
    candidate = random.random(len(traffic.log_seconds)) < ratio
    return traffic.log_seconds - numpy.log(speedup) * candidate, candidate


@dataclass(frozen=True)
class Looks:
    """What a sequential test says after each batch.

    Attributes:
        requests: how many requests had come when the batch was full.
        differences: of each batch.
        log_evidence: against equal arms, after each batch; a look between batches finds that of the last one.
    """

    requests: NDArray[numpy.int64]
    differences: Floats
    squared_errors: Floats
    log_evidence: Floats

    def first_rejection(self, alpha: float) -> float:
        """After how many requests the arms are told apart; infinity if they never are."""
        rejected = self.log_evidence >= -numpy.log(alpha)
        return float(self.requests[numpy.argmax(rejected)]) if rejected.any() else numpy.inf


def sequential_test(traffic: Traffic, log_seconds: Floats, candidate: Booleans, ratio: float = 0.5) -> Looks:
    """Run the package's own statistics over a whole stream at once, looking after every request."""
    size = statistics.batch_size(ratio)
    members = []
    for bucket in numpy.unique(traffic.bucket):
        places = numpy.flatnonzero(traffic.bucket == bucket)
        members.append(places[: len(places) // size * size].reshape(-1, size))
    batches = numpy.concatenate(members)
    batches = batches[numpy.argsort(batches[:, -1])]
    differences, errors = statistics.batch_difference(log_seconds[batches], candidate[batches])
    usable = ~numpy.isnan(differences)
    batches, differences, errors = batches[usable], differences[usable], errors[usable]
    first = statistics.FIRST_BATCHES
    prior = statistics.prior_variance(errors[:first])
    evidence = statistics.log_evidence(numpy.cumsum(differences), numpy.cumsum(differences**2), prior)
    evidence[: first - 1] = 0.0
    return Looks(batches[:, -1] + 1, differences, errors, evidence)


def welch_rejects(log_seconds: Floats, candidate: Booleans, alpha: float, first: int = 50) -> bool:
    """What is done without thinking: Welch's t-test after every request, until it says that there is a difference."""
    moments: list[Any] = []
    for mask in (~candidate, candidate):
        count = numpy.cumsum(mask)
        mean = numpy.cumsum(numpy.where(mask, log_seconds, 0)) / numpy.maximum(count, 1)
        square = numpy.cumsum(numpy.where(mask, log_seconds**2, 0)) / numpy.maximum(count, 1)
        deviation = numpy.sqrt(numpy.maximum(square - mean**2, 0) * count / numpy.maximum(count - 1, 1))
        moments += [mean[first:], deviation[first:], count[first:]]
    return bool((stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue < alpha).any())
