"""Parameters, buffers and inputs of classes and layouts that stock torch.compile takes; operators without overloads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from streams import CENTERED, IDS, TOLERANCE, Stream, made
from torch import Tensor, nn
from torch.utils import _pytree

import lncompile

aten: Any = torch.ops.aten


# --- subclasses of Parameter ---


class Loaded(nn.Parameter):
    """What serving engines use: a parameter that knows how to load itself."""

    def __new__(cls, data: Tensor) -> Loaded:
        return super().__new__(cls, data, requires_grad=False)  # type: ignore[return-value]

    def __init__(self, data: Tensor) -> None:
        self.output_dim = 0
        self._weight_loader = self.load

    @property
    def weight_loader(self) -> Callable[[Tensor], object]:
        return self._weight_loader

    def load(self, value: Tensor) -> None:
        self.data.copy_(value)


class Traceable(Loaded):
    """With a ``__torch_function__`` that does what there is without it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


class Doubled(Loaded):
    """Another function than a plain tensor's: a linear layer's weight counts twice."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is nn.functional.linear:
                value, weight, *rest = args
                return function(value, weight * 2 if isinstance(weight, cls) else weight, *rest)
            return function(*args, **(kwargs or {}))


class Positions(nn.Buffer):
    """A buffer with a class of its own."""


def with_parameters_of(kind: type[Loaded]) -> Stream:
    model = made()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, kind(parameter.detach()))
    return model  # type: ignore[no-any-return]


def check(model: nn.Module, function: Any, folded: int, total: int, *args: Any) -> lncompile.FoldReport:
    """Compare with eager; returns the report."""
    args = args or (IDS,)
    expected = model(*args)
    for _ in range(2):
        for one, other in zip(_pytree.tree_leaves(function(*args)), _pytree.tree_leaves(expected), strict=True):
            torch.testing.assert_close(one, other, **TOLERANCE)
    (report,) = lncompile.reports(function)
    assert (report.folded, report.total) == (folded, total), report
    return report


@pytest.mark.parametrize("kind", [Loaded, Traceable])
def test_parameters_that_load_themselves(kind: type[Loaded], request: pytest.FixtureRequest) -> None:
    if kind is Traceable:  # Inductor gets the same graph of both
        request.getfixturevalue("without_inductor")
    model = with_parameters_of(kind)
    function = torch.compile(model, backend="lnfold")
    report = check(model, function, 2, 2)
    assert {weight.storage for weight in report.weights} == {"copy"}
    assert {weight.name for weight in report.weights} == CENTERED
    assert {type(value) for value in model.parameters()} == {kind}
    assert lncompile.explain(function, IDS).folded == 2
    before = model(IDS)
    model.branch.weight.mul_(1.5).add_(0.25)
    model.table.weight.weight_loader(torch.randn(11, 8, dtype=torch.float64))  # through .data
    lncompile.refresh()
    check(model, function, 2, 2)
    assert (model(IDS) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", [Loaded, Traceable])
def test_a_model_whose_parameters_load_themselves_is_folded_in_place(kind: type[Loaded]) -> None:
    model = with_parameters_of(kind)
    expected = model(IDS)
    plan = lncompile.plan(model, IDS)
    assert plan.folded == 2
    torch.testing.assert_close(plan.apply(model)(IDS), expected, **TOLERANCE)
    assert {type(value) for value in model.parameters()} == {kind}


def test_a_function_of_its_own_is_traced_and_not_applied_again() -> None:
    model = with_parameters_of(Doubled)
    plain = copy.deepcopy(made())
    function = torch.compile(model, backend="lnfold")
    check(model, function, 2, 2)
    assert (model(IDS) - plain(IDS)).abs().max() > 1e-3, "the control: it is another function"
    assert lncompile.explain(model, IDS).folded == 2


@pytest.mark.usefixtures("without_inductor")
def test_a_buffer_of_its_own_class() -> None:
    class WithPositions(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions(torch.randn(5, 8))

        def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
            stream = self.table(ids) + self.positions
            return self.head(self.final(stream))

    model = made(WithPositions)
    model.positions = Positions(model.positions.detach())
    report = check(model, torch.compile(model, backend="lnfold"), 1, 1)
    assert {weight.name for weight in report.weights} == {"positions", "table.weight"}


class Quantized(Tensor):
    """A wrapper: its values are made of others when an operation asks for them."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: float) -> Quantized:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float64)  # type: ignore[attr-defined, no-any-return]

    def __init__(self, values: Tensor, scale: float) -> None:
        self.values_, self.scale = values, scale

    def __repr__(self) -> str:
        return "Quantized(...)"  # torch's own log of what it compiles prints it

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["values_"], self.scale

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], scale: float, size: Any, stride: Any) -> Quantized:
        return Quantized(tensors["values_"], scale)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is aten.detach.default:
            return Quantized(args[0].values_, args[0].scale)
        plain = lambda x: x.values_.double() * x.scale if isinstance(x, cls) else x  # noqa: E731
        return function(*_pytree.tree_map(plain, args), **_pytree.tree_map(plain, kwargs or {}))


