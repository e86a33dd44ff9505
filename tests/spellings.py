"""LayerNorms as people write them by hand, and what looks like one and is none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
D = 12

Norm = Callable[[Tensor], Tensor]


def cohere(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS)


def deberta(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).pow(2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def one_difference(x: Tensor) -> Tensor:
    centered = x - torch.mean(x, dim=-1, keepdim=True)
    return centered * (torch.mean(centered * centered, dim=-1, keepdim=True) + EPS).rsqrt()


def powers(x: Tensor) -> Tensor:
    centered = x - x.mean(dim=(-1,), keepdim=True)
    return centered / ((centered**2).mean(-1, keepdim=True) + EPS) ** 0.5


def negative_power(x: Tensor) -> Tensor:
    centered = x.sub(x.mean(dim=-1, keepdim=True))
    return centered * (EPS + torch.square(centered).mean(-1, keepdim=True)).pow(-0.5)


def reciprocal(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, True)
    return centered * (1 / torch.sqrt((centered * centered).mean(-1, True) + EPS))


def torch_reciprocal(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, True)
    return torch.reciprocal(torch.sqrt((centered * centered).mean(-1, True) + EPS)) * centered


def mean_written_twice(x: Tensor) -> Tensor:
    variance = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + EPS)


def two_differences_multiplied(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) * (x - mean)).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def upcast(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    return (centered * torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def variance(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + EPS)


def variance_with_correction(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) * torch.rsqrt(torch.var(x, dim=-1, correction=0, keepdim=True) + EPS)


def variance_by_position(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / (x.var(-1, False, True) + EPS).sqrt()


def variance_and_mean(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + EPS)


def variance_and_mean_unbiased_flag(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(-1,), unbiased=False)
    return (x - mean[..., None]) / torch.sqrt(variance[..., None] + EPS)


def deviation_and_mean(x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (deviation + EPS)


def standard_deviation(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / x.std(-1, keepdim=True, unbiased=False)


def deviation_plus_epsilon(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / (torch.std(x, -1, correction=0, keepdim=True) + EPS)


def deviation_squared(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / torch.sqrt(x.std(-1, unbiased=False, keepdim=True) ** 2 + EPS)


def root_plus_epsilon(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, True)
    return centered / (centered.pow(2).mean(-1, True).sqrt() + EPS)


def no_epsilon(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, True)
    return centered * centered.pow(2).mean(-1, True).rsqrt()


def sums(x: Tensor) -> Tensor:
    centered = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centered / torch.sqrt((centered * centered).sum(-1, keepdim=True) / D + EPS)


def sums_times_a_fraction(x: Tensor) -> Tensor:
    centered = x - x.sum(-1, keepdim=True) * (1 / D)
    return centered / torch.sqrt((centered * centered).sum(-1, keepdim=True) * (1 / D) + EPS)


def mean_of_squares(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = torch.mean(x * x, -1, keepdim=True) - mean**2
    return (x - mean) * torch.rsqrt(variance + EPS)


def mean_of_squares_by_sums(x: Tensor) -> Tensor:
    mean = x.sum(-1) / D
    variance = x.pow(2).sum(-1) / D - mean * mean
    return (x - mean[..., None]) / torch.sqrt(variance + EPS).unsqueeze(-1)


def mean_of_squares_with_two_means(x: Tensor) -> Tensor:
    variance = x.square().mean(-1, True) - x.mean(-1, True).square()
    return (x - x.mean(-1, True)) / torch.sqrt(variance + EPS)


def dimension_put_back(x: Tensor) -> Tensor:
    mean = x.mean(-1).unsqueeze(-1)
    variance = (x - mean).pow(2).mean(-1)[..., None]
    return (x - mean) / torch.sqrt(variance + EPS)


def dimension_put_back_by_a_view(x: Tensor) -> Tensor:
    mean = x.mean(-1).view(-1, 1)
    deviation = (x.var(-1, unbiased=False) + EPS).sqrt().reshape(x.shape[0], 1)
    return (x - mean) / deviation


def several_dimensions(x: Tensor) -> Tensor:
    grid = x.view(-1, 3, 4)
    centered = grid - grid.mean((-2, -1), keepdim=True)
    return (centered / torch.sqrt((centered**2).mean((1, 2), keepdim=True) + EPS)).view(-1, D)


def mean_of_means(x: Tensor) -> Tensor:
    grid = x.view(-1, 3, 4)
    mean = grid.mean([1, 2]).view(-1, 1, 1)
    return ((grid - mean) / torch.sqrt(grid.var([1, 2], unbiased=False)[:, None, None] + EPS)).flatten(1)


def in_place(x: Tensor) -> Tensor:
    x = x * 1.0
    x -= x.mean(-1, keepdim=True)
    x /= torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x


def in_place_after_the_variance(x: Tensor) -> Tensor:
    x = x * 1.0
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    x = x.sub_(mean)
    return x.mul_(torch.rsqrt(variance + EPS))


def quotient_in_place(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + EPS)
    centered *= inverse
    return centered


def weight_before_the_quotient(x: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2, D, dtype=x.dtype)
    return weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True, unbiased=False) + EPS)


SPELLINGS: list[Norm] = [
    cohere, deberta, one_difference, powers, negative_power, reciprocal, torch_reciprocal, mean_written_twice,
    two_differences_multiplied, upcast, variance, variance_with_correction, variance_by_position, variance_and_mean,
    variance_and_mean_unbiased_flag, deviation_and_mean, standard_deviation, deviation_plus_epsilon, deviation_squared,
    root_plus_epsilon, no_epsilon, sums, sums_times_a_fraction, mean_of_squares, mean_of_squares_by_sums,
    mean_of_squares_with_two_means, dimension_put_back, dimension_put_back_by_a_view, several_dimensions, mean_of_means,
    in_place, in_place_after_the_variance, quotient_in_place, weight_before_the_quotient,
]  # fmt: skip


# --- false friends ---


def unbiased(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + EPS)


def unbiased_by_correction(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + EPS)


def unbiased_by_sums(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.sqrt(centered.pow(2).sum(-1, keepdim=True) / (D - 1) + EPS)


def annotated_transformer(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS)


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


def absolute_deviation(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.abs().mean(-1, keepdim=True) + EPS)


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


FALSE_FRIENDS: list[Norm] = [
    unbiased, unbiased_by_correction, unbiased_by_sums, annotated_transformer, l2, normalize, rms, scaler,
    centered_only, centered_only_in_place, absolute_deviation, range_of_values, variance_of_something_else,
    deviation_subtracted, mean_is_scaled, mean_with_alpha, sum_is_not_the_mean, sum_is_read_too,
    squares_without_their_mean, squares_swapped, mean_of_a_square_grid_without_its_dimension, batch_norm, mean_of_all,
    flag_in_place_of_a_dimension, overwritten_between, mean_overwritten, in_place_and_read_by_the_old_name,
]  # fmt: skip
