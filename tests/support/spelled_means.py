"""LayerNorms with the mean written in other ways: products with ones, sums, pools, additions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
D = 12
Norm = Callable[[Tensor], Tensor]


def scaled_by(centered: Tensor) -> Tensor:
    return centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)


def einsum_of_the_last_axis(x: Tensor) -> Tensor:
    return scaled_by(x - torch.einsum("...d->...", x)[..., None] / D)


def einsum_with_named_axes(x: Tensor) -> Tensor:
    return scaled_by(x - (torch.einsum("bd->b", x) / x.shape[-1]).unsqueeze(-1))


def einsum_with_ones(x: Tensor) -> Tensor:
    return scaled_by(x - torch.einsum("bd,de->be", x, torch.ones(D, 1, dtype=x.dtype) / D))


def einsum_with_a_vector_first(x: Tensor) -> Tensor:
    return scaled_by(x - torch.einsum("d,...d", x.new_full((D,), 1 / D), x)[:, None])


def product_with_ones(x: Tensor) -> Tensor:
    return scaled_by(x - x @ torch.full((D, 1), 1 / D, dtype=x.dtype))


def product_with_ones_divided_later(x: Tensor) -> Tensor:
    return scaled_by(x - torch.matmul(x, torch.ones_like(x[0]).unsqueeze(-1)) / D)


def product_with_a_vector(x: Tensor) -> Tensor:
    return scaled_by(x - torch.mv(x, x.new_ones(D) / D).view(-1, 1))


def linear_with_ones(x: Tensor) -> Tensor:
    return scaled_by(x - functional.linear(x, torch.ones(1, D, dtype=x.dtype).div(D)))


def scaled_before_the_sum(x: Tensor) -> Tensor:
    return scaled_by(x - x.mul(1 / D).sum(-1, keepdim=True))


def divided_before_the_sum(x: Tensor) -> Tensor:
    return scaled_by(x - (x / D).sum(-1)[:, None])


def mean_of_twice_the_tensor(x: Tensor) -> Tensor:
    return scaled_by(x - 0.5 * (x * 2).mean(-1, keepdim=True))


def pooled(x: Tensor) -> Tensor:
    return scaled_by(x - functional.adaptive_avg_pool1d(x, 1))


def pooled_in_one_window(x: Tensor) -> Tensor:
    return scaled_by(x - functional.avg_pool1d(x, D))


def mean_expanded(x: Tensor) -> Tensor:
    return scaled_by(x - x.mean(-1, keepdim=True).expand_as(x))


def mean_expanded_to_sizes(x: Tensor) -> Tensor:
    return scaled_by(x - x.mean(-1).unsqueeze(-1).expand(-1, D))


def negative_mean_added(x: Tensor) -> Tensor:
    return scaled_by(x + -x.mean(-1, keepdim=True))


def negative_mean_first(x: Tensor) -> Tensor:
    return scaled_by((-x.mean(-1, keepdim=True)).add(x))


def mean_added_with_alpha(x: Tensor) -> Tensor:
    return scaled_by(torch.add(x, x.mean(-1, keepdim=True), alpha=-1))


def sum_subtracted_with_alpha(x: Tensor) -> Tensor:
    return scaled_by(torch.sub(x, x.sum(-1, keepdim=True), alpha=1 / D))


def subtracted_from_the_mean(x: Tensor) -> Tensor:
    return scaled_by(x.mean(-1, keepdim=True) - x)


def reversed_subtraction(x: Tensor) -> Tensor:
    return scaled_by(torch.rsub(x.mean(-1, keepdim=True), x))


def variance_by_the_reversed_difference(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt((mean - x).pow(2).mean(-1, keepdim=True) + EPS)


def mean_in_a_wider_dtype(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return scaled_by(x - x.mean(-1, keepdim=True, dtype=wide).to(x.dtype))


def in_place_with_an_unbiased_variance(x: Tensor) -> Tensor:
    x = x * 1.0
    deviation = x.std(-1, keepdim=True)
    x -= x.mean(-1, keepdim=True)
    return x.div_(deviation + EPS)


def cast_in_each_line(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    centered = x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    return (centered / (x.to(wide).std(-1, keepdim=True) + EPS)).to(x.dtype)


def mean_of_a_cast(x: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return scaled_by(x - x.to(wide).mean(-1, keepdim=True).to(x.dtype))


def quotient_of_a_view(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    deviation = (centered.pow(2).mean(-1) + EPS).sqrt()
    return (centered.view(-1, 3, 4) / deviation[:, None, None]).flatten(1)


def quotient_added(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return torch.addcdiv(torch.ones_like(x), centered, centered.std(-1, keepdim=True) + EPS)


def product_added(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return torch.addcmul(torch.ones_like(x), torch.rsqrt(variance + EPS), x - mean, value=0.5)


def product_with_a_matrix_of_ones(x: Tensor) -> Tensor:
    return scaled_by(x - x @ torch.full((D, D), 1 / D, dtype=x.dtype))