def test_a_wrapper_is_left_alone_with_a_reason() -> None:
    model = made()
    values = torch.randint(-100, 100, (8, 8), dtype=torch.int8)
    model.branch.weight = nn.Parameter(Quantized(values, 0.01), requires_grad=False)
    report = check(model, torch.compile(model, backend="lnfold", fullgraph=True), 1, 2)
    (site,) = [site for site in report.sites if not site.folded]
    assert site.reason is lncompile.Reason.UNSUPPORTED_WEIGHT
    assert "Quantized" in site.detail
    assert torch.equal(model.branch.weight.values_, values)


# --- ragged inputs, sizes without a number ---


class Branched(nn.Module):
    """Linear layers in front of norms, with a residual stream and a source that cannot absorb the centering."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.branch = nn.Linear(8, 16), nn.Linear(16, 16)
        self.first, self.second, self.third = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, value: Tensor) -> Tensor:
        stream = self.inner(value)
        stream = stream + self.branch(torch.relu(self.first(stream)))
        return self.head(self.second(stream))


class Assisted(Branched):
    def forward(self, value: Tensor) -> Tensor:
        stream = nn.functional.gelu(self.inner(value))
        for norm in (self.first, self.second, self.third):
            stream = stream + self.branch(torch.relu(norm(stream)))
        return self.head(self.third(stream))


def ragged(*lengths: int) -> Tensor:
    parts = [torch.randn(length, 8, dtype=torch.float64) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


@pytest.mark.parametrize(("kind", "folded", "total"), [(Branched, 2, 2), (Assisted, 4, 4)])
def test_ragged_inputs(kind: type[Branched], folded: int, total: int) -> None:
    model = randomise(kind().double()).eval()
    function = torch.compile(model, backend="lnfold")
    for lengths in ((3, 5, 2), (1, 4, 4), (7, 2)):
        value = ragged(*lengths)
        torch.testing.assert_close(function(value).values(), model(value).values(), **TOLERANCE)
    assert {(report.folded, report.total) for report in lncompile.reports(function)} == {(folded, total)}
    report = lncompile.explain(model, ragged(3, 5, 2))
    assert (report.folded, report.total) == (folded, total)


def test_gradients_of_ragged_inputs() -> None:
    model = randomise(Branched().double())
    function = torch.compile(model, backend="lnfold")
    value = ragged(3, 5, 2)
    with torch.enable_grad():
        gradients = [
            torch.autograd.grad(call(value).values().square().sum(), list(model.parameters())[:6])
            for call in (function, model)
        ]
    torch.testing.assert_close(*gradients, **TOLERANCE)


class Selected(Branched):
    """As many rows as the data says."""

    def forward(self, value: Tensor) -> Tensor:
        rows = torch.nonzero(value[:, 0] > 0).squeeze(-1)
        return super().forward(value[rows])


class Counted(Branched):
    """As many rows as a number in the data says."""

    def forward(self, value: Tensor, count: Tensor) -> Tensor:
        length = count.item()
        torch._check(length >= 1)
        torch._check(length <= value.shape[0])
        return super().forward(value.narrow(0, 0, length))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("limits", [{}, {"lnfold.memory_budget": 10**6}, {"lnfold.defer": "on"}])
def test_sizes_that_the_data_decides(
    dynamic: bool | None, limits: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    """Without options through Inductor, which has to take what is rewritten; what options decide is the graph's."""
    if limits:
        request.getfixturevalue("without_inductor")
    value = torch.randn(9, 8, dtype=torch.float64)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        for kind, inputs in ((Selected, [(value,), (-value,)]), (Counted, [(value, torch.tensor(n)) for n in (1, 5)])):
            model = randomise(kind().double()).eval()
            function = torch.compile(model, backend="lnfold", options=limits, dynamic=dynamic, fullgraph=True)
            for args in inputs:
                torch.testing.assert_close(function(*args), model(*args), **TOLERANCE)
            assert {(report.folded, report.total) for report in lncompile.reports(function)} == {(2, 2)}
            report = lncompile.explain(function, *inputs[0])
            assert (report.folded, report.total) == (2, 2)


