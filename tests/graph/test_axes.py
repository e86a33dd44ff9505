"""Where the normalised axes go: through views, against what torch does to numbers."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lncompile.passes.graph.axes import Axes, PartlyConstant
from lncompile.passes.graph.factors import Factor
from lncompile.passes.rewrites.arithmetic import center_activation, center_scaled_weight, center_weight

F64 = torch.float64


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Two shapes of equally many elements, and the normalised dimensions of the first."""
    primes = draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=5))

    def cut() -> tuple[int, ...]:
        shape: list[int] = []
        for prime in primes:
            if shape and draw(st.booleans()):
                shape[-1] *= prime
            else:
                shape.append(prime)
        return tuple(shape)

    first, second = cut(), cut()
    normalised = draw(st.sets(st.integers(0, len(first) - 1), min_size=1))
    return first, second, tuple(sorted(normalised))


@settings(max_examples=300, deadline=None)
@given(views())
def test_centering_commutes_with_a_view(example: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> None:
    first, second, normalised = example
    axes = Axes.of(first, normalised)
    moved = axes.reshape(second)
    value = torch.randn(first, dtype=F64)
    expected = (value - value.mean(normalised, keepdim=True)).reshape(second)
    assert moved is not None, "cuts of one list of factors always refine each other"
    if moved.normalised_dimensions:
        torch.testing.assert_close(center_activation(value.reshape(second), moved), expected)
        assert moved.count == math.prod(first[i] for i in normalised)
    assert moved.reshape(first) == axes


def test_views_that_cut_across_the_axes_are_refused() -> None:
    assert Axes.trailing((2, 5, 12), 1).reshape((2, 4, 15)) is None
    assert Axes.trailing((4, 6), 1).reshape((4, 0)) is None


def test_symbolic_sizes() -> None:
    batch, length = sympy.symbols("s0 s1", positive=True, integer=True)
    axes = Axes.trailing((batch, length, 768), 1)
    flat = axes.reshape((batch * length, 768))
    assert flat is not None
    assert flat.normalised_dimensions == (1,)
    heads = flat.reshape((batch, length, 12, 64))
    assert heads is not None
    assert heads.normalised_dimensions == (2, 3)
    assert heads.reshape((batch, length, 768)) == axes
    assert axes.reshape((batch, length * 768)) == Axes(
        ((Factor(batch, False),), (Factor(length, False), Factor(768, True)))
    )


def test_broadcasting() -> None:
    axes = Axes.trailing((2, 5, 12), 1)
    assert axes.broadcast_operand((12,)) == Axes.trailing((12,), 1)
    assert axes.broadcast_operand((5, 1)) is None
    assert axes.broadcast_operand(()) is None
    with pytest.raises(PartlyConstant):
        Axes.trailing((2, 3, 4), 2).broadcast_operand((3, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_centered_in_float64_and_rounded_once(dtype: torch.dtype) -> None:
    weight = (torch.randn(64, 32, dtype=F64) + 3).to(dtype)
    centered = center_weight(weight, Axes.of((64, 32), [0]))
    wide = weight.to(F64)
    assert centered.dtype == dtype
    assert torch.equal(centered, (wide - wide.mean(0, keepdim=True)).to(dtype))


def test_weights_of_a_group() -> None:
    weight = torch.randn(12, 7, dtype=F64) + 1
    axes = Axes(((Factor(3, False), Factor(4, True)), (Factor(7, False),)))
    centered = center_weight(weight, axes)
    assert centered.view(3, 4, 7).mean(1).abs().max() < 1e-15
    assert (centered - weight).abs().max() > 0.1


def test_scale_is_composed_before_centering() -> None:
    weight, scale = torch.randn(6, 7, dtype=F64) + 1, torch.randn(6, dtype=F64)
    expected = scale[:, None] * weight
    expected = expected - expected.mean(0, keepdim=True)
    axes = Axes.of((6, 7), [0])
    torch.testing.assert_close(center_scaled_weight(weight, scale, 0, axes), expected)
    torch.testing.assert_close(center_scaled_weight(weight, scale.view(1, 6), 0, axes), expected)
