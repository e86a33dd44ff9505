"""Rounding: what centering does to narrow dtypes, where weights and activations are hard on a LayerNorm."""

from __future__ import annotations

import math

import numerics
import pytest
import torch
from architectures import Architecture, randomise
from in_each_dtype import in_each_dtype
from spelled_means import D, Norm, product_with_ones
from spellings import annotated_transformer, normalized, rms_norm
from torch import Tensor, nn

NARROW = [torch.bfloat16, torch.float16]

pytestmark = pytest.mark.usefixtures("without_inductor")


class Stream(nn.Module):
    """An embedding, two residual branches, and a norm: the stream of a pre-norm decoder."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(61, width), nn.LayerNorm(width)
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.inner_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embedding(ids)
        stream = stream + self.one(torch.tanh(stream - stream.mean(-1, keepdim=True)))
        return self.norm(stream + self.two(self.inner_norm(stream)))


def errors(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """Errors of eager and of lnfold relative to float64."""
    (expected,) = numerics.reference(model, {"ids": ids}).values()
    compiled = torch.compile(model, backend="lnfold")
    return numerics.relative_error(model(ids), expected), numerics.relative_error(compiled(ids), expected)


#: Models that CI runs in every dtype; the others in bfloat16 alone.
IN_EVERY_DTYPE = ("gpt2", "bloom", "whisper", "dinov2")


@in_each_dtype(lambda name, dtype: name in IN_EVERY_DTYPE or dtype is torch.bfloat16)
def test_the_rewrite_itself_adds_no_error(architecture: Architecture, dtype: torch.dtype) -> None:
    """Without Inductor, eager as the yardstick: what is left is what centering does."""
    found = numerics.measure(architecture, dtype, eager=True)
    assert all(error.passed for errors in found.values() for error in errors), f"\n{numerics.table(found)}"
    # A tied head makes logits of massive channels that are no float16.
    assert all(error.draws >= 8 for stress in ("plain", "large means") for error in found[stress])


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
def test_a_mean_far_above_the_spread_costs_no_digits(dtype: torch.dtype) -> None:
    """A LayerNorm gets a stream whose mean has eaten the digits; a centered stream has no mean to begin with."""
    ratios = []
    for seed in range(4):
        model = randomise(Stream().to(dtype), seed)
        numerics.large_means(model)
        eager, lnfold = errors(model, torch.arange(61))
        ratios.append(lnfold / eager)
    assert math.prod(ratios) ** (1 / len(ratios)) < 0.1


class StreamByHand(Stream):
    """The same with norms that are written out."""

    def __init__(self, function: Norm) -> None:
        super().__init__(D)
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embedding(ids)
        stream = stream + self.one(torch.tanh(stream - stream.mean(-1, keepdim=True)))
        inner = self.function(stream) * self.inner_norm.weight + self.inner_norm.bias
        return self.function(stream + self.two(inner)) * self.norm.weight + self.norm.bias


@pytest.mark.parametrize("dtype", [*NARROW, torch.float32])
@pytest.mark.parametrize(
    "function", [annotated_transformer, normalized, rms_norm, product_with_ones], ids=lambda norm: norm.__name__
)
def test_norms_by_hand_lose_no_digits(function: Norm, dtype: torch.dtype) -> None:
    """Neither on plain weights nor where the mean is far above the spread; there the author's lines lose them."""
    for stress, limit in ((numerics.as_they_are, numerics.BUDGET), (numerics.large_means, 0.5)):
        ratios = []
        for seed in range(4):
            model = randomise(StreamByHand(function).to(dtype), seed)
            stress(model)
            eager, lnfold = errors(model, torch.arange(61))
            ratios.append(lnfold / eager)
        assert math.prod(ratios) ** (1 / len(ratios)) < limit


def test_float16_stays_finite_where_a_common_mean_overflows() -> None:
    """Two addends of mean 40000: their sum is no float16, their centered sum is."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.norm = nn.Embedding(9, 16), nn.Embedding(9, 16), nn.LayerNorm(16)

        def forward(self, ids: Tensor) -> Tensor:
            return self.norm(self.one(ids) + self.two(ids))

    model = Sum()
    for table in (model.one, model.two):
        table.weight.mul_(100).add_(40_000)
    model = model.half()
    ids = torch.arange(9)
    assert not model(ids).isfinite().all()
    assert torch.compile(model, backend="lnfold")(ids).isfinite().all()


@pytest.mark.parametrize("largest", [20_000.0, 60_000.0])
def test_float16_stays_finite_with_massive_channels(largest: float) -> None:
    """The largest element has the mean's sign where it makes the mean, so centering makes it smaller."""
    for seed in range(4):
        model = randomise(Stream().half(), seed)
        signs = model.embedding.weight[:, list(numerics.CHANNELS)].sign()
        model.embedding.weight[:, list(numerics.CHANNELS)] = largest * signs
        ids = torch.arange(61)
        stays = model(ids).isfinite().flatten(1).all(-1)
        ours = torch.compile(model, backend="lnfold")(ids).isfinite().flatten(1).all(-1)
        assert stays.any()
        assert (ours | ~stays).all()


def test_float16_limit_a_mean_against_the_largest_element() -> None:
    """Where centering can overflow: an element above 32752, a mean of the other sign (docs/evidence.md)."""
    stream = torch.full((16,), -20_000.0)
    stream[0] = 60_000.0
    assert stream.half().isfinite().all()
    assert not (stream - stream.mean()).half().isfinite().all()
    bound = stream - stream.mean()
    assert bound.abs().max() <= 2 * stream.abs().max()
