"""LayerNorms as people write them by hand: a difference from the mean, scaled by a function of the difference."""

from __future__ import annotations

import torch
from spelled_means import (
    EPS,
    D,
    Norm,
    cast_in_each_line,
    divided_before_the_sum,
    einsum_of_the_last_axis,
    einsum_with_a_vector_first,
    einsum_with_named_axes,
    einsum_with_ones,
    in_place_with_an_unbiased_variance,
    linear_with_ones,
    mean_added_with_alpha,
    mean_expanded,
    mean_expanded_to_sizes,
    mean_in_a_wider_dtype,
    mean_of_a_cast,
    mean_of_twice_the_tensor,
    negative_mean_added,
    negative_mean_first,
    pooled,
    pooled_in_one_window,
    product_added,
    product_with_a_matrix_of_ones,
    product_with_a_vector,
    product_with_ones,
    product_with_ones_divided_later,
    quotient_added,
    quotient_of_a_view,
    reversed_subtraction,
    scaled_before_the_sum,
    subtracted_from_the_mean,
    sum_subtracted_with_alpha,
    variance_by_the_reversed_difference,
)
from torch import Tensor
from torch.nn import functional


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


def absolute_deviation(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.abs().mean(-1, keepdim=True) + EPS)


def correction_of_two(x: Tensor) -> Tensor:
    return (x - x.mean(-1, True)) / (torch.var(x, -1, correction=2, keepdim=True) + EPS).sqrt()


def deviation_and_mean_unbiased(x: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, dim=-1)
    return (x - mean.unsqueeze(-1)) / (deviation.unsqueeze(-1) + EPS)


def deviation_of_the_difference(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.std(-1, keepdim=True) + EPS)


def variance_of_the_difference(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.rsqrt(centered.var(-1, unbiased=False, keepdim=True) + EPS)


def variance_clamped(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.var(-1, unbiased=False, keepdim=True).clamp(min=EPS).sqrt()


def variance_at_least_epsilon(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = torch.maximum(centered.square().mean(-1, keepdim=True), torch.full((), EPS, dtype=x.dtype))
    return centered * variance.rsqrt()


def deviation_clamped(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.clamp_min(x.std(-1, keepdim=True), EPS)


def weight_normalised_and_cast(x: Tensor) -> Tensor:
    centered = -(x - x.mean(-1, keepdim=True)).to(torch.promote_types(x.dtype, torch.float32))
    return (centered / centered.pow(2).sum(-1, keepdim=True).sqrt().expand_as(x)).to(x.dtype)


def normalized(x: Tensor) -> Tensor:
    return functional.normalize(x - x.mean(-1, keepdim=True), dim=-1)


def normalized_in_another_norm(x: Tensor) -> Tensor:
    return functional.normalize(x - x.mean(-1, keepdim=True), p=1.0, dim=1, eps=EPS) * D


def norm_of_the_difference(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / ((x - x.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True) + EPS)


def vector_norm(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / torch.linalg.vector_norm(centered, dim=-1, keepdim=True).clamp_min(EPS) * D**0.5


def norm_function(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered * torch.norm(centered, p=2, dim=-1, keepdim=True).add(EPS).reciprocal()


def largest_difference(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.abs().amax(-1, keepdim=True) + EPS)


def rms_norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x - x.mean(-1, keepdim=True), (D,), eps=EPS)


def rms_norm_of_torch(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return torch.rms_norm(centered, (D,), torch.full((D,), 0.7, dtype=x.dtype), EPS)


SPELLINGS: list[Norm] = [
    cohere, deberta, one_difference, powers, negative_power, reciprocal, torch_reciprocal, mean_written_twice,
    two_differences_multiplied, upcast, variance, variance_with_correction, variance_by_position, variance_and_mean,
    variance_and_mean_unbiased_flag, deviation_and_mean, standard_deviation, deviation_plus_epsilon,
    deviation_squared, root_plus_epsilon, no_epsilon, sums, sums_times_a_fraction, mean_of_squares,
    mean_of_squares_by_sums, mean_of_squares_with_two_means, dimension_put_back, dimension_put_back_by_a_view,
    several_dimensions, mean_of_means, in_place, in_place_after_the_variance, quotient_in_place,
    weight_before_the_quotient, unbiased, unbiased_by_correction, unbiased_by_sums, annotated_transformer,
    absolute_deviation, correction_of_two, deviation_and_mean_unbiased, deviation_of_the_difference,
    variance_of_the_difference, variance_clamped, variance_at_least_epsilon, deviation_clamped,
    weight_normalised_and_cast, normalized, normalized_in_another_norm, norm_of_the_difference, vector_norm,
    norm_function, largest_difference, rms_norm, rms_norm_of_torch, einsum_of_the_last_axis, einsum_with_named_axes,
    einsum_with_ones, einsum_with_a_vector_first, product_with_ones, product_with_ones_divided_later,
    product_with_a_vector, linear_with_ones, scaled_before_the_sum, divided_before_the_sum,
    mean_of_twice_the_tensor, pooled, pooled_in_one_window, mean_expanded, mean_expanded_to_sizes,
    negative_mean_added, negative_mean_first, mean_added_with_alpha, sum_subtracted_with_alpha,
    subtracted_from_the_mean, reversed_subtraction, variance_by_the_reversed_difference, mean_in_a_wider_dtype,
    in_place_with_an_unbiased_variance, cast_in_each_line, mean_of_a_cast, quotient_of_a_view,
    quotient_added, product_added, product_with_a_matrix_of_ones,
]  # fmt: skip
