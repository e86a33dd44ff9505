"""Timing a request without making it wait: CUDA events where the work is on a GPU, a monotonic clock elsewhere."""

from __future__ import annotations

import time
from typing import Any, Protocol

import torch


class Stopwatch(Protocol):
    """A running measurement."""

    def stop(self) -> None:
        """The work has been done, or handed to the device."""

    def seconds(self) -> float | None:
        """How long it took; None while the device is not through with it."""


class ClockStopwatch:
    """Time between start and stop by ``time.perf_counter``, which never goes back."""

    def __init__(self) -> None:
        self._stopped: float | None = None
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Note the time."""
        self._stopped = time.perf_counter()

    def seconds(self) -> float | None:
        """Seconds between start and stop."""
        return None if self._stopped is None else self._stopped - self._started


class CudaStopwatch:
    """Time between two events in the current stream. Nothing is synchronised: the result is there when it is there.

    The device's time, waiting for the next kernel to be launched included.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        event: Any = torch.cuda.Event
        self._start, self._end = event(enable_timing=True), event(enable_timing=True)
        self._start.record(self._stream)

    def stop(self) -> None:
        """Put the second event into the stream."""
        self._end.record(self._stream)

    def seconds(self) -> float | None:
        """Seconds between the events, once the device has passed both."""
        if not self._end.query():
            return None
        return float(self._start.elapsed_time(self._end)) / 1e3  # CUDA counts milliseconds


def cuda_in_use() -> bool:
    """Whether this process has used a GPU so far: asking anything of CUDA before would initialise it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def start(device: torch.device) -> Stopwatch:
    """Start timing work on a device."""
    return CudaStopwatch(device) if device.type == "cuda" else ClockStopwatch()
