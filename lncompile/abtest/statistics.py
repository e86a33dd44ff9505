"""Is one arm faster? An answer that may be looked at after every request and is still wrong in at most α of all tests.

What is assumed, and what is not: requests are assigned to arms at random. Nothing is assumed of the latencies: load may
drift, requests may come in bursts, tails may be heavy. In the order they arrive the requests of one input-shape bucket
make batches of a fixed size; each gives one difference

    d = mean of log(seconds) over the baseline's requests - mean over the candidate's,

the logarithm of the candidate's speed-up on that stretch of traffic. Were the arms equal, the coin that assigned them
would decide all: with a fair coin, exchanging the names of the arms is as likely and turns d into -d, so that d is
symmetric about 0 given all that went before. For symmetric differences and any number λ

    exp(λ Σd - λ² Σd² / 2)

is a supermartingale that starts at 1 (V. de la Peña, "A general class of exponential inequalities for martingales and
ratios", Annals of Probability 27, 1999), without a condition on moments. Averaged over λ ~ N(0, ρ) it is

    E(S, V) = (1 + ρV)^(-1/2) exp(ρS² / (2(1 + ρV))),  S = Σd, V = Σd²,

the mixture of H. Robbins ("Statistical methods related to the law of the iterated logarithm", Annals of Mathematical
Statistics 41, 1970). By Ville's inequality it ever exceeds 1/α with probability at most α, so a test that rejects when
it does may be looked at any time and stopped at will. The speed-ups not rejected at a moment are a confidence sequence
(S. Howard, A. Ramdas, J. McAuliffe and J. Sekhon, "Time-uniform, nonparametric, nonasymptotic confidence sequences",
Annals of Statistics 49, 2021).

Two cases are approximate. With a coin that is not fair d has mean 0 but is not quite symmetric: simulation says how
good the guarantee is then (tests/abtest/test_abtest_statistics.py). And where shapes differ in their speed-up, the
interval is for the average over the batches seen. One case is not covered: requests of one key, which all go to one
arm, are not assigned independently, so few keys make the interval too narrow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray
from scipy import optimize

Floats = NDArray[numpy.float64]

#: Requests of the rarer arm in a batch, on average: enough for a spread, few enough for rare shapes to fill one.
REQUESTS_PER_ARM = 8
#: The interval is made narrowest at about this many batches; a hundredfold either way costs little.
TARGET_BATCHES = 100
#: How many batches say how large differences are to be expected, before the first look.
FIRST_BATCHES = 4
#: A latency further than this many standard deviations from its arm's median counts as if it were just there.
CLIP = 3.0
#: No speed-up beyond this, either way, is considered.
LARGEST_EFFECT = math.log(100.0)


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval. ``None`` where there is too little data for one.

    Attributes:
        estimate: the estimate.
        low: lower end.
        high: upper end.
    """

    estimate: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.estimate is None:
            return "unknown"
        if self.low is None or self.high is None:
            return f"{self.estimate:.3f} [unknown]"
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self) -> dict[str, float | None]:
        """Return it as a dict, ready for JSON."""
        return {"estimate": self.estimate, "low": self.low, "high": self.high}


def batch_size(ratio: float) -> int:
    """Requests in a batch where this share goes to the candidate."""
    return math.ceil(REQUESTS_PER_ARM / min(ratio, 1.0 - ratio))


def batch_difference(log_seconds: Floats, candidate: NDArray[numpy.bool_]) -> tuple[Floats, Floats]:
    """What a batch says of the candidate's speed-up.

    Latencies far out (a garbage collection, a burst on another core) are drawn in to 3 standard deviations from their
    arm's median, the deviation estimated from the median absolute deviation of both arms: what is compared are usual
    latencies, and not tails. A batch in which an arm has fewer than two requests says nothing (NaN).

    Args:
        log_seconds: logarithms of latencies, ``[..., requests]``.
        candidate: which of them are the candidate's, same shape.

    Returns:
        The difference of means, and the square of its standard error as the spread within the arms gives it; both
        ``[...]``. The second neither changes when the arms exchange names nor when one arm is slower by a factor.
    """
    residuals = numpy.empty_like(log_seconds)
    medians, counts = [], []
    for mask in (~candidate, candidate):
        counts.append(mask.sum(axis=-1))
        medians.append(_median(log_seconds, mask, counts[-1]))
        numpy.copyto(residuals, log_seconds - medians[-1][..., None], where=mask)
    # 1.4826 makes a median absolute deviation the standard deviation of a Gaussian.
    width = CLIP * 1.4826 * numpy.median(numpy.abs(residuals), axis=-1, keepdims=True)
    # Half of all latencies equal (a coarse clock): no scale to speak of outliers.
    residuals = numpy.where(width > 0, numpy.clip(residuals, -width, width), residuals)
    means, squares = [], numpy.zeros(residuals.shape[:-1])
    with numpy.errstate(divide="ignore", invalid="ignore"):
        for mask, median, count in zip((~candidate, candidate), medians, counts, strict=True):
            mean = numpy.where(mask, residuals, 0.0).sum(axis=-1) / count
            squares += numpy.where(mask, (residuals - mean[..., None]) ** 2, 0.0).sum(axis=-1)
            means.append(median + mean)
        error = squares / (residuals.shape[-1] - 2) * (1.0 / counts[0] + 1.0 / counts[1])
    usable = (counts[0] >= 2) & (counts[1] >= 2)
    return numpy.where(usable, means[0] - means[1], numpy.nan), numpy.where(usable, error, numpy.nan)


