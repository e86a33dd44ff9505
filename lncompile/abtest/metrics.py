"""A test's state as Prometheus metrics, read off at each scrape: nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lncompile.abtest.extras import require
from lncompile.abtest.results import Outcome

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from lncompile.abtest.experiment import ABTest

#: Upper ends of the histogram's buckets, in seconds: three to a decade.
LIMITS = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0]


class ABTestCollector:
    """What prometheus_client asks for the metrics of tests; ``ab.metrics`` is a registry with one.

    Args:
        tests: all that go into one registry, told apart by their names: a family of metrics appears in it once.

    Raises:
        ValueError: for two tests of one name.
        ImportError: without prometheus_client.

    Example:
        >>> prometheus_client.REGISTRY.register(ABTestCollector(encoder_test, decoder_test))
    """

    def __init__(self, *tests: ABTest) -> None:
        self._core = require("prometheus_client.core", "metrics", "ABTest.metrics")
        names = [test.name for test in tests]
        if len(set(names)) < len(names):
            raise ValueError(f"tests in one registry need different names, not {', '.join(map(repr, names))}")
        self._tests = tests

    def collect(self) -> Iterator[Any]:
        """Yield the families, with their values now."""
        counter, gauge = self._core.CounterMetricFamily, self._core.GaugeMetricFamily
        each = ["test", "arm"]
        requests = counter("lncompile_ab_requests", "Requests answered", labels=each)
        failures = counter(
            "lncompile_ab_failures", "Requests at which the arm raised and the other arm did not", labels=each
        )
        in_service = gauge("lncompile_ab_in_service", "1 while the arm answers requests", labels=each)
        latency = self._core.HistogramMetricFamily(
            "lncompile_ab_latency_seconds", "Time of requests assigned at random, after warm-up", labels=each
        )
        speedup = gauge(
            "lncompile_ab_speedup",
            "Latency of the baseline over that of the candidate; low and high are its anytime-valid interval",
            labels=["test", "bound"],
        )
        p_value = gauge("lncompile_ab_p_value", "Anytime-valid p-value against equal latencies", labels=["test"])
        outcome = gauge("lncompile_ab_outcome", "1 for what is known of the candidate", labels=["test", "outcome"])
        regression = gauge("lncompile_ab_regression", "1 if the candidate should not be used", labels=["test"])
        comparisons = counter("lncompile_ab_comparisons", "Requests answered by both arms", labels=["test", "result"])
        for test in self._tests:
            state, name = test.to_dict(), test.name
            verdict, compared = state["verdict"], state["comparisons"]
            for arm in state["arms"]:
                requests.add_metric([name, arm["name"]], arm["requests"])
                failures.add_metric([name, arm["name"]], arm["failures"])
                in_service.add_metric([name, arm["name"]], float(arm["in_service"]))
            for arm_name, sketch in test.latencies().items():
                counts = zip(LIMITS, sketch.at_most(LIMITS), strict=True)
                buckets = [*((str(limit), count) for limit, count in counts), ("+Inf", sketch.count)]
                latency.add_metric([name, arm_name], buckets, sketch.total)
            for bound, value in verdict["speedup"].items():
                speedup.add_metric([name, bound], float("nan") if value is None else value)
            p_value.add_metric([name], verdict["p_value"])
            for possible in Outcome:
                outcome.add_metric([name, possible.value], float(possible.value == verdict["outcome"]))
            regression.add_metric([name], float(verdict["regression"]))
            comparisons.add_metric([name, "agree"], compared["compared"] - compared["differing"])
            comparisons.add_metric([name, "differ"], compared["differing"])
            comparisons.add_metric([name, "skipped"], compared["skipped"])
        yield from (requests, failures, in_service, latency, speedup, p_value, outcome, regression, comparisons)


def registry_of(test: ABTest) -> CollectorRegistry:
    """Return a new registry with this test's metrics and no others."""
    registry: CollectorRegistry = require("prometheus_client", "metrics", "ABTest.metrics").CollectorRegistry()
    registry.register(ABTestCollector(test))
    return registry
