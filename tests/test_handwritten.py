"""LayerNorms written out by hand, in the usual spellings; and their false friends, which stay alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import TEXT, causal, hf, randomise
from graphs import capture
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.options import Options
from lncompile.passes.canonical import canonicalise
from lncompile.passes.handwritten import variance_of_centered
from lncompile.transform import transform
from lncompile.verify import relative_error

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


class Model(nn.Module):
    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.weight, self.bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        stream = self.first(value)
        stream = stream + self.second(torch.relu(self.norm(stream) * self.weight + self.bias))
        return self.head(self.norm(stream) * self.weight)


def named(norms: list[Norm]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("norm", norms, ids=lambda norm: norm.__name__)


def compiled_and_checked(model: nn.Module, value: Tensor, **options: bool) -> Callable[..., Tensor]:
    """Compile a randomised model with ``lnfold``, and call it before and after an update of its parameters."""
    settings = {f"lnfold.{name}": choice for name, choice in options.items()}
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, options=settings)
    assert relative_error(compiled(value), model(value)) <= 1e-12
    for parameter in model.parameters():
        parameter.mul_(0.9).add_(0.05)
    assert relative_error(compiled(value), model(value)) <= 1e-12
    return compiled


def counts(compiled: Callable[..., Tensor]) -> tuple[int, int, int]:
    (report,) = lncompile.reports(compiled)
    return report.total, report.folded, len(report.centerings)


@named(SPELLINGS)
def test_usual_spellings_fold(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist=False)) == (2, 2, 0)


@named(SPELLINGS)
def test_usual_spellings_fold_behind_a_centering_at_run_time(norm: Norm, without_inductor: None) -> None:
    """The stream starts from a GELU: one centering there pays for both norms, whose inputs are copies of it."""
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    net = nn.Sequential(nn.GELU(), model)
    model.first = nn.Identity()
    assert counts(compiled_and_checked(net, value)) == (2, 2, 1)
    assert counts(compiled_and_checked(net, value, assist=False)) == (2, 0, 0)


@named(SPELLINGS)
def test_what_is_left_subtracts_nothing(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    analysis = capture(model, value).analyse(Options(assist=False))
    graph = transform(analysis, Options()).graph_module.graph
    graph.lint()
    operations = [canonicalise(node) for node in graph.nodes]
    left = {operation.name for operation in operations if operation is not None}
    assert not left & {"sub", "var", "std", "var_mean", "std_mean"}


# LayerNorms that something is in the way of.
BLOCKED: list[Norm] = [squares_are_read_too]


@named(BLOCKED)
def test_sites_that_stay(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    compiled = compiled_and_checked(model, value)
    assert counts(compiled) == (2, 0, 0)
    assert all(site.detail for site in lncompile.reports(compiled)[0].sites)


@named(FALSE_FRIENDS)
def test_false_friends_are_not_changed(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    compiled_and_checked(model, value)
    assert lncompile.explain(model, value).folded == 0


@named([cohere, sums, mean_of_squares, variance_and_mean, dimension_put_back, in_place])
def test_usual_spellings_fold_with_dynamic_shapes(norm: Norm, without_inductor: None) -> None:
    model = randomise(Model(norm).double())
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, dynamic=True)
    for rows in (5, 3):
        value = torch.randn(rows, D, dtype=torch.float64)
        assert relative_error(compiled(value), model(value)) <= 1e-12
    assert counts(compiled) == (2, 2, 0)


@named(FALSE_FRIENDS)
def test_false_friends_are_no_sites(norm: Norm) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    assert lncompile.explain(model, value).total == 0


@named([unbiased, annotated_transformer, centered_only, centered_only_in_place, variance_of_something_else])
def test_false_friends_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    """Some see no shift all the same: they let a LayerNorm of the same stream fold, or block it; both are exact."""
    sees_a_shift = norm is variance_of_something_else
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    folded = 0 if sees_a_shift else 2
    assert counts(compiled_and_checked(model, value, assist=False)) == (2, folded, 0)


@named(SPELLINGS)
def test_spellings_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist=False)) == (4, 4, 0)


@named(SPELLINGS)
def test_spellings_in_low_precision(norm: Norm, without_inductor: None) -> None:
    """In bfloat16 the error stays that of the author's lines, dtypes included."""
    model, value = randomise(Model(norm).bfloat16()), torch.randn(64, D, dtype=torch.bfloat16)
    reference = randomise(Model(norm).bfloat16()).double()(value.double())
    expected = model(value)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, options={"lnfold.assist": False})
    actual = compiled(value)
    assert actual.dtype == expected.dtype
    assert relative_error(actual, reference) <= 1.5 * relative_error(expected, reference) + 2 * 2**-8


# --- other axes -------------------------------------------------------------------------------------------------------


class Image(nn.Module):
    """A stem of convolutions, a norm over some axes of ``[2, 12, 3, 4]`` with γ and β, and a second convolution."""

    def __init__(self, norm: Norm, axis: int | None) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, D, 2, stride=2), nn.Conv2d(D, 5, 1)
        sizes = {None: (1,), 1: (D, 1, 1), 2: (3, 1), 3: (4,)}[axis]
        self.weight, self.bias = (nn.Parameter(torch.zeros(sizes[0])) for _ in range(2))
        self.trailing = len(sizes) - 1
        self.axis = axis
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        normed = self.norm(self.stem(value))
        if self.axis is None:
            return self.head(torch.relu(normed))
        if self.trailing == 2:
            return self.head(self.weight[:, None, None] * normed + self.bias[:, None, None])
        return self.head(normed * self.weight + self.bias)


