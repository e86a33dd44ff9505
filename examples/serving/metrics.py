"""The server's own Prometheus metrics, beside those of the test."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lncompile.abtest.metrics import ABTestCollector
from serving.arms import EMBED, GENERATE
from serving.service import Service

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Requests, queue and batches of a service, and its test.

    Args:
        service: told where to report its batches.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "serve_requests", "Requests by endpoint and status", ["endpoint", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "serve_request_seconds",
            "From a request's arrival to its answer, waiting included",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "serve_batch_size", "Texts in one call of the model", ["task"], buckets=_SIZES, registry=self._registry
        )
        queue = Gauge("serve_queue_length", "Texts that wait", registry=self._registry)
        queue.set_function(lambda: len(service.batcher))
        ready = Gauge("serve_ready", "1 from the end of warm-up to SIGTERM", registry=self._registry)
        ready.set_function(lambda: float(service.ready and not service.draining))
        eager = Counter(
            "serve_eager_batches",
            "Batches answered by the model as it is, because their shape is not compiled",
            ["task"],
            registry=self._registry,
        )
        for task in (EMBED, GENERATE):
            eager.labels(task)  # 0 from the start
        service.on_eager = lambda task: eager.labels(task).inc()
        service.on_batch = lambda task, size: self._batches.labels(task).observe(size)
        self._registry.register(ABTestCollector(service.ab))

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(endpoint, str(status)).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        text: bytes = generate_latest(self._registry)
        return text
