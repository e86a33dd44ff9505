"""Gradients of LayerNorms written out by hand, some of them with parts that are detached."""

from __future__ import annotations

import torch
from architectures import randomise
from handwritten import Model, named
from spelled_means import EPS, D, Norm, product_with_ones, scaled_by, subtracted_from_the_mean
from spellings import annotated_transformer, normalized, rms_norm
from torch import Tensor
from torch.nn import functional

import lncompile
from lncompile.verification import relative_error


@named([annotated_transformer, normalized, rms_norm, product_with_ones, subtracted_from_the_mean])
def test_gradients(norm: Norm, without_inductor: None) -> None:
    folded, gradients = gradients_of(norm)
    assert folded == 2
    for gradient, reference in gradients:
        assert relative_error(gradient, reference) <= 1e-10


def gradients_of(norm: Norm) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """How many norms fold in a training, and the gradients of the compiled model beside those of eager."""
    model = randomise(Model(norm).double())
    value = torch.randn(64, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.training": "on"})
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_()
        expected = torch.autograd.grad(model(value).square().sum(), list(model.parameters()))
        actual = torch.autograd.grad(compiled(value).square().sum(), list(model.parameters()))
        folded = lncompile.explain(compiled, value).folded
    return folded, list(zip(actual, expected, strict=True))


def mean_detached(x: Tensor) -> Tensor:
    return scaled_by(x - x.mean(-1, keepdim=True).detach())


def mean_of_a_detached_tensor(x: Tensor) -> Tensor:
    return scaled_by(x - x.detach().mean(-1, keepdim=True))


def mean_without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(-1, keepdim=True)
    return scaled_by(x - mean)


def mean_of_squares_with_a_detached_mean(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean.detach() ** 2 + EPS).sqrt()


def detached_mean_beside_a_norm(x: Tensor) -> Tensor:
    return torch.relu(x - x.mean(-1, keepdim=True).detach()) + functional.layer_norm(x, (D,))


def deviation_detached(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.detach().std(-1, keepdim=True) + EPS)


def deviation_of_the_difference_detached(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.std(-1, keepdim=True).detach() + EPS)


# To the gradient a mean that is detached is a constant, and the difference from it is not centered.
DETACHED: dict[Norm, int] = {
    mean_detached: 0, mean_of_a_detached_tensor: 0, mean_without_gradients: 0, mean_of_squares_with_a_detached_mean: 0,
    detached_mean_beside_a_norm: 0, deviation_detached: 2, deviation_of_the_difference_detached: 2,
}  # fmt: skip


@named(list(DETACHED))
def test_gradients_of_what_is_detached(norm: Norm, without_inductor: None) -> None:
    folded, gradients = gradients_of(norm)
    assert folded == DETACHED[norm]
    for gradient, reference in gradients:
        assert relative_error(gradient, reference) <= 1e-10
