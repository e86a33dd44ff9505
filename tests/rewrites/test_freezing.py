"""Under Inductor's freezing weights are constants of the graph: they fold as ever, and become constants centered."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
import torch._inductor.config
from architectures import ARCHITECTURES, randomise
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.lowering.inspect.generated_code import generated_code
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.rewrites import center
from lncompile.verification import floating_outputs, relative_error

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def frozen() -> Iterator[None]:
    with torch._inductor.config.patch(freezing=True):
        yield


class Net(nn.Module):
    """A tied table, a product whose weight is computed, a counter that is written to, and two norms that fold."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight
        self.branch, self.norm, self.final = nn.Linear(width, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.register_buffer("calls", torch.zeros(1, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        self.calls.add_(1)
        stream = self.table(ids)
        stream = stream + functional.linear(torch.relu(self.norm(stream)), 2 * self.branch.weight, self.branch.bias)
        return self.head(self.final(stream)) * self.calls


IDS = torch.arange(10).reshape(2, 5)


def net() -> Net:
    return randomise(Net().double()).eval()  # type: ignore[return-value]


def outcome(compiled: object) -> list[tuple[int, int]]:
    return [(report.folded, report.total) for report in lncompile.reports(compiled)]  # type: ignore[arg-type]


def test_weights_are_constants_and_fold() -> None:
    """One graph whose only inputs are the caller's: no weight, centered or not, is handed over at a call."""
    model, stock = net(), net()
    compiled = torch.compile(model, backend="lnfold")
    before = copy.deepcopy(dict(model.named_parameters()))
    code = generated_code(compiled, IDS)
    expected = [stock(IDS) for _ in range(4)]
    for wanted in expected[1:]:
        torch.testing.assert_close(compiled(IDS), wanted, **TOLERANCE)
    assert model.calls.item() == 4, "buffers that are written to are no constants"
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.total) == (2, 2)
    assert {weight.name for weight in report.weights} == {"table.weight", "branch.weight", "branch.bias"}
    assert {weight.storage for weight in report.weights} == {"copy"}
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    (source,) = code.source
    (unpacked,) = re.findall(r"^ *(.*) = args$", source, re.MULTILINE)
    assert len(unpacked.split(",")) == 2, "the tokens and the counter"
    assert "_frozen_param" in source
    assert sum(kernel.welford for kernel in code.kernels) == sum(k.mean_subtractions for k in code.kernels) == 0


def test_without_centering_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    monkeypatch.setattr(center, "center_weight", lambda weight, axes, dtype, compute_dtype=None: weight.to(dtype))
    model = net()
    expected = copy.deepcopy(model)(IDS)
    assert (torch.compile(model, backend="lnfold")(IDS) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "bloom", "dinov2", "falcon_7b"])
def test_models(name: str, without_inductor: None) -> None:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    model = architecture.model()
    inputs = architecture.inputs(torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    expected, actual = (floating_outputs(m(**inputs)) for m in (model, compiled))
    assert max(relative_error(actual[key], value) for key, value in expected.items()) <= 1e-10
    assert outcome(compiled) == [(architecture.folded, architecture.sites)]
    explained = lncompile.explain(compiled, **inputs)
    assert (explained.folded, explained.total) == (architecture.folded, architecture.sites)


def test_another_parameter_is_another_graph(without_inductor: None) -> None:
    model, eager = net(), net()
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(IDS), eager(IDS), **TOLERANCE)
    for module in (model, eager):
        module.branch.weight = nn.Parameter(torch.arange(256.0).reshape(16, 16).double().sin())
    torch.testing.assert_close(compiled(IDS), eager(IDS), **TOLERANCE)
    assert outcome(compiled) == [(2, 2)] * 2


def test_dynamic_sizes(without_inductor: None) -> None:
    model, eager = net(), net()
    compiled = torch.compile(model, backend="lnfold", dynamic=True)
    for ids in [torch.arange(rows * length).reshape(rows, length) % 11 for rows, length in ((2, 5), (3, 4), (5, 2))]:
        torch.testing.assert_close(compiled(ids), eager(ids), **TOLERANCE)
    assert outcome(compiled) == [(2, 2)]


def test_reset_frees_copies(without_inductor: None, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[Tensor]] = []
    evaluate = Expression.evaluate

    def watched(expression: Expression, leaves: Sequence[Tensor]) -> Tensor:
        value = evaluate(expression, leaves)
        copies.append(weakref.ref(value))
        return value

    monkeypatch.setattr(Expression, "evaluate", watched)
    model = net()
    torch.compile(model, backend="lnfold")(IDS)
    gc.collect()
    assert len(copies) == 3
    torch._dynamo.reset()
    gc.collect()
    assert not any(reference() is not None for reference in copies)


def test_an_option_alone_freezes_nothing(without_inductor: None) -> None:
    """Dynamo asks torch's configuration, not a backend's options; weights are inputs, and followed as ever."""
    with torch._inductor.config.patch(freezing=False):
        model, eager = net(), net()
        compiled = torch.compile(model, backend="lnfold", options={"freezing": True})
        torch.testing.assert_close(compiled(IDS), eager(IDS), **TOLERANCE)
        for module in (model, eager):
            module.branch.weight.mul_(2)
        torch.testing.assert_close(compiled(IDS), eager(IDS), **TOLERANCE)
        assert outcome(compiled) == [(2, 2)]


def test_training_is_not_frozen(without_inductor: None) -> None:
    model, eager = net(), net()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.training": "on"})
    with torch.enable_grad():
        compiled(IDS).square().sum().backward()
        eager(IDS).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, eager.get_parameter(name).grad, **TOLERANCE)


def test_a_folded_module_is_frozen_later() -> None:
    model = net()
    folded = lncompile.fold(model, IDS)
    folded.calls.copy_(model.calls)  # it was called in between
    compiled = torch.compile(folded, backend="inductor")
    torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)
