"""A test's state as Prometheus metrics, read off at each scrape: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lncompile.abtest.extras import require

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from lncompile.abtest.experiment import ABTest

#: Upper ends of the histogram's buckets, in seconds: three to a decade.
LIMITS = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]


class ABTestCollector:
    """What prometheus_client asks for a test's metrics; register it with a registry of your own, or use ``ab.metrics``.

    Example:
        >>> prometheus_client.REGISTRY.register(ABTestCollector(ab))
    """

    def __init__(self, test: ABTest) -> None:
        self._core = require("prometheus_client.core", "metrics", "ABTest.metrics")
        self._test = test

    def describe(self) -> list[Any]:
        """No families beforehand: several tests may be in one registry, told apart by their labels."""
        return []

    def collect(self) -> Iterator[Any]:
        """Yield the families, with their values now."""
        state = self._test.to_dict()
        arms, verdict = state["arms"], state["verdict"]
        each = ["test", "arm"]

        def counter(name: str, text: str, values: list[tuple[list[str], float]], labels: list[str]) -> Any:
            family = self._core.CounterMetricFamily(name, text, labels=labels)
            for label, value in values:
                family.add_metric([state["name"], *label], value)
            return family

        def gauge(name: str, text: str, values: list[tuple[list[str], float | None]], labels: list[str]) -> Any:
            family = self._core.GaugeMetricFamily(name, text, labels=labels)
            for label, value in values:
                family.add_metric([state["name"], *label], float("nan") if value is None else value)
            return family

        yield counter(
            "lncompile_ab_requests", "Requests answered", [([arm["name"]], arm["requests"]) for arm in arms], each
        )
        yield counter(
            "lncompile_ab_failures",
            "Requests at which the arm raised and the other arm did not",
            [([arm["name"]], arm["failures"]) for arm in arms],
            each,
        )
        yield gauge(
            "lncompile_ab_in_service",
            "1 while the arm answers requests",
            [([arm["name"]], float(arm["in_service"])) for arm in arms],
            each,
        )
        latency = self._core.HistogramMetricFamily(
            "lncompile_ab_latency_seconds", "Time of requests assigned at random, after warm-up", labels=each
        )
        for name, sketch in self._test.latencies().items():
            counts = zip(LIMITS, sketch.at_most(LIMITS), strict=True)
            buckets = [*((str(limit), count) for limit, count in counts), ("+Inf", sketch.count)]
            latency.add_metric([state["name"], name], buckets, sketch.total)
        yield latency
        yield gauge(
            "lncompile_ab_speedup",
            "Latency of the baseline over that of the candidate; low and high are its anytime-valid interval",
            [([bound], verdict["speedup"][bound]) for bound in ("estimate", "low", "high")],
            ["test", "bound"],
        )
        yield gauge(
            "lncompile_ab_p_value",
            "Anytime-valid p-value against equal latencies",
            [([], verdict["p_value"])],
            ["test"],
        )
        outcomes = ("faster", "slower", "equivalent", "undecided")
        yield gauge(
            "lncompile_ab_outcome",
            "1 for what is known of the candidate",
            [([outcome], float(outcome == verdict["outcome"])) for outcome in outcomes],
            ["test", "outcome"],
        )
        yield gauge(
            "lncompile_ab_regression",
            "1 if the candidate should not be used",
            [([], float(verdict["regression"]))],
            ["test"],
        )
        comparisons = state["comparisons"]
        results = {
            "agree": comparisons["compared"] - comparisons["differing"],
            "differ": comparisons["differing"],
            "skipped": comparisons["skipped"],
        }
        yield counter(
            "lncompile_ab_comparisons",
            "Requests answered by both arms",
            [([result], number) for result, number in results.items()],
            ["test", "result"],
        )


def registry_of(test: ABTest) -> CollectorRegistry:
    """Return a new registry with this test's metrics and no others."""
    registry: CollectorRegistry = require("prometheus_client", "metrics", "ABTest.metrics").CollectorRegistry()
    registry.register(ABTestCollector(test))
    return registry
