"""LayerNorms written out by hand, in the usual spellings; and their false friends, which stay alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from architectures import TEXT, causal, hf, randomise
from false_friends import (
    FALSE_FRIENDS,
    centered_only,
    centered_only_in_place,
    squares_are_read_too,
    variance_of_something_else,
)
from graphs import capture
from spellings import (
    EPS,
    SPELLINGS,
    D,
    Norm,
    annotated_transformer,
    cohere,
    dimension_put_back,
    divided_before_the_sum,
    einsum_with_named_axes,
    in_place,
    linear_with_ones,
    mean_of_squares,
    normalized,
    product_with_ones,
    product_with_ones_divided_later,
    rms_norm,
    scaled_by,
    subtracted_from_the_mean,
    sum_subtracted_with_alpha,
    sums,
    unbiased,
    variance_and_mean,
)
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.options import Options
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.rewrites import center
from lncompile.passes.rewrites.handwritten import variance_of_centered
from lncompile.transform import transform
from lncompile.verification import relative_error


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


def compiled_and_checked(model: nn.Module, value: Tensor, **options: str) -> Callable[..., Tensor]:
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
    assert counts(compiled_and_checked(model, value, assist="off")) == (2, 2, 0)


@named(SPELLINGS)
def test_usual_spellings_fold_behind_a_centering_at_run_time(norm: Norm, without_inductor: None) -> None:
    """The stream starts from a GELU: one centering there pays for both norms, whose inputs are copies of it."""
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    net = nn.Sequential(nn.GELU(), model)
    model.first = nn.Identity()
    assert counts(compiled_and_checked(net, value)) == (2, 2, 1)
    assert counts(compiled_and_checked(net, value, assist="off")) == (2, 0, 0)


@named(SPELLINGS)
def test_what_is_left_subtracts_nothing(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    analysis = capture(model, value).analyse(Options(assist="off"))
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


@named([
    cohere, sums, mean_of_squares, variance_and_mean, dimension_put_back, in_place, annotated_transformer, rms_norm,
    einsum_with_named_axes, product_with_ones_divided_later, divided_before_the_sum, sum_subtracted_with_alpha,
])  # fmt: skip
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


@named([centered_only, centered_only_in_place, variance_of_something_else])
def test_false_friends_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    """Some see no shift all the same: they let a LayerNorm of the same stream fold, or block it; both are exact."""
    sees_a_shift = norm is variance_of_something_else
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    folded = 0 if sees_a_shift else 2
    assert counts(compiled_and_checked(model, value, assist="off")) == (2, folded, 0)


@named(SPELLINGS)
def test_spellings_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist="off")) == (4, 4, 0)


@named(SPELLINGS)
def test_spellings_in_low_precision(norm: Norm, without_inductor: None) -> None:
    """In bfloat16 the error stays that of the author's lines, dtypes included."""
    model, value = randomise(Model(norm).bfloat16()), torch.randn(64, D, dtype=torch.bfloat16)
    reference = randomise(Model(norm).bfloat16()).double()(value.double())
    expected = model(value)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, options={"lnfold.assist": "off"})
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
    compiled_and_checked(model, value, assist="off")
    report = lncompile.explain(torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"}), value)
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


@pytest.mark.parametrize(("size", "correction"), [(1, 1), (2, 2), (3, 5), (5, 1), (5, 2), (5, 0)])
@pytest.mark.parametrize("root", [False, True])
def test_variance_of_centered_with_a_correction(size: int, correction: int, root: bool) -> None:
    """Where torch divides by zero, so does this."""
    value = torch.randn(4, size, dtype=torch.float64)
    value = value - value.mean(-1, keepdim=True)
    expected = torch.var(value, -1, correction=correction, keepdim=True)
    divisor = float(max(0, size - correction))
    actual = variance_of_centered(value, [-1], True, root, torch.float64, torch.float64, divisor)
    torch.testing.assert_close(actual, expected.sqrt() if root else expected, equal_nan=True)


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


# --- more of what may stand in a chain --------------------------------------------------------------------------------


class MeanByABuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, D), nn.Linear(D, 5)
        self.register_buffer("ones", torch.ones(D, 1))

    def forward(self, value: Tensor) -> Tensor:
        stream = self.stem(value)
        return self.head(torch.relu(scaled_by(stream - stream @ self.ones / D)))


def test_a_buffer_of_ones_is_not_known_to_stay_one(without_inductor: None) -> None:
    model, value = randomise(MeanByABuffer().double()), torch.randn(5, 3, dtype=torch.float64)
    model.ones.fill_(1.0)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    assert relative_error(compiled(value), model(value)) <= 1e-12
    model.ones[0] = 3.0
    assert relative_error(compiled(value), model(value)) <= 1e-12
    assert lncompile.explain(model, value).total == 0


def channels_by_a_product(x: Tensor) -> Tensor:
    rows = x.flatten(2)
    mean = torch.full((1, D), 1 / D, dtype=x.dtype) @ rows
    centered = rows - mean
    return (centered / (centered.std(1, keepdim=True) + EPS)).view_as(x)


def channels_by_einsum(x: Tensor) -> Tensor:
    centered = x - torch.einsum("bchw->bhw", x).unsqueeze(1) / D
    return functional.normalize(centered, dim=1)


@named([channels_by_a_product, channels_by_einsum])
def test_channels_of_images(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Image(norm, 1).double()), torch.randn(2, 3, 6, 8, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist="off")) == (1, 1, 0)