def over(*dimensions: int) -> Norm:
    def norm(x: Tensor) -> Tensor:
        mean = x.mean(dimensions, keepdim=True)
        return (x - mean) / torch.sqrt((x - mean).pow(2).mean(dimensions, keepdim=True) + EPS)

    return norm


def convnext(x: Tensor) -> Tensor:
    u = x.mean(1, keepdim=True)
    s = (x - u).pow(2).mean(1, keepdim=True)
    return (x - u) / torch.sqrt(s + 1e-6)


def convnext_squeezed(x: Tensor) -> Tensor:
    u = x.mean(1)
    s = x.var(1, unbiased=False)
    return (x - u.unsqueeze(1)) / torch.sqrt(s + 1e-6)[:, None]


def channels_last(norm: Norm) -> Norm:
    return lambda x: norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def grouped(x: Tensor) -> Tensor:
    return over(2)(x.unflatten(1, (3, 4))).flatten(1, 2)


IMAGES: dict[str, tuple[Norm, int | None, int, int]] = {
    "convnext": (convnext, 1, 1, 1),
    "convnext_squeezed": (convnext_squeezed, 1, 1, 1),
    "convnext_without_affine": (convnext, None, 1, 1),
    "channels_last": (channels_last(cohere), 1, 1, 1),
    "groups_of_channels": (grouped, 1, 1, 1),
    # A LayerNorm over channels and pixels is one, but no convolution can make its mean zero.
    "channels_and_pixels": (over(1, 2, 3), 1, 1, 0),
    "instance_norm": (over(2, 3), 1, 0, 0),
    "instance_norm_without_affine": (over(2, 3), None, 0, 0),
    "instance_norm_by_variance": (
        lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), unbiased=False, keepdim=True) + EPS).sqrt(), 1, 0, 0),
    "batch_norm": (over(0, 2, 3), 1, 0, 0),
    "batch_norm_without_affine": (over(0, 2, 3), None, 0, 0),
    "batch_and_channels": (over(0, 1), None, 0, 0),
    "rows_of_pixels_with_an_affine_of_channels": (over(3), 1, 0, 0),
    "width_with_its_affine": (over(3), 3, 1, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_axes_of_images(name: str, without_inductor: None) -> None:
    norm, axis, sites, folded = IMAGES[name]
    model = randomise(Image(norm, axis).double())
    value = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    compiled_and_checked(model, value, assist=False)
    report = lncompile.explain(torch.compile(model, backend="lnfold", options={"lnfold.assist": False}), value)
    assert (report.total, report.folded) == (sites, folded), str(report)


class Sequence(nn.Module):
    """``[2, 5, 12]``: features last, and a norm over the features or over the positions."""

    def __init__(self, norm: Norm, along: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, D), nn.Linear(D, 5)
        self.weight = nn.Parameter(torch.zeros((1, 5, 1) if along == 1 else (D,)))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(value)) * self.weight)


@pytest.mark.parametrize(
    ("dimension", "along", "sites"), [(-1, 2, 1), (1, 1, 1), (1, 2, 0), (-1, 1, 0)],
    ids=["features", "positions", "instance_norm_of_features_last", "instance_norm_of_positions_first"],
)  # fmt: skip
def test_axes_of_sequences(dimension: int, along: int, sites: int, without_inductor: None) -> None:
    """In three dimensions the axes alone do not tell a LayerNorm from an instance norm; γ does."""
    model, value = randomise(Sequence(over(dimension), along).double()), torch.randn(2, 5, 3, dtype=torch.float64)
    compiled_and_checked(model, value)
    assert lncompile.explain(model, value).total == sites


def test_shared_variance_and_two_norms() -> None:
    def both(x: Tensor) -> Tensor:
        spread = torch.rsqrt(x.pow(2).mean(-1, True) - x.mean(-1, True) ** 2 + EPS)
        return (x - x.mean(-1, True)) * spread + (x - x.mean(dim=-1, keepdim=True)) / (1 / spread)

    model, value = randomise(Model(both).double()), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    assert relative_error(compiled(value), model(value)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("root", [False, True])
def test_variance_of_centered(dtype: torch.dtype, root: bool) -> None:
    value = torch.randn(5, D, dtype=torch.float64)
    value = value - value.mean(-1, keepdim=True)
    expected = value.std(-1, unbiased=False) if root else value.var(-1, unbiased=False)
    actual = variance_of_centered(value.to(dtype), [-1], False, root, dtype, dtype)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) <= 8 * torch.finfo(dtype).eps
    assert variance_of_centered(value, [-1], True, root, torch.float64, torch.float32).shape == (5, 1)


def test_cohere(without_inductor: None) -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = hf("CohereForCausalLM", "CohereConfig", intermediate_size=48, **config, **TEXT)()
    model = randomise(model.eval().double())
    inputs = causal(torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded) == (3, 3)
