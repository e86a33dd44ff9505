"""What the tests of ``lncompile.ABTest`` share: arms, a clock that they set, and latencies with noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

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


def noisy(random: numpy.random.Generator, factor: float = 1.0) -> Callable[[Any], float]:
    return lambda _: factor * float(numpy.exp(random.normal(0, 0.2))) * 0.01
