"""What looks like a LayerNorm written by hand and is none."""

from __future__ import annotations

import torch
from spelled_means import EPS, D, Norm, scaled_by
from torch import Tensor
from torch.nn import functional


def l2(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def normalize(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def scaler(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    centered = x - mean
    return centered / torch.sqrt((centered**2).mean(-1, keepdim=True) + EPS) + mean


def centered_only(x: Tensor) -> Tensor:
    return torch.relu(x - x.mean(-1, keepdim=True))


def centered_only_in_place(x: Tensor) -> Tensor:
    x = x * 1.0
    x -= x.mean(-1, keepdim=True)
    return torch.relu(x)


def range_of_values(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True) + EPS)


def variance_of_something_else(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(torch.relu(x).var(-1, unbiased=False, keepdim=True) + EPS)


def deviation_subtracted(x: Tensor) -> Tensor:
    return x.var(-1, unbiased=False, keepdim=True) / (x - x.mean(-1, keepdim=True)).abs().add(1)


def mean_is_scaled(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - 0.9 * mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def mean_with_alpha(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return torch.sub(x, mean, alpha=2) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def sum_is_not_the_mean(x: Tensor) -> Tensor:
    return (x - x.sum(-1, keepdim=True) / (D + 1)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def sum_is_read_too(x: Tensor) -> Tensor:
    total = x.sum(-1, keepdim=True)
    return (x - total / D) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS) + total


def squares_without_their_mean(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / torch.sqrt((x * x).mean(-1, True) + EPS)


def squares_are_read_too(x: Tensor) -> Tensor:
    mean, square = x.mean(-1, True), x * x
    return (x - mean) * torch.rsqrt(square.mean(-1, True) - mean**2 + EPS) + square


def squares_swapped(x: Tensor) -> Tensor:
    mean = x.mean(-1, True)
    return (x - mean) * torch.rsqrt((mean**2 - (x * x).mean(-1, True)).abs() + EPS)


def mean_of_a_square_grid_without_its_dimension(x: Tensor) -> Tensor:
    square = x[:, :5]  # [5, 5]: the mean broadcasts along the wrong dimension and nobody complains
    centered = square - square.mean(-1)
    normed = centered / torch.sqrt(square.var(-1, unbiased=False) + EPS)
    return functional.pad(normed, (0, D - 5))


def batch_norm(x: Tensor) -> Tensor:
    return (x - x.mean(0, keepdim=True)) / torch.sqrt(x.var(0, keepdim=True, unbiased=False) + EPS)


def mean_of_all(x: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(x.var(unbiased=False) + EPS)


def flag_in_place_of_a_dimension(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / torch.sqrt(x.var(False) + EPS)


def overwritten_between(x: Tensor) -> Tensor:
    x = x * 1.0
    mean = x.mean(-1, keepdim=True)
    x[:, 0] = 3.0
    return (x - mean) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def mean_overwritten(x: Tensor) -> Tensor:
    mean = x.mean(-1)
    kept = mean[:, None]
    mean[0] = 3.0
    return (x - kept) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + EPS)


def in_place_and_read_by_the_old_name(x: Tensor) -> Tensor:
    x = x * 1.0
    view = x.view(-1, 3, 4)
    x -= x.mean(-1, keepdim=True)
    x /= torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x + view.flatten(1)


def scaled_by_the_norm_of_the_tensor(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.norm(dim=-1, keepdim=True) + EPS)


def clamped_by_the_tensor(x: Tensor) -> Tensor:
    variance = torch.maximum(x.var(-1, keepdim=True), x.abs().mean(-1, keepdim=True))
    return (x - x.mean(-1, keepdim=True)) / variance.sqrt()


def normalized_along_the_batch(x: Tensor) -> Tensor:
    return functional.normalize(x - x.mean(-1, keepdim=True), dim=0)


def product_with_too_much(x: Tensor) -> Tensor:
    return scaled_by(x - x @ torch.full((D, 1), 1.01 / D, dtype=x.dtype))


def product_with_ones_overwritten(x: Tensor) -> Tensor:
    ones = torch.ones(D, 1, dtype=x.dtype)
    ones[0] = 3.0
    return scaled_by(x - x @ ones / D)


def product_with_different_weights(x: Tensor) -> Tensor:
    return scaled_by(x - x @ (torch.arange(D, dtype=x.dtype)[:, None] / 66))


def linear_with_a_bias(x: Tensor) -> Tensor:
    return scaled_by(x - functional.linear(x, torch.ones(1, D, dtype=x.dtype) / D, x.new_full((1,), 0.5)))


def einsum_over_the_batch(x: Tensor) -> Tensor:
    return scaled_by(x - torch.einsum("bd->d", x) / D)


def einsum_of_squares(x: Tensor) -> Tensor:
    return scaled_by(x - torch.einsum("bd,bd->b", x, x)[:, None] / D)


def mean_of_half_the_tensor(x: Tensor) -> Tensor:
    return scaled_by(x - (x * 0.5).mean(-1, keepdim=True))


def mean_added(x: Tensor) -> Tensor:
    return scaled_by(x + x.mean(-1, keepdim=True))


def pooled_in_two_windows(x: Tensor) -> Tensor:
    return scaled_by((x.view(-1, 2, D // 2) - functional.avg_pool1d(x, D // 2).unsqueeze(-1)).flatten(1)) + x


def unbiased_and_put_back(x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, -1, keepdim=True)
    return (x - mean) / (deviation + EPS) * 1.1 + mean


def mean_rounded(x: Tensor) -> Tensor:
    narrow = {torch.float64: torch.float32, torch.float32: torch.bfloat16}.get(x.dtype, torch.float8_e5m2)
    return scaled_by(x - x.mean(-1, keepdim=True).to(narrow).to(x.dtype))


def view_across_the_rows(x: Tensor) -> Tensor:
    rows = x[:4]
    centered = rows - rows.mean(-1, keepdim=True)
    root = (centered.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return functional.pad((centered.view(D, 4) / root.view(1, 4)).view(4, D), (0, 0, 0, 1))


FALSE_FRIENDS: list[Norm] = [
    l2, normalize, rms, scaler, centered_only, centered_only_in_place, range_of_values, variance_of_something_else,
    deviation_subtracted, mean_is_scaled, mean_with_alpha, sum_is_not_the_mean, sum_is_read_too,
    squares_without_their_mean, squares_swapped, mean_of_a_square_grid_without_its_dimension, batch_norm,
    mean_of_all, flag_in_place_of_a_dimension, overwritten_between, mean_overwritten,
    in_place_and_read_by_the_old_name, scaled_by_the_norm_of_the_tensor, clamped_by_the_tensor,
    normalized_along_the_batch, product_with_too_much, product_with_ones_overwritten,
    product_with_different_weights, linear_with_a_bias, einsum_over_the_batch, einsum_of_squares,
    mean_of_half_the_tensor, mean_added, pooled_in_two_windows, unbiased_and_put_back, mean_rounded,
    view_across_the_rows,
]  # fmt: skip
