"""Weights that a model computes from its parameters: they fold, and a change of what they are made of is noticed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn.utils import prune

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
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"}, fullgraph=True)
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
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    for _ in range(2):
        torch.testing.assert_close(compiled(value), check(value), **TOLERANCE)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 0
    for one, other in zip(model.buffers(), check.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def linear() -> nn.Linear:
    return nn.Linear(6, 8)


def pruned() -> nn.Module:
    layer = linear()
    prune.random_unstructured(layer, "weight", 0.4)
    return layer


class Softened(nn.Module):
    """A parametrization out of many elementary functions."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.rand(8, 6) > 0.3)
        self.other = nn.Parameter(torch.empty(6))

    def forward(self, weight: Tensor) -> Tensor:
        bounded = torch.tanh(weight).clamp(-0.9, 0.9) + nn.functional.softplus(weight) * torch.sigmoid(self.other)
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True) + weight.norm() + weight.square().sum().sqrt()
        causal = torch.tril(torch.ones(8, 6, dtype=torch.bool))
        halves = torch.cat([weight[:4].exp(), weight[4:].abs() ** 0.5])
        return torch.where(self.mask, bounded / norm, 0.5) + halves.masked_fill(causal, 0.25) * self.other.expand(8, 6)


def parametrized() -> nn.Module:
    layer = linear()
    nn.utils.parametrize.register_parametrization(layer, "weight", Softened())
    nn.utils.parametrize.register_parametrization(layer, "bias", Exponential())
    return layer


class Exponential(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return torch.exp(value) + value.mean() + value.std()


class MergedLowRank(nn.Module):
    """LoRA, merged at each call: ``W + B A scale``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)
        self.down, self.up = nn.Parameter(torch.empty(2, 6)), nn.Parameter(torch.empty(8, 2))

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.linear(value, self.layer.weight + self.up @ self.down * 0.5, self.layer.bias)


class BoundedLowRank(MergedLowRank):
    """A weight that needs a matrix product which no centering can pass."""

    def forward(self, value: Tensor) -> Tensor:
        return nn.functional.linear(value, torch.tanh(self.up @ self.down), self.layer.bias)


class LowRankBranch(MergedLowRank):
    """LoRA at run time: a frozen layer and, beside it, two small ones."""

    def forward(self, value: Tensor) -> Tensor:
        return self.layer(value) + value @ self.down.T @ self.up.T * 0.5


class StandardisedConvolution(nn.Module):
    """Weight standardisation, as in BiT and NFNets."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(6, 8, 3, padding="same")

    def forward(self, value: Tensor) -> Tensor:
        weight = self.convolution.weight
        mean, var = weight.mean((1, 2), keepdim=True), weight.var((1, 2), keepdim=True)
        weight = (weight - mean) * torch.rsqrt(var + 1e-4)
        return nn.functional.conv1d(value[..., None], weight, self.convolution.bias, padding="same").squeeze(-1)


class FrozenBatchNorm(nn.Module):
    """DETR's: a batch norm written out, of buffers only."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(6, 8, 1, bias=False)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(8))

    def forward(self, value: Tensor) -> Tensor:
        scale = self.weight.reshape(1, -1, 1) * (self.running_var.reshape(1, -1, 1) + 1e-5).rsqrt()
        shift = self.bias.reshape(1, -1, 1) - self.running_mean.reshape(1, -1, 1) * scale
        return (self.convolution(value[..., None]) * scale + shift).squeeze(-1)


class Experts(nn.Module):
    """A mixture of experts: each token's rows weighted by its gate and added where they belong."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])

    def forward(self, value: Tensor) -> Tensor:
        gates = torch.softmax(self.router(value), -1)
        combined = value.new_zeros(value.shape[0], 8)
        for number, expert in enumerate(self.experts):
            rows = torch.arange(number, value.shape[0])
            combined = combined.index_add(0, rows, expert(value[rows]) * gates[rows, number, None])
        return combined


MODULES: dict[str, Callable[[], nn.Module]] = {
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(linear()),
    "spectral_norm_hook": lambda: nn.utils.spectral_norm(linear()),
    "spectral_norm_of_a_convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (6, 1)), nn.utils.parametrizations.spectral_norm(nn.Conv1d(6, 8, 1)), nn.Flatten()
    ),
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(linear()),
    "weight_norm_hook": lambda: nn.utils.weight_norm(linear()),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8)),
    "orthogonal_cayley": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"),
    "pruned": pruned,
    "parametrized": parametrized,
    "merged_low_rank": MergedLowRank,
    "bounded_low_rank": BoundedLowRank,
    "low_rank_branch": LowRankBranch,
    "standardised_convolution": StandardisedConvolution,
    "experts": Experts,
    "frozen_batch_norm": FrozenBatchNorm,
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore")
def test_modules(name: str) -> None:
    model = randomise(Normed(MODULES[name]()).double()).eval()
    width = 8 if "orthogonal" in name else 6
    # To standardise a weight is a norm of the weight, written by hand.
    folded = 2 if name == "standardised_convolution" else 1
    check_updates(model, torch.randn(5, width, dtype=torch.float64), folded)