@named([annotated_transformer, unbiased, normalized, product_with_ones])
def test_a_single_feature(norm: Norm, without_inductor: None) -> None:
    """The difference is zero, an unbiased variance is not a number, and there is nothing to fold."""
    model = nn.Sequential(nn.Linear(3, 1), Applied(lambda x: norm(x) if norm is not product_with_ones else one(x)))
    model = randomise(model.double())
    value = torch.randn(5, 3, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(value), model(value), equal_nan=True)
    assert lncompile.explain(model, value).total == 0


def one(x: Tensor) -> Tensor:
    return functional.normalize(x - x @ torch.ones(1, 1, dtype=x.dtype), dim=-1)


class Applied(nn.Module):
    def __init__(self, function: Norm) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(value)


@pytest.mark.parametrize("option", [("absorb_affine", "on"), ("matrix_vector", "on"), ("defer", "on")], ids=str)
@named([product_with_ones, linear_with_ones, annotated_transformer])
def test_chains_behind_a_layer_norm_whose_affine_is_absorbed(
    norm: Norm, option: tuple[str, object], without_inductor: None
) -> None:
    """A product with ones is no layer that could take γ, a scale, or the norm in: it may be gone."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)

        def forward(self, value: Tensor) -> Tensor:
            normed = self.norm(self.stem(value))
            return self.head(norm(normed)) + self.head(normed)

    model, value = randomise(Two().double()), torch.randn(1, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, options={f"lnfold.{option[0]}": option[1]})
    assert relative_error(compiled(value), model(value)) <= 1e-12
    total, folded, _ = counts(compiled)
    assert (total, folded) == (2, 1)


@named([annotated_transformer, normalized, rms_norm, product_with_ones, subtracted_from_the_mean])
def test_gradients(norm: Norm, without_inductor: None) -> None:
    folded, gradients = gradients_of(norm)
    assert folded == 2
    for gradient, reference in gradients:
        assert relative_error(gradient, reference) <= 1e-10


def gradients_of(norm: Norm) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """How many norms fold in a training, and the gradients of the compiled model beside those of eager."""
    model = randomise(Model(norm).double())
    value = torch.randn(64, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.training": "on"})
    with torch.enable_grad():
        for parameter in model.parameters():
            parameter.requires_grad_()
        expected = torch.autograd.grad(model(value).square().sum(), list(model.parameters()))
        actual = torch.autograd.grad(compiled(value).square().sum(), list(model.parameters()))
        folded = lncompile.explain(compiled, value).folded
    return folded, list(zip(actual, expected, strict=True))


def mean_detached(x: Tensor) -> Tensor:
    return scaled_by(x - x.mean(-1, keepdim=True).detach())


def mean_of_a_detached_tensor(x: Tensor) -> Tensor:
    return scaled_by(x - x.detach().mean(-1, keepdim=True))


def mean_without_gradients(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean = x.mean(-1, keepdim=True)
    return scaled_by(x - mean)


def mean_of_squares_with_a_detached_mean(x: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean.detach() ** 2 + EPS).sqrt()


def detached_mean_beside_a_norm(x: Tensor) -> Tensor:
    return torch.relu(x - x.mean(-1, keepdim=True).detach()) + functional.layer_norm(x, (D,))


def deviation_detached(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.detach().std(-1, keepdim=True) + EPS)


def deviation_of_the_difference_detached(x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    return centered / (centered.std(-1, keepdim=True).detach() + EPS)


# To the gradient a mean that is detached is a constant, and the difference from it is not centered.
DETACHED: dict[Norm, int] = {
    mean_detached: 0, mean_of_a_detached_tensor: 0, mean_without_gradients: 0, mean_of_squares_with_a_detached_mean: 0,
    detached_mean_beside_a_norm: 0, deviation_detached: 2, deviation_of_the_difference_detached: 2,
}  # fmt: skip


@named(list(DETACHED))
def test_gradients_of_what_is_detached(norm: Norm, without_inductor: None) -> None:
    folded, gradients = gradients_of(norm)
    assert folded == DETACHED[norm]
    for gradient, reference in gradients:
        assert relative_error(gradient, reference) <= 1e-10


@named([annotated_transformer, normalized, rms_norm, product_with_ones])
def test_errors_are_those_of_the_authors_lines_or_less(norm: Norm, without_inductor: None) -> None:
    """In float32 against float64, where means are a hundred times the spread: centering loses no digits."""
    model = randomise(Model(norm))
    model.first.bias.add_(100 * model.first.weight.std())
    value = torch.randn(256, D)
    wide = copy.deepcopy(model).double()(value.double())
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    actual = relative_error(compiled(value), wide)
    assert counts(compiled)[:2] == (2, 2)
    assert actual <= 1.25 * relative_error(model(value), wide)


def test_a_fold_without_a_centered_input_is_seen(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    """A negative control: with weights that are not centered the comparisons above fail."""
    monkeypatch.setattr(center, "center_weight", lambda value, axes, dtype, *rest: value.to(dtype))
    for norm in (annotated_transformer, normalized, rms_norm, product_with_ones):
        model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
        compiled = torch.compile(model, backend="lnfold", fullgraph=True)
        assert relative_error(compiled(value), model(value)) > 1e-3
        assert counts(compiled) == (2, 2, 0)
