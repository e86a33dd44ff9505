"""LayerNorm and group norm calls in every spelling: what counts as a site, what folds, and that nothing changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from architectures import randomise
from oracle import Wide
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile import Reason
from lncompile.lowering import grouped_rms_norm, rms_norm
from lncompile.verification import BUDGET, ROUNDINGS, relative_error

D, G = 12, 3
aten = torch.ops.aten


class Block(nn.Module):
    """A residual stream out of two linear layers, and a function that normalises it."""

    def __init__(self, norm: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(7, D), nn.Linear(7, D), nn.Linear(D, 5)
        self.square = nn.Linear(D, D)
        self.weight, self.bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
        self.group_norm = nn.GroupNorm(G, D, eps=1e-3)
        self.norms = nn.ModuleList(nn.LayerNorm(D // G) for _ in range(G))
        self.group_weight, self.group_bias = (nn.Parameter(torch.zeros(G, D // G)) for _ in range(2))
        self.pixels = nn.Conv2d(2, D, 2, stride=2)
        self.picture = nn.Parameter(torch.zeros(1, D, 2, 3))
        self.norm = norm

    def forward(self, value: Tensor) -> Tensor:
        normed = self.norm(self, self.one(value) + torch.relu(self.two(value)).mean(-1, keepdim=True))
        return self.head(normed.reshape(-1, D))


@dataclass(frozen=True)
class Case:
    norm: Callable[[Block, Tensor], Tensor]
    sites: int = 1
    folded: int = 1
    reason: Reason | None = None


def run(case: Case, dtype: torch.dtype = torch.float64, dynamic: bool | None = None) -> None:
    model = randomise(Block(case.norm).to(dtype))
    value = torch.randn(4, 7, dtype=dtype) + 0.5
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"}, fullgraph=True, dynamic=dynamic)
    assert relative_error(compiled(value), model(value)) <= 1e-12
    if not case.sites:
        assert lncompile.explain(model, value).total == 0
        return
    (report,) = lncompile.reports(compiled)
    assert (report.total, report.folded) == (case.sites, case.folded), str(report)
    assert {site.reason for site in report.sites} <= {None, case.reason}
    if case.folded:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9).add_(0.05)
        assert relative_error(compiled(value), model(value)) <= 1e-12


# --- layer norm -------------------------------------------------------------------------------------------------------


def native_layer_norm(m: Block, x: Tensor) -> Tensor:
    return torch.native_layer_norm(x, (D,), m.weight, m.bias, 1e-3)[0]


def aten_native(m: Block, x: Tensor) -> Tensor:
    output, _, _ = aten.native_layer_norm.default(x, [D], None, m.bias, 1e-3)
    return output


def native_with_deviation(m: Block, x: Tensor) -> Tensor:
    output, _, inverse = torch.native_layer_norm(x, (D,), m.weight, m.bias, 1e-3)
    return output / inverse


def native_mean_is_read(m: Block, x: Tensor) -> Tensor:
    output, mean, _ = torch.native_layer_norm(x, (D,), m.weight, m.bias, 1e-3)
    return output + mean


def expression(m: Block) -> Tensor:
    return 1 + m.weight


LAYERED = {
    "positional": Case(lambda m, x: functional.layer_norm(x, (D,), m.weight, m.bias, 1e-3)),
    "keywords": Case(lambda m, x: functional.layer_norm(
        eps=1e-3, bias=m.bias, weight=m.weight, normalized_shape=(D,), input=x)),
    "mixed": Case(lambda m, x: functional.layer_norm(x, (D,), m.weight, bias=m.bias, eps=1e-3)),
    "list": Case(lambda m, x: functional.layer_norm(x, [D], m.weight)),
    "size": Case(lambda m, x: functional.layer_norm(x, x.size()[1:], m.weight)),
    "shape_of_weight": Case(lambda m, x: functional.layer_norm(x, m.weight.shape, m.weight, m.bias)),
    "last_of_shape": Case(lambda m, x: functional.layer_norm(x, (x.shape[-1],), m.weight)),
    "torch": Case(lambda m, x: torch.layer_norm(x, (D,), m.weight, m.bias, 1e-3, False)),
    "torch_keywords": Case(lambda m, x: torch.layer_norm(
        x, normalized_shape=(D,), bias=m.bias, eps=1e-3, cudnn_enable=False)),
    "aten": Case(lambda m, x: aten.layer_norm.default(x, [D], m.weight, m.bias, 1e-3)),
    "aten_packet": Case(lambda m, x: aten.layer_norm(x, [D], m.weight, eps=1e-3)),
    "native": Case(native_layer_norm),
    "native_unpacked": Case(aten_native),
    "native_with_deviation": Case(native_with_deviation),
    "native_keywords": Case(lambda m, x: torch.native_layer_norm(
        x, normalized_shape=(D,), weight=None, bias=None, eps=1e-3)[0]),
    "no_affine": Case(lambda m, x: functional.layer_norm(x, (D,))),
    "weight_only": Case(lambda m, x: functional.layer_norm(x, (D,), m.weight)),
    "bias_only": Case(lambda m, x: functional.layer_norm(x, (D,), bias=m.bias)),
    "two_axes": Case(lambda m, x: functional.layer_norm(
        x.view(-1, G, D // G), (G, D // G), m.group_weight, m.group_bias, 1e-3)),
    "two_axes_native": Case(lambda m, x: torch.native_layer_norm(
        x.view(-1, G, D // G), (G, D // G), m.group_weight, None, 1e-3)[0]),
    "all_axes_of_a_row": Case(lambda m, x: torch.stack(
        [functional.layer_norm(row, row.shape, m.weight, m.bias) for row in x.unbind()]), 4, 4),
    "weight_expression": Case(lambda m, x: functional.layer_norm(x, (D,), expression(m), m.bias * 2)),
    "weight_of_a_view": Case(lambda m, x: functional.layer_norm(x, (D,), m.group_weight.flatten(), None)),
    "weight_that_is_an_activation": Case(lambda m, x: functional.layer_norm(x, (D,), torch.relu(x)[0] + 1, m.bias),
                                         folded=0, reason=Reason.VISIBLE),
    "huge_eps": Case(lambda m, x: functional.layer_norm(x, (D,), m.weight, m.bias, 10.0)),
    "no_eps": Case(lambda m, x: functional.layer_norm(x, (D,), m.weight, m.bias, 0)),
    "mean_is_read": Case(native_mean_is_read, sites=0, folded=0),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERED)
def test_layer_norm_call(name: str, without_inductor: None) -> None:
    run(LAYERED[name])


@pytest.mark.parametrize("name", ["positional", "size", "last_of_shape", "native", "two_axes"])
def test_layer_norm_call_with_dynamic_shapes(name: str, without_inductor: None) -> None:
    run(LAYERED[name], dynamic=True)


@pytest.mark.parametrize("name", ["module", "native", "no_affine", "pixels_of_size_one"])
def test_group_norm_call_with_dynamic_shapes(name: str, without_inductor: None) -> None:
    run(GROUPED[name], dynamic=True)


def low_precision(m: Block, x: Tensor) -> Tensor:
    return functional.layer_norm(x, (D,), m.weight.float(), m.bias.float(), 1e-3).to(x.dtype)


def low_precision_groups(m: Block, x: Tensor) -> Tensor:
    return functional.group_norm(x, G, m.weight.float(), m.bias.float(), 1e-3).to(x.dtype)


def autocast_inside(m: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = m.square(torch.relu(functional.layer_norm(x, (D,), m.weight, m.bias, 1e-3)))
        return functional.layer_norm(x + hidden, (D,), m.bias, m.weight, 1e-3).to(x.dtype)


def no_autocast_inside(m: Block, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return functional.layer_norm(x.float(), (D,), m.weight.float(), m.bias.float(), 1e-3).to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "folded"),
    [(low_precision, 1), (low_precision_groups, 1), (autocast_inside, 2), (no_autocast_inside, 1),
     (lambda m, x: m.group_norm(x), 1), (lambda m, x: functional.layer_norm(x, (D,), m.weight, m.bias), 1)],
    ids=["float32_weights", "float32_weights_of_groups", "autocast_inside", "no_autocast_inside", "groups", "layer"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        pytest.param(torch.float32, True, id="float32-autocast"),
        pytest.param(torch.bfloat16, False, id="bfloat16"),
        # What has one kind of cast or none: less than those above.
        pytest.param(torch.float32, False, id="float32", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, True, id="bfloat16-autocast", marks=pytest.mark.slow),
    ],
)
def test_precision_is_that_of_inductor(
    norm: Callable[[Block, Tensor], Tensor], folded: int, dtype: torch.dtype, autocast: bool
) -> None:
    """Under ``verify``'s budget, dtypes as in eager, whatever casts and autocast regions stand around the norm."""
    model = randomise(Block(norm).to(dtype))
    value = torch.randn(64, 7, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(value)
        compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
        actual = compiled(value)
        stock = torch.compile(model, backend="inductor")(value)
    reports = lncompile.reports(compiled)
    assert sum(report.folded for report in reports) >= folded
    assert actual.dtype == expected.dtype
    with Wide():
        reference = randomise(Block(norm).to(dtype)).double()(value.double())
    budget = max(BUDGET * relative_error(stock, reference), ROUNDINGS * torch.finfo(expected.dtype).eps)
    assert relative_error(actual, reference) <= budget


# --- group norm -------------------------------------------------------------------------------------------------------


def image(m: Block, x: Tensor) -> Tensor:
    """``[4, 12, 2, 3]`` out of a convolution, and the stream added to it."""
    return m.pixels(x.new_ones(4, 2, 4, 6).cumsum(-1).cumsum(-2)) + x[..., None, None]


def stacked_norms(m: Block, x: Tensor) -> Tensor:
    grouped = x.unflatten(-1, (G, -1))
    return torch.stack([norm(grouped[:, index]) for index, norm in enumerate(m.norms)], dim=1)


def norms_of_unbound_groups(m: Block, x: Tensor) -> Tensor:
    return torch.cat([norm(part) for norm, part in zip(m.norms, x.view(-1, G, D // G).unbind(1), strict=True)], -1)


def native(m: Block, x: Tensor) -> Tensor:
    return torch.native_group_norm(x, m.weight, m.bias, 4, D, 1, G, 1e-5)[0]


def native_with_inverse_deviation(m: Block, x: Tensor) -> Tensor:
    output, _, inverse = aten.native_group_norm.default(x, m.weight, None, 4, D, 1, G, 1e-5)
    return output + inverse.sum()


def native_with_mean(m: Block, x: Tensor) -> Tensor:
    output, mean, _ = aten.native_group_norm.default(x, m.weight, m.bias, 4, D, 1, G, 1e-5)
    return output + mean.sum()


def native_in_another_shape(m: Block, x: Tensor) -> Tensor:
    # [4, 12] read as [2, 24]: a group is not what it is on the input.
    return torch.native_group_norm(x, None, None, 2, 2 * D, 1, G, 1e-5)[0]


GROUPED = {
    "module": Case(lambda m, x: m.group_norm(x)),
    "functional": Case(lambda m, x: functional.group_norm(x, G, m.weight, m.bias, 1e-3)),
    "keywords": Case(lambda m, x: functional.group_norm(eps=1e-3, bias=m.bias, num_groups=G, input=x)),
    "torch": Case(lambda m, x: torch.group_norm(x, G, m.weight, m.bias, 1e-4, False)),
    "aten": Case(lambda m, x: aten.group_norm.default(x, G, m.weight)),
    "native": Case(native),
    "native_with_inverse_deviation": Case(native_with_inverse_deviation),
    "no_affine": Case(lambda m, x: functional.group_norm(x, G)),
    "bias_only": Case(lambda m, x: functional.group_norm(x, G, bias=m.bias)),
    "weight_expression": Case(lambda m, x: functional.group_norm(x, G, 1 + m.weight, 2 * m.bias)),
    "one_group": Case(lambda m, x: functional.group_norm(x, 1, m.weight, m.bias)),
    "one_group_and_layer_norm": Case(
        lambda m, x: functional.group_norm(x, 1) + functional.layer_norm(x, (D,)), sites=2, folded=2),
    "pixels_of_size_one": Case(lambda m, x: m.group_norm(x[..., None, None])),
    "one_channel_a_group": Case(lambda m, x: functional.group_norm(x, D, m.weight, m.bias), folded=1),
    "view_and_layer_norm": Case(lambda m, x: functional.layer_norm(x.view(-1, G, D // G), (D // G,))),
    "view_and_layer_norm_with_affine": Case(
        lambda m, x: functional.layer_norm(x.view(-1, G, D // G), (D // G,)) * m.group_weight + m.group_bias),
    "view_and_layer_norm_with_shared_affine": Case(
        lambda m, x: functional.layer_norm(x.view(-1, G, D // G), (D // G,), m.weight[:4], m.bias[4:8])),
    "view_and_group_norm": Case(
        lambda m, x: functional.layer_norm(x.unflatten(-1, (G, -1)), (D // G,)).flatten(1) + m.group_norm(x),
        sites=2, folded=2),
    "stacked_norms": Case(stacked_norms, sites=G, folded=G),
    "norms_of_unbound_groups": Case(norms_of_unbound_groups, sites=G, folded=G),
    # --- what stays ---
    "groups_and_whole": Case(
        lambda m, x: m.group_norm(x) + functional.layer_norm(x, (D,)), sites=2, folded=0,
        reason=Reason.DIFFERENT_AXES),
    "other_groups": Case(
        lambda m, x: m.group_norm(x) + functional.group_norm(x, 2), sites=2, folded=0, reason=Reason.DIFFERENT_AXES),
    "one_channel_a_group_is_seen_by_a_norm": Case(
        lambda m, x: functional.group_norm(x, D, m.weight) + functional.layer_norm(x, (D,)), sites=2, folded=0,
        reason=Reason.DIFFERENT_AXES),
    "of_an_activation": Case(lambda m, x: m.group_norm(torch.relu(x)), folded=0, reason=Reason.NON_COMMUTING),
    "mean_is_read": Case(native_with_mean, sites=0, folded=0),
    "read_in_another_shape": Case(native_in_another_shape, sites=0, folded=0),
    "pixels": Case(lambda m, x: m.group_norm(image(m, x)).mean((2, 3)), sites=0, folded=0),
}  # fmt: skip


def beside(m: Block, x: Tensor, groups: int, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """A layer norm and a group norm of one stream ``[4, 12, 2, 3]``, a parameter and something constant on it."""
    stream = m.picture + x.mean(-1)[:, None, None, None]
    return norm(stream).reshape(4, D, 2, 3).amax((2, 3)) + functional.group_norm(stream, groups).amax((2, 3))


# Group norm with pixels is no site, but it sees no shift along exactly its axes.
over_pixels: Callable[[Tensor], Tensor] = lambda x: functional.layer_norm(x, (2, 3))  # noqa: E731
over_groups: Callable[[Tensor], Tensor] = lambda x: functional.layer_norm(  # noqa: E731
    x.unflatten(1, (G, -1)), (D // G, 2, 3)
)
over_all: Callable[[Tensor], Tensor] = lambda x: functional.layer_norm(x, (D, 2, 3))  # noqa: E731
SINKS = {
    "pixels_and_groups_of_one": Case(lambda m, x: beside(m, x, D, over_pixels)),
    "pixels_and_groups": Case(lambda m, x: beside(m, x, G, over_pixels), 1, 0, Reason.DIFFERENT_AXES),
    "groups_and_the_same_groups": Case(lambda m, x: beside(m, x, G, over_groups)),
    "groups_and_other_groups": Case(lambda m, x: beside(m, x, 2, over_groups), 1, 0, Reason.DIFFERENT_AXES),
    "groups_and_groups_of_one": Case(lambda m, x: beside(m, x, D, over_groups), 1, 0, Reason.DIFFERENT_AXES),
    "all_and_one_group": Case(lambda m, x: beside(m, x, 1, over_all)),
    "all_and_groups": Case(lambda m, x: beside(m, x, G, over_all), 1, 0, Reason.DIFFERENT_AXES),
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPED)
def test_group_norm_over_channels(name: str, without_inductor: None) -> None:
    run(GROUPED[name])


@pytest.mark.parametrize("name", ["of_an_activation", "groups_and_whole"])
def test_group_norm_that_stays_beside_eager_layer_norms(name: str, without_inductor: None) -> None:
    model, value = randomise(Block(GROUPED[name].norm).double()), torch.randn(4, 7, dtype=torch.float64)
    options = {"lnfold.assist": "off", "lnfold.nonfoldable": "eager"}
    compiled = torch.compile(model, backend="lnfold", options=options, fullgraph=True)
    assert relative_error(compiled(value), model(value)) <= 1e-12


@pytest.mark.parametrize("name", SINKS)
def test_group_norm_with_pixels_sees_no_shift_along_its_own_axes(name: str, without_inductor: None) -> None:
    run(SINKS[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wide_weights", [False, True])
def test_grouped_rms_norm_is_group_norm_of_centered_groups(dtype: torch.dtype, wide_weights: bool) -> None:
    value = torch.randn(5, G, 4, dtype=torch.float64)
    value = (value - value.mean(-1, keepdim=True)).flatten(1).to(dtype)
    weight, bias = (torch.randn(D, dtype=torch.float64) + 1 for _ in range(2))
    expected = functional.group_norm(value.double(), G, weight, bias, 1e-3)
    parameters = (weight, bias) if wide_weights else (weight.to(dtype), bias.to(dtype))
    for input in (value, value[..., None, None]):
        output = grouped_rms_norm(input, G, *parameters, 1e-3)
        assert (output.shape, output.dtype) == (input.shape, dtype)
        assert relative_error(output.view(5, D), expected) <= 8 * torch.finfo(dtype).eps
    one_group = grouped_rms_norm(value, 1, weight, bias, 1e-3, output_dtype=torch.float64)
    assert relative_error(one_group, rms_norm(value, (D,), weight, bias, 1e-3, output_dtype=torch.float64)) == 0
    no_rows = grouped_rms_norm(value[:0], G, weight, bias)
    assert no_rows.shape == (0, D)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("shape", [(24,), (2, 12), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
def test_rms_norm_takes_every_pair_of_dtypes_that_layer_norm_takes(shape: tuple[int, ...], affine: str) -> None:
    """And gives its dtype, its shape and, in float32 inside, its values on input of zero mean."""
    value = torch.randn(5, *shape, dtype=torch.float64)
    axes = tuple(range(1, value.dim()))
    value = value - value.mean(axes, keepdim=True)
    weight = torch.randn(shape, dtype=torch.float64) + 1 if affine in ("both", "weight") else None
    bias = torch.randn(shape, dtype=torch.float64) if affine in ("both", "bias") else None
    taken = set()
    for dtype, parameter_dtype in itertools.product(DTYPES, DTYPES):
        parameters = [None if p is None else p.to(parameter_dtype) for p in (weight, bias)]
        narrow = value.to(dtype)
        try:
            eager = functional.layer_norm(narrow, shape, *parameters, 1e-3)
        except RuntimeError:
            continue
        taken.add((dtype, parameter_dtype))
        output = rms_norm(narrow, shape, *parameters, 1e-3)
        assert (output.dtype, output.shape, output.is_contiguous()) == (eager.dtype, eager.shape, True)
        exact = functional.layer_norm(
            narrow.double(), shape, *(p if p is None else p.double() for p in parameters), 1e-3
        )
        assert relative_error(output, exact) <= 8 * torch.finfo(dtype).eps
    assert taken >= {(dtype, dtype) for dtype in DTYPES} | {(dtype, torch.float32) for dtype in DTYPES[2:]}
