"""What centering makes of a graph, as text: the docstring's before and after, with every name in it.

Each test runs the pipeline on a small model up to one pass, and compares the graph in front of the pass and behind it
with what stands here. The graphs are run as well (``golden.before_and_after``). ``expectations`` says how the texts are
written anew.
"""

# ruff: noqa: E501

from __future__ import annotations

import torch
from expectations import assert_expected
from golden import D, Plain, before_and_after, ready, rows
from torch import Tensor, nn
from torch_versions import unless_old

pytestmark = unless_old("Dynamo spells some graphs otherwise")


def test_center() -> None:
    """``CW`` takes the place of ``W``, ``Cb`` that of ``b``. The norm stays, and is still right."""
    before, after = before_and_after("center", ready(Plain()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias):
            linear = functional.linear(x, linear_weight, linear_bias)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            linear = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )


def test_center_in_training() -> None:
    """Where the weight's gradient is wanted it is centered in its own dtype, and stays in the graph."""
    _, after = before_and_after("lower", ready(Plain()), rows(), gradients=True, training="on")
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias):
            linear_bias_centered_to = linear_bias.to(float64)  # f64[4]
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)  # f64[1]
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)  # f64[4]
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)  # f64[4, 4]
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)  # f64[1, 4]
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)  # f64[4, 4]
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            linear = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            layer_norm_mul = torch.mul(linear, linear)  # f64[3, 4]
            layer_norm_mean = torch.mean(layer_norm_mul, [-1], True)  # f64[3, 1]
            layer_norm_add = torch.add(layer_norm_mean, 1e-05)  # f64[3, 1]
            layer_norm_rsqrt = torch.rsqrt(layer_norm_add)  # f64[3, 1]
            layer_norm_mul_1 = torch.mul(linear, layer_norm_rsqrt)  # f64[3, 4]
            layer_norm_mul_2 = torch.mul(layer_norm_mul_1, norm_weight)  # f64[3, 4]
            layer_norm_add_1 = torch.add(layer_norm_mul_2, norm_bias)  # f64[3, 4]
            layer_norm_to = layer_norm_add_1.to(float64)  # f64[3, 4]
            layer_norm_contiguous = layer_norm_to.contiguous()  # f64[3, 4]
            return (layer_norm_contiguous,)
        """,
    )


class AtRunTime(nn.Module):
    """Three norms of an activation that is not linear in any weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.first, self.second = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D)
        self.third = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.linear(x))
        return self.first(x) * self.second(x) * self.third(x)


def test_center_at_run_time() -> None:
    """An activation is centered once for several norms, where that costs less than it saves."""
    before, after = before_and_after("center", ready(AtRunTime()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, first_weight, first_bias, second_weight, second_bias,
            third_weight, third_bias):
            linear = functional.linear(x, linear_weight, linear_bias)  # f64[3, 4]
            x = torch.relu(linear)  # f64[3, 4]
            layer_norm = functional.layer_norm(x, (4,), first_weight, first_bias, 1e-05)  # f64[3, 4]
            layer_norm_1 = functional.layer_norm(x, (4,), second_weight, second_bias, 1e-05)  # f64[3, 4]
            mul = layer_norm * layer_norm_1  # f64[3, 4]
            layer_norm_2 = functional.layer_norm(x, (4,), third_weight, third_bias, 1e-05)  # f64[3, 4]
            mul_1 = mul * layer_norm_2  # f64[3, 4]
            return (mul_1,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, first_weight, first_bias, second_weight, second_bias,
            third_weight, third_bias):
            linear = functional.linear(x, linear_weight, linear_bias)  # f64[3, 4]
            x = torch.relu(linear)  # f64[3, 4]
            x_centered_mean = torch.mean(x, [1], True)  # f64[3, 1]
            x_centered_sub = torch.sub(x, x_centered_mean)  # f64[3, 4]
            x_centered_to = x_centered_sub.to(float64)  # f64[3, 4]
            layer_norm = functional.layer_norm(x_centered_to, (4,), first_weight, first_bias, 1e-05)  # f64[3, 4]
            layer_norm_1 = functional.layer_norm(x_centered_to, (4,), second_weight, second_bias, 1e-05)  # f64[3, 4]
            mul = layer_norm * layer_norm_1  # f64[3, 4]
            layer_norm_2 = functional.layer_norm(x_centered_to, (4,), third_weight, third_bias, 1e-05)  # f64[3, 4]
            mul_1 = mul * layer_norm_2  # f64[3, 4]
            return (mul_1,)
        """,
    )


class Scaled(nn.Module):
    """LayerScale: a product whose channels a parameter scales."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.scale = nn.ParameterDict({"gamma": nn.Parameter(torch.ones(D))})

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x) * self.scale["gamma"])


