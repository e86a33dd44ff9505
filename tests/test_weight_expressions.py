"""Weights that a model computes from its parameters: they fold, and a change of what they are made of is noticed."""

from __future__ import annotations

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile

pytestmark = pytest.mark.usefixtures("without_inductor")

TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


class Normed(nn.Module):
    """A module whose output's last axis is normalised."""

    def __init__(self, inner: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.LayerNorm(width)

    def forward(self, value: Tensor) -> Tensor:
        return self.norm(self.inner(value))


class Stem(nn.Module):
    """A convolution, a batch norm, and a LayerScale of its channels, as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.empty(8))

    def forward(self, value: Tensor) -> Tensor:
        return self.batch_norm(self.convolution(value)).flatten(2).mT * self.scale


def check_updates(model: nn.Module, value: Tensor, folded: int = 1) -> None:
    """Fold it, then change every parameter and buffer in turn: each change shows, exactly."""
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": False}, fullgraph=True)
    torch.testing.assert_close(compiled(value), model(value), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == folded, str(report)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1.25).add_(0.125)
            torch.testing.assert_close(compiled(value), model(value), **TOLERANCE, msg=name)
    assert len(lncompile.reports(compiled)) == 1


def test_batch_norm_and_layer_scale() -> None:
    check_updates(randomise(Normed(Stem()).double().eval()), torch.randn(2, 3, 5, 5, dtype=torch.float64))


def test_batch_norm_in_training_is_left_alone() -> None:
    model = randomise(Normed(Stem()).double())
    model.inner.get_submodule("batch_norm").train()
    value = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    check = randomise(Normed(Stem()).double())
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": False})
    for _ in range(2):
        torch.testing.assert_close(compiled(value), check(value), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 0
    for one, other in zip(model.buffers(), check.buffers(), strict=True):
        torch.testing.assert_close(one, other)