def test_spectral_norm_in_training_updates_its_vectors() -> None:
    model = randomise(Normed(nn.utils.parametrizations.spectral_norm(linear())).double())
    other = copy.deepcopy(model)
    value = torch.randn(5, 6, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    for _ in range(3):
        torch.testing.assert_close(compiled(value), other(value), **TOLERANCE)
    # The weight itself is a parameter divided by a number of each call: only that parameter is centered.
    assert all(report.folded == 1 for report in lncompile.reports(compiled))


class UnderAutocast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, value: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(value)


def autocast_error(model: nn.Module, around: bool) -> tuple[int, float]:
    """Sites folded, and how far the compiled model is from eager, in single precision."""
    value = torch.randn(5, 6)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"}, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        actual, expected = compiled(value), model(value)
        compiled(value)
    (report,) = lncompile.reports(compiled)
    return report.folded, float((actual.double() - expected.double()).abs().max())


@pytest.mark.parametrize("around", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_a_matrix_product_of_parameters_under_autocast_is_left_in_the_graph(around: bool, inside: bool) -> None:
    layer = BoundedLowRank()
    model = randomise(Normed(UnderAutocast(layer) if inside else layer)).eval()
    folded, error = autocast_error(model, around)
    assert folded == (not around and not inside)
    assert error < 1e-5


@pytest.mark.parametrize("around", [True, False])
def test_a_merged_low_rank_weight_under_autocast_is_centered_in_its_parts(around: bool) -> None:
    layer = MergedLowRank()
    model = randomise(Normed(layer if around else UnderAutocast(layer))).eval()
    folded, error = autocast_error(model, around)
    assert folded == 1
    assert error < 0.05


def test_a_norm_of_parameters_under_autocast_folds_in_single_precision() -> None:
    model = randomise(Normed(nn.utils.parametrizations.weight_norm(linear()))).eval()
    assert autocast_error(model, True)[0] == 1
    half = randomise(Normed(nn.utils.parametrizations.weight_norm(linear())).bfloat16()).eval()
    value = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(half, backend="lnfold", options={"lnfold.assist": "off"})
        torch.testing.assert_close(compiled(value), half(value), rtol=0.05, atol=0.05)
    assert lncompile.reports(compiled)[0].folded == 0


def test_autocast_turned_on_later_makes_another_graph() -> None:
    model = randomise(Normed(BoundedLowRank())).eval()
    value = torch.randn(5, 6)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    compiled(value)
    with torch.autocast("cpu", torch.bfloat16):
        compiled(value)
    assert sorted(report.folded for report in lncompile.reports(compiled)) == [0, 1]