def test_center_with_a_scale() -> None:
    """``C diag(s) W``: the scale composes with the weight, which is then centered and rounded once."""
    before, after = before_and_after("center", ready(Scaled()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, scale_gamma, norm_weight, norm_bias):
            linear = functional.linear(x, linear_weight, linear_bias)  # f64[3, 4]
            mul = linear * scale_gamma  # f64[3, 4]
            layer_norm = functional.layer_norm(mul, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, scale_gamma, norm_weight, norm_bias):
            mul_composed_scale_to = scale_gamma.to(float64)  # f64[4]
            mul_composed_scale_reshape = mul_composed_scale_to.reshape([-1])  # f64[4]
            linear_weight_composed_centered_to = linear_weight.to(float64)  # f64[4, 4]
            linear_weight_composed_centered_to_1 = mul_composed_scale_reshape.to(float64)  # f64[4]
            linear_weight_composed_centered_reshape = linear_weight_composed_centered_to_1.reshape([-1, 1])  # f64[4, 1]
            linear_weight_composed_centered_mul = torch.mul(linear_weight_composed_centered_to, linear_weight_composed_centered_reshape)  # f64[4, 4]
            linear_weight_composed_centered_mean = torch.mean(linear_weight_composed_centered_mul, [0], True)  # f64[1, 4]
            linear_weight_composed_centered_sub = torch.sub(linear_weight_composed_centered_mul, linear_weight_composed_centered_mean)  # f64[4, 4]
            linear_weight_composed_centered_to_2 = linear_weight_composed_centered_sub.to(float64)  # f64[4, 4]
            linear_bias_composed_centered_to = linear_bias.to(float64)  # f64[4]
            linear_bias_composed_centered_mul = torch.mul(linear_bias_composed_centered_to, mul_composed_scale_reshape)  # f64[4]
            linear_bias_composed_centered_mean = torch.mean(linear_bias_composed_centered_mul, [0], True)  # f64[1]
            linear_bias_composed_centered_sub = torch.sub(linear_bias_composed_centered_mul, linear_bias_composed_centered_mean)  # f64[4]
            linear_bias_composed_centered_to_1 = linear_bias_composed_centered_sub.to(float64)  # f64[4]
            linear = functional.linear(x, linear_weight_composed_centered_to_2, linear_bias_composed_centered_to_1)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )


class Convolved(nn.Module):
    """A convolution, batch norm, and a norm over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.batch_norm, self.norm = nn.Conv1d(D, D, 1), nn.BatchNorm1d(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.batch_norm(self.convolution(x)).transpose(1, 2))


def test_center_with_a_batch_norm() -> None:
    """Batch norm in evaluation is a scale and a shift of the channels: both compose, then are centered."""
    before, after = before_and_after("center", ready(Convolved()), rows()[None].transpose(1, 2).contiguous())
    assert_expected(
        before,
        """
            forward(convolution_weight, convolution_bias, x, batch_norm_running_mean, batch_norm_running_var,
            batch_norm_weight, batch_norm_bias, norm_weight, norm_bias):
            conv1d = torch.conv1d(x, convolution_weight, convolution_bias, (1,), (0,), (1,), 1)  # f64[1, 4, 3]
            batch_norm = functional.batch_norm(conv1d, batch_norm_running_mean, batch_norm_running_var, batch_norm_weight, batch_norm_bias, False, 0.1, 1e-05)  # f64[1, 4, 3]
            transpose = batch_norm.transpose(1, 2)  # f64[1, 3, 4]
            layer_norm = functional.layer_norm(transpose, (4,), norm_weight, norm_bias, 1e-05)  # f64[1, 3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(convolution_weight, convolution_bias, x, batch_norm_running_mean, batch_norm_running_var,
            batch_norm_weight, batch_norm_bias, norm_weight, norm_bias):
            batch_norm_composed_scale_to = batch_norm_running_var.to(float64)  # f64[4]
            batch_norm_composed_scale_add = torch.add(batch_norm_composed_scale_to, 1e-05)  # f64[4]
            batch_norm_composed_scale_rsqrt = torch.rsqrt(batch_norm_composed_scale_add)  # f64[4]
            batch_norm_composed_scale_to_1 = batch_norm_weight.to(float64)  # f64[4]
            batch_norm_composed_scale_mul = torch.mul(batch_norm_composed_scale_to_1, batch_norm_composed_scale_rsqrt)  # f64[4]
            batch_norm_composed_shift_to = batch_norm_running_mean.to(float64)  # f64[4]
            batch_norm_composed_shift_mul = torch.mul(batch_norm_composed_scale_mul, batch_norm_composed_shift_to)  # f64[4]
            batch_norm_composed_shift_to_1 = batch_norm_bias.to(float64)  # f64[4]
            batch_norm_composed_shift_sub = torch.sub(batch_norm_composed_shift_to_1, batch_norm_composed_shift_mul)  # f64[4]
            convolution_weight_composed_centered_to = convolution_weight.to(float64)  # f64[4, 4, 1]
            convolution_weight_composed_centered_to_1 = batch_norm_composed_scale_mul.to(float64)  # f64[4]
            convolution_weight_composed_centered_reshape = convolution_weight_composed_centered_to_1.reshape([-1, 1, 1])  # f64[4, 1, 1]
            convolution_weight_composed_centered_mul = torch.mul(convolution_weight_composed_centered_to, convolution_weight_composed_centered_reshape)  # f64[4, 4, 1]
            convolution_weight_composed_centered_mean = torch.mean(convolution_weight_composed_centered_mul, [0], True)  # f64[1, 4, 1]
            convolution_weight_composed_centered_sub = torch.sub(convolution_weight_composed_centered_mul, convolution_weight_composed_centered_mean)  # f64[4, 4, 1]
            convolution_weight_composed_centered_to_2 = convolution_weight_composed_centered_sub.to(float64)  # f64[4, 4, 1]
            convolution_bias_composed_centered_to = convolution_bias.to(float64)  # f64[4]
            convolution_bias_composed_centered_mul = torch.mul(convolution_bias_composed_centered_to, batch_norm_composed_scale_mul)  # f64[4]
            convolution_bias_composed_centered_add = torch.add(convolution_bias_composed_centered_mul, batch_norm_composed_shift_sub)  # f64[4]
            convolution_bias_composed_centered_mean = torch.mean(convolution_bias_composed_centered_add, [0], True)  # f64[1]
            convolution_bias_composed_centered_sub = torch.sub(convolution_bias_composed_centered_add, convolution_bias_composed_centered_mean)  # f64[4]
            convolution_bias_composed_centered_to_1 = convolution_bias_composed_centered_sub.to(float64)  # f64[4]
            conv1d = torch.conv1d(x, convolution_weight_composed_centered_to_2, convolution_bias_composed_centered_to_1, (1,), (0,), (1,), 1)  # f64[1, 4, 3]
            transpose = conv1d.transpose(1, 2)  # f64[1, 3, 4]
            layer_norm = functional.layer_norm(transpose, (4,), norm_weight, norm_bias, 1e-05)  # f64[1, 3, 4]
            return (layer_norm,)
        """,
    )