def _median(values: Floats, mask: NDArray[numpy.bool_], counts: NDArray[Any]) -> Floats:
    """Median of the masked values along the last axis; without any, of nothing in particular."""
    ordered = numpy.sort(numpy.where(mask, values, numpy.inf), axis=-1)
    last = numpy.maximum(counts - 1, 0)
    middle = numpy.stack([last // 2, numpy.maximum(counts, 1) // 2], axis=-1)
    chosen = numpy.take_along_axis(ordered, middle, axis=-1).mean(axis=-1)
    return numpy.where(counts > 0, chosen, 0.0)


def prior_variance(squared_errors: Floats) -> Floats:
    """ρ, the variance of λ in the mixture, from the squared errors of the first batches, ``[..., batches]``.

    Widths are smallest near ``ρV = 8`` for α = 0.05. The squared errors do not tell which arm is which, so choosing by
    them leaves the differences symmetric.
    """
    expected = numpy.mean(squared_errors, axis=-1)
    result: Floats = 8.0 / (TARGET_BATCHES * numpy.maximum(expected, 1e-12))
    return result


def log_evidence(total: Any, squares: Any, prior: Any) -> Any:
    """``log E(S, V)``, the logarithm of the evidence against equality (see the module's text), of arrays or numbers."""
    spread = 1.0 + prior * squares
    return prior * total**2 / (2.0 * spread) - 0.5 * numpy.log(spread)


class SequentialTest:
    """The test over the batches of all buckets, or of one. Memory and time per batch are constant.

    Each batch counts once, so buckets weigh in with their share of the traffic, and what is estimated is the average
    over the traffic seen: the geometric mean of requests' speed-ups.

    Example:
        >>> test = SequentialTest()
        >>> for difference in numpy.random.default_rng(0).normal(0.05, 0.1, 200):
        ...     test.add(difference, 0.01)
        >>> test.interval(0.05).low > 1
        True
    """

    def __init__(self) -> None:
        self.batches = 0
        self.largest_log_evidence = 0.0
        self._total = 0.0
        self._squares = 0.0
        self._first_errors: list[float] = []
        self._prior: float | None = None

    def add(self, difference: float, squared_error: float) -> None:
        """Count a batch: what :func:`batch_difference` returned."""
        self.batches += 1
        self._total += difference
        self._squares += difference**2
        if self._prior is None:
            self._first_errors.append(squared_error)
            if len(self._first_errors) == FIRST_BATCHES:
                self._prior = float(prior_variance(numpy.asarray(self._first_errors)))
        if self._prior is not None:
            self.largest_log_evidence = max(self.largest_log_evidence, self._log_evidence(0.0))

    @property
    def p_value(self) -> float:
        """Anytime-valid p-value against equal arms: 1 over the largest evidence so far."""
        return math.exp(-self.largest_log_evidence)

    def interval(self, alpha: float) -> Interval:
        """The speed-ups not rejected now: in at most ``alpha`` of all tests is the true one ever outside."""
        if self.batches == 0:
            return Interval(None, None, None)
        mean = self._total / self.batches
        threshold = -math.log(alpha)

        def excess(distance: float) -> float:
            return self._log_evidence(mean + distance) - threshold

        # The evidence against a speed-up grows with its distance from the mean, up to where distances explain
        # themselves. Unless the largest speed-up is rejected, the first crossing says nothing.
        reach = LARGEST_EFFECT + abs(mean)
        if self._prior is None or excess(reach) <= 0.0 or excess(0.0) >= 0.0:
            return Interval(math.exp(mean), None, None)
        width = optimize.brentq(excess, 0.0, reach, xtol=1e-9)
        return Interval(math.exp(mean), math.exp(mean - width), math.exp(mean + width))

    def _log_evidence(self, effect: float) -> float:
        total = self._total - self.batches * effect
        squares = self._squares - 2.0 * effect * self._total + self.batches * effect**2
        assert self._prior is not None
        return float(log_evidence(total, max(squares, 0.0), self._prior))

    def to_dict(self, alpha: float) -> dict[str, Any]:
        """Return estimate, interval and what they are made of, ready for JSON."""
        return {
            "speedup": self.interval(alpha).to_dict(),
            "p_value": self.p_value,
            "batches": self.batches,
            "sum_of_differences": self._total,
            "sum_of_squared_differences": self._squares,
            "prior_variance": self._prior,
        }
