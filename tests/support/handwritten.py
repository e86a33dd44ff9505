"""A model whose LayerNorms are written out by hand, and the checks of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import pytest
import torch
from graphs import CapturedCall, capture_all
from spelled_means import D, Norm
from torch import Tensor, nn

import lncompile
from lncompile.backend import lnfold
from lncompile.verification import relative_error


class Model(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.weight, self.bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        stream = self.first(value)
        stream = stream + self.second(torch.relu(self.norm(stream) * self.weight + self.bias))
        return self.head(self.norm(stream) * self.weight)


def named(norms: list[Norm]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("norm", norms, ids=lambda norm: norm.__name__)


def compiled_and_checked(model: nn.Module, value: Tensor, **options: bool) -> CapturedCall:
    """Compile a randomised model with ``lnfold``, and call it before and after an update of its parameters."""
    settings = {f"lnfold.{name}": choice for name, choice in options.items()}
    parameter_name, *_ = inspect.signature(model.forward).parameters
    call = capture_all(model, functools.partial(lnfold, options=settings), **{parameter_name: value})
    assert call.is_whole
    assert relative_error(call.result, model(value)) <= 1e-12
    for parameter in model.parameters():
        parameter.mul_(0.9).add_(0.05)
    assert relative_error(call.compiled(**call.inputs), model(value)) <= 1e-12
    return call


def counts(compiled: Callable[..., Tensor]) -> tuple[int, int, int]:
    (report,) = lncompile.reports(compiled)
    return report.total, report.folded, len(report.centerings)


class Image(nn.Module):
    """A stem of convolutions, a norm over some axes of ``[2, 12, 3, 4]`` with γ and β, and a second convolution."""

    def __init__(self, norm: Norm, axis: int | None) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, D, 2, stride=2), nn.Conv2d(D, 5, 1)
        sizes = {None: (1,), 1: (D, 1, 1), 2: (3, 1), 3: (4,)}[axis]
        self.weight, self.bias = (nn.Parameter(torch.zeros(sizes[0])) for _ in range(2))
        self.trailing = len(sizes) - 1
        self.axis = axis
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        normed = self.norm(self.stem(value))
        if self.axis is None:
            return self.head(torch.relu(normed))
        if self.trailing == 2:
            return self.head(self.weight[:, None, None] * normed + self.bias[:, None, None])
        return self.head(normed * self.weight + self.bias)
