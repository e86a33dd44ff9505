"""What a test says of itself by now: its verdict, and what is to be said beside it."""

from __future__ import annotations

from collections.abc import Mapping

from lncompile.abtest.requests import Requests
from lncompile.abtest.results import Conclusion, outcome_of


def conclude(requests: Requests, alpha: float, minimum_effect: float) -> Conclusion:
    """Return the verdict on a test by now. Call it under the lock.

    Args:
        requests: what was answered so far.
        alpha: how often a test may be wrong.
        minimum_effect: the relative difference in latency that matters.
    """
    baseline, candidate = requests.arms
    speedup, counts = requests.measurements.speedup, requests.measurements.counts()
    minimum_effect = requests.measurements.effect_that_counts(minimum_effect)
    return Conclusion(
        outcome=outcome_of(speedup, minimum_effect),
        baseline=baseline.name,
        candidate=candidate.name,
        speedup=speedup,
        requests=requests.measurements.requests,
        elsewhere=counts["measured"] - requests.measurements.requests,
        buckets=counts["buckets"],
        alpha=alpha,
        p_value=requests.measurements.test.p_value,
        minimum_effect=minimum_effect,
        outputs_agree=requests.comparisons.equal,
        comparisons=requests.comparisons.compared,
        out_of_service={a.name: a.out_of_service for a in requests.arms if a.out_of_service is not None},
        failed=tuple(arm.name for arm in requests.arms if arm.failed),
        remarks=tuple(_remarks(requests, counts)),
    )


def _remarks(requests: Requests, counts: Mapping[str, int]) -> list[str]:
    comparisons = requests.comparisons
    remarks = [f"First difference: {example}." for example in comparisons.examples[:1]]
    if comparisons.skipped:
        remarks.append(f"{comparisons.skipped:,} requests could not be compared: {comparisons.why_skipped}.")
    if requests.settled is not None:
        remarks.append(f"All requests go to {requests.settled.name}.")
    if counts["other"]:
        remarks.append(
            f"{counts['other']:,} requests of {counts['measured']:,} have shapes beyond the first and do not count."
        )
    if requests.assigned_by_key:
        remarks.append(
            f"{100 * requests.assigned_by_key / requests.assigned:.0f}% of requests were assigned by key: with few "
            "keys the interval is too narrow, because requests of one key are alike."
        )
    for name, speedup in requests.measurements.opposites():
        remarks.append(f"Not so for inputs {name}: {speedup}.")
    return remarks