# --- operators without an overload ---


class Packets(nn.Module):
    """Everything between a norm and its source, as operators without an overload."""

    def __init__(self, call: Callable[[Packets, Tensor], Any]) -> None:
        super().__init__()
        self.call = call
        self.inner, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, value: Tensor) -> Tensor:
        return self.call(self, value)

    def normed(self, value: Tensor) -> Tensor:
        return aten.layer_norm(value, [16], self.norm.weight, self.norm.bias, 1e-5)


def linear(model: Packets, value: Tensor) -> Tensor:
    return aten.linear(value, model.inner.weight, model.inner.bias)


PACKETS: dict[str, tuple[Callable[[Packets, Tensor], Any], int]] = {
    "native_layer_norm": (
        lambda m, x: aten.native_layer_norm(m.inner(x), [16], m.norm.weight, m.norm.bias, 1e-5)[0], 1,
    ),
    "layer_norm": (lambda m, x: m.normed(m.inner(x)), 1),
    "linear": (lambda m, x: m.normed(linear(m, x)), 1),
    "linear without a bias": (lambda m, x: m.normed(aten.linear(x, m.inner.weight)), 1),
    "add": (lambda m, x: m.normed(aten.add(m.inner(x), linear(m, x), alpha=0.5)), 1),
    "add a number": (lambda m, x: m.normed(aten.add(m.inner(x), 2.5)), 1),
    "add in place": (lambda m, x: m.normed(aten.add_(m.inner(x), linear(m, x))), 1),
    "mul by a number": (lambda m, x: m.normed(aten.mul(m.inner(x), 2.5)), 1),
    "mul by something constant": (lambda m, x: m.normed(aten.mul(m.inner(x), x[:, :1])), 1),
    "mul by something that varies": (lambda m, x: m.normed(aten.mul(m.inner(x), aten.cat([x, x], -1))), 0),
    "addmm": (lambda m, x: m.normed(aten.addmm(m.inner.bias, x, aten.t(m.inner.weight))), 1),
    "views": (lambda m, x: m.normed(aten.view(aten.unsqueeze(m.inner(x), 0), [-1, 16])), 1),
    "clone, and written to": (lambda m, x: m.normed(aten.mul_(aten.clone(m.inner(x)), x[:, :1])), 1),
    "written to where it varies": (lambda m, x: m.normed(aten.mul_(m.inner(x), aten.cat([x, x], -1))), 0),
    "written out": (lambda m, x: (y := m.inner(x), aten.add(x[:, :1], y, out=y), m.normed(y))[2], 0),
}  # fmt: skip


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize("name", PACKETS)
def test_operators_without_an_overload(name: str) -> None:
    call, folded = PACKETS[name]
    model = randomise(Packets(call).double()).eval()
    value = torch.randn(4, 8, dtype=torch.float64)
    check(model, torch.compile(model, backend="lnfold", fullgraph=True), folded, 1, value)
