"""LayerNorms written out by hand, in the usual spellings; and their false friends, which stay alone."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures import randomise
from false_friends import (
    FALSE_FRIENDS,
    centered_only,
    centered_only_in_place,
    squares_are_read_too,
    variance_of_something_else,
)
from handwritten import Model, compiled_and_checked, counts, named
from spelled_means import (
    D,
    Norm,
    divided_before_the_sum,
    einsum_with_named_axes,
    linear_with_ones,
    product_with_ones,
    product_with_ones_divided_later,
    sum_subtracted_with_alpha,
)
from spellings import (
    SPELLINGS,
    annotated_transformer,
    cohere,
    dimension_put_back,
    in_place,
    mean_of_squares,
    normalized,
    rms_norm,
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


@named(SPELLINGS)
def test_usual_spellings_fold(norm: Norm, without_inductor: None) -> None:
    """And nothing that is left subtracts a mean."""
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    call = compiled_and_checked(model, value, assist="off")
    assert counts(call.compiled) == (2, 2, 0)
    graph = transform(call.graphs[0].analyse(Options(assist="off")), Options()).graph_module.graph
    graph.lint()
    operations = [canonicalise(node) for node in graph.nodes]
    left = {operation.name for operation in operations if operation is not None}
    assert not left & {"sub", "var", "std", "var_mean", "std_mean"}


@named(SPELLINGS)
def test_usual_spellings_fold_behind_a_centering_at_run_time(norm: Norm, without_inductor: None) -> None:
    """The stream starts from a GELU: one centering there pays for both norms, whose inputs are copies of it."""
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    net = nn.Sequential(nn.GELU(), model)
    model.first = nn.Identity()
    call = compiled_and_checked(net, value)
    assert counts(call.compiled) == (2, 2, 1)
    unassisted = call.graphs[0].analyse(Options(assist="off"))
    assert [verdict.folded for verdict in unassisted.verdicts] == [False, False]


# LayerNorms that something is in the way of.
BLOCKED: list[Norm] = [squares_are_read_too]


@named(BLOCKED)
def test_sites_that_stay(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    compiled = compiled_and_checked(model, value).compiled
    assert counts(compiled) == (2, 0, 0)
    assert all(site.detail for site in lncompile.reports(compiled)[0].sites)


@named(FALSE_FRIENDS)
def test_false_friends_are_no_sites_and_not_changed(norm: Norm, without_inductor: None) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value).compiled) == (0, 0, 0)


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


@named([centered_only, centered_only_in_place, variance_of_something_else])
def test_false_friends_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    """Some see no shift all the same: they let a LayerNorm of the same stream fold, or block it; both are exact."""
    sees_a_shift = norm is variance_of_something_else
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    folded = 0 if sees_a_shift else 2
    assert counts(compiled_and_checked(model, value, assist="off").compiled) == (2, folded, 0)


@named(SPELLINGS)
def test_spellings_beside_a_norm(norm: Norm, without_inductor: None) -> None:
    model = randomise(Model(lambda x: norm(x) + functional.layer_norm(x, (D,))).double())
    value = torch.randn(5, D, dtype=torch.float64)
    assert counts(compiled_and_checked(model, value, assist="off").compiled) == (4, 4, 0)


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


# --- more of what may stand in a chain --------------------------------------------------------------------------------


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
