"""What becomes of folded norms and of others, as text: the docstring's before and after, with every name in it.

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


class ByHand(nn.Module):
    """A norm as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        difference = x - x.mean(-1, keepdim=True)
        return difference * torch.rsqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-5)


class ByVariance(ByHand):
    """The same with a variance that torch computes: of a tensor without a mean that is a mean of squares."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, correction=0, keepdim=True) + 1e-5)


def test_handwritten() -> None:
    """``m = x.mean(); d = x - m`` is ``x``."""
    before, after = before_and_after("handwritten", ready(ByHand()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            x = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            mean = x.mean(-1, keepdim=True)  # f64[3, 1]
            difference = x - mean  # f64[3, 4]
            pow_1 = difference.pow(2)  # f64[3, 4]
            mean_1 = pow_1.mean(-1, keepdim=True)  # f64[3, 1]
            add = mean_1 + 1e-05  # f64[3, 1]
            rsqrt = torch.rsqrt(add)  # f64[3, 1]
            mul = difference * rsqrt  # f64[3, 4]
            return (mul,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            x = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            difference_copy = torch.clone(x)  # f64[3, 4]
            pow_1 = difference_copy.pow(2)  # f64[3, 4]
            mean_1 = pow_1.mean(-1, keepdim=True)  # f64[3, 1]
            add = mean_1 + 1e-05  # f64[3, 1]
            rsqrt = torch.rsqrt(add)  # f64[3, 1]
            mul = difference_copy * rsqrt  # f64[3, 4]
            return (mul,)
        """,
    )


def test_handwritten_with_a_variance() -> None:
    _, after = before_and_after("handwritten", ready(ByVariance()), rows())
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x):
            linear_bias_centered_to = linear_bias.to(float64)
            linear_bias_centered_mean = torch.mean(linear_bias_centered_to, [0], True)
            linear_bias_centered_sub = torch.sub(linear_bias_centered_to, linear_bias_centered_mean)
            linear_bias_centered_to_1 = linear_bias_centered_sub.to(float64)  # f64[4]
            linear_weight_centered_to = linear_weight.to(float64)
            linear_weight_centered_mean = torch.mean(linear_weight_centered_to, [0], True)
            linear_weight_centered_sub = torch.sub(linear_weight_centered_to, linear_weight_centered_mean)
            linear_weight_centered_to_1 = linear_weight_centered_sub.to(float64)  # f64[4, 4]
            x = functional.linear(x, linear_weight_centered_to_1, linear_bias_centered_to_1)  # f64[3, 4]
            sub_copy = torch.clone(x)  # f64[3, 4]
            var_to = x.to(float64)  # f64[3, 4]
            var_mul = torch.mul(var_to, var_to)  # f64[3, 4]
            var_mean = torch.mean(var_mul, [1], True)  # f64[3, 1]
            var_to_1 = var_mean.to(float64)  # f64[3, 1]
            add = var_to_1 + 1e-05  # f64[3, 1]
            sqrt = torch.sqrt(add)  # f64[3, 1]
            truediv = sub_copy / sqrt  # f64[3, 4]
            return (truediv,)
        """,
    )


def test_lower() -> None:
    """RMSNorm in the place of LayerNorm, in operations that Inductor fuses."""
    before, after = before_and_after("lower", ready(Plain()), rows())
    assert_expected(
        before,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias,
            linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized):
            linear = functional.linear(x, linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized)  # f64[3, 4]
            layer_norm = functional.layer_norm(linear, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias,
            linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized):
            linear = functional.linear(x, linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized)  # f64[3, 4]
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


class InGroups(nn.Module):
    """A group norm of single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.GroupNorm(2, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def test_lower_in_groups() -> None:
    """Each group of channels has a mean of its own, and a root mean square."""
    _, after = before_and_after("lower", ready(InGroups()), rows())
    assert_expected(
        after,
        """
            forward(linear_weight, linear_bias, x, norm_weight, norm_bias,
            linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized):
            linear = functional.linear(x, linear_weight_centered_to_1_materialized, linear_bias_centered_to_1_materialized)  # f64[3, 4]
            group_norm_flatten = torch.flatten(linear, 1)  # f64[3, 4]
            group_norm_unflatten = torch.unflatten(group_norm_flatten, 1, (2, -1))  # f64[3, 2, 2]
            group_norm_mul = torch.mul(group_norm_unflatten, group_norm_unflatten)  # f64[3, 2, 2]
            group_norm_mean = torch.mean(group_norm_mul, [-1], True)  # f64[3, 2, 1]
            group_norm_add = torch.add(group_norm_mean, 1e-05)  # f64[3, 2, 1]
            group_norm_rsqrt = torch.rsqrt(group_norm_add)  # f64[3, 2, 1]
            group_norm_mul_1 = torch.mul(group_norm_unflatten, group_norm_rsqrt)  # f64[3, 2, 2]
            group_norm_unflatten_1 = torch.unflatten(norm_weight, 0, (2, -1))  # f64[2, 2]
            group_norm_mul_2 = torch.mul(group_norm_mul_1, group_norm_unflatten_1)  # f64[3, 2, 2]
            group_norm_unflatten_2 = torch.unflatten(norm_bias, 0, (2, -1))  # f64[2, 2]
            group_norm_add_1 = torch.add(group_norm_mul_2, group_norm_unflatten_2)  # f64[3, 2, 2]
            group_norm_reshape_as = group_norm_add_1.reshape_as(linear)  # f64[3, 4]
            group_norm_to = group_norm_reshape_as.to(float64)  # f64[3, 4]
            group_norm_contiguous = group_norm_to.contiguous()  # f64[3, 4]
            return (group_norm_contiguous,)
        """,
    )


class Stays(nn.Module):
    """A norm of an activation, which does not fold."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.relu(x))


def test_eager() -> None:
    """A norm that stays runs ATen's own kernel where that is asked for."""
    before, after = before_and_after("eager", ready(Stays()), rows(), nonfoldable="eager")
    assert_expected(
        before,
        """
            forward(x, norm_weight, norm_bias):
            relu = torch.relu(x)  # f64[3, 4]
            layer_norm = functional.layer_norm(relu, (4,), norm_weight, norm_bias, 1e-05)  # f64[3, 4]
            return (layer_norm,)
        """,
    )
    assert_expected(
        after,
        """
            forward(x, norm_weight, norm_bias):
            relu = torch.relu(x)  # f64[3, 4]
            layer_norm_aten = torch.ops.lncompile.layer_norm.default(relu, [4], norm_weight, norm_bias, 1e-05)
            return (layer_norm_aten,)
        """,
    )
