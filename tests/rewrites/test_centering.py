"""Centering and composing weights as tensor functions, apart from any graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lncompile.passes.graph.axes import Axes
from lncompile.passes.rewrites.arithmetic import (
    batch_norm_scale,
    batch_norm_shift,
    center_composed_bias,
    center_scaled_weight,
    center_weight,
    channel_scale,
    compose_scales,
    compose_shifts,
)

CHANNELS = 6
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def rand(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64) + 0.5


def test_center_weight_is_exact_and_idempotent() -> None:
    weight = rand(CHANNELS, 4).float()
    axes = Axes.of(weight.shape, [0])
    centered = center_weight(weight, axes)
    assert centered.dtype is torch.float32
    torch.testing.assert_close(centered, (weight.double() - weight.double().mean(0)).float(), rtol=0, atol=0)
    torch.testing.assert_close(center_weight(centered, axes), centered)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_is_a_scale_and_a_shift(affine: bool) -> None:
    value, mean, var = rand(3, CHANNELS), rand(CHANNELS), rand(CHANNELS).square()
    weight, bias = (rand(CHANNELS), rand(CHANNELS)) if affine else (None, None)
    scale = batch_norm_scale(var, weight, 1e-3)
    expected = functional.batch_norm(value, mean, var, weight, bias, False, 0.1, 1e-3)
    torch.testing.assert_close(value * scale + batch_norm_shift(mean, bias, scale), expected, **TOLERANCE)


def test_scales_and_shifts_in_a_row() -> None:
    value, scales, shifts = rand(3, CHANNELS), rand(2, CHANNELS), rand(2, CHANNELS)
    expected = scales[1] * (scales[0] * value + shifts[0]) + shifts[1]
    scale, shift = compose_scales(scales[1], scales[0]), compose_shifts(scales[1], shifts[0], shifts[1])
    torch.testing.assert_close(value * scale + shift, expected, **TOLERANCE)
    torch.testing.assert_close(compose_shifts(scales[1], shifts[0], None), scales[1] * shifts[0], **TOLERANCE)


def test_channel_scale() -> None:
    scale = rand(CHANNELS, 1, 1)
    torch.testing.assert_close(channel_scale(scale), scale.flatten(), **TOLERANCE)
    torch.testing.assert_close(channel_scale(scale, divides=True), 1 / scale.flatten(), **TOLERANCE)


@pytest.mark.parametrize("has_bias", [True, False])
def test_composed_linear_layer(has_bias: bool) -> None:
    value, weight, bias = rand(3, 4), rand(CHANNELS, 4), rand(CHANNELS) if has_bias else None
    scale, shift = rand(CHANNELS), rand(CHANNELS)
    composed = functional.linear(
        value,
        center_scaled_weight(weight, scale, 0, Axes.of((CHANNELS, 4), [0])),
        center_composed_bias(bias, scale, shift, Axes.of((CHANNELS,), [0]), torch.float64),
    )
    raw = functional.linear(value, weight, bias) * scale + shift
    torch.testing.assert_close(composed, raw - raw.mean(-1, keepdim=True), **TOLERANCE)


def test_composed_transposed_convolution_in_groups() -> None:
    value, weight, bias, scale = rand(2, 6, 5), rand(6, 2, 3), rand(CHANNELS), rand(CHANNELS)
    composed = functional.conv_transpose1d(
        value,
        center_scaled_weight(weight, scale, 1, Axes.of((6, 2, 3), [1]), groups=3),
        center_composed_bias(
            bias,
            scale,
            None,
            Axes.of((3, 2), [1]).reshape((CHANNELS,)),
            torch.float64,  # type: ignore[arg-type]
        ),
        groups=3,
    )
    raw = functional.conv_transpose1d(value, weight, bias, groups=3) * scale[:, None]
    grouped = raw.unflatten(1, (3, 2))
    torch.testing.assert_close(composed, (grouped - grouped.mean(2, keepdim=True)).flatten(1, 2), **TOLERANCE)


def test_neither_bias_nor_shift() -> None:
    with pytest.raises(ValueError, match="neither"):
        center_composed_bias(None, rand(CHANNELS), None, Axes.of((CHANNELS,), [0]), torch.float64)


def test_a_weight_is_rounded_once() -> None:
    weight, scale = rand(CHANNELS, 4).bfloat16(), rand(CHANNELS).bfloat16()
    actual = center_scaled_weight(weight, channel_scale(scale), 0, Axes.of((CHANNELS, 4), [0]))
    exact = weight.double() * scale.double()[:, None]
    torch.testing.assert_close(actual, (exact - exact.mean(0)).bfloat16(), rtol=0, atol=0)
