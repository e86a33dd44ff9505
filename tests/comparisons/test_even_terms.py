"""Equal programs are equal: what a call of each does, counted, not timed."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lncompile
from lncompile.comparisons.even_terms import SMALL_MODULES, begin_anew, compile_apart, settle
from lncompile.lowering import can_compare, torch_private_caches
from lncompile.models.loading import randomise


class Layers(nn.Module):
    """Linear layers, with LayerNorms whose centering does not fold where they are asked for."""

    def __init__(self, norms: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8) if norms else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(torch.relu(self.first(x)))))


def events(function: Callable[..., Any], *arguments: Any) -> list[tuple[str, str]]:
    """Every call of a Python or C function that a call makes, in order."""
    found: list[tuple[str, str]] = []

    def record(frame: Any, event: str, argument: Any) -> None:
        if event == "call":
            found.append((event, frame.f_code.co_qualname))
        elif event == "c_call":
            found.append((event, getattr(argument, "__qualname__", str(argument))))

    sys.setprofile(record)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("norms", [False, True], ids=["no norms", "norms that do not fold"])
@pytest.mark.parametrize("first", ["inductor", "lnfold"])
def test_a_graph_that_is_left_alone_is_called_as_stock_calls_it(norms: bool, first: str) -> None:
    torch._dynamo.reset()
    model, x = Layers(norms).eval(), torch.randn(4, 8)
    randomise(model)
    second = "lnfold" if first == "inductor" else "inductor"
    programs = {backend: compile_apart(model, backend=backend) for backend in (first, second)}
    with torch.no_grad(), torch_private_caches.without_autograd_cache():
        for program in programs.values():
            program(x)
            program(x)
        calls = {backend: events(program, x) for backend, program in programs.items()}
    assert len(calls["inductor"]) > 20
    assert calls["lnfold"] == calls["inductor"]
    (report,) = lncompile.reports(programs["lnfold"])
    assert (report.folded, report.total) == (0, int(norms))


def test_a_graph_that_folds_costs_one_function_and_the_look_at_its_weights() -> None:
    """The control: something is called there that stock does not call."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval()
    randomise(model)
    x = torch.randn(4, 8)
    programs = {backend: compile_apart(model, backend=backend) for backend in ("inductor", "lnfold")}
    with torch.no_grad(), torch_private_caches.without_autograd_cache():
        for program in programs.values():
            program(x)
            program(x)
        stock, ours = (events(program, x) for program in programs.values())
    names = [name for _, name in ours]
    assert "FoldedGraph.__call__" in names
    # Of our own there is no other function in Python where one in C looks at the weights.
    assert ("Materializer.__call__" in names) is not can_compare()
    # Dynamo's wrapper around what a backend returns is there once, as with stock.
    wrapper = "DisableContext.__call__.<locals>._fn"
    assert names.count(wrapper) == [name for _, name in stock].count(wrapper)


def entries_looked_at(model: nn.Module, programs: int, apart: Callable[..., Any]) -> list[int]:
    """Compile a model several times; how many entries stand in the list that each program's calls search."""
    torch._dynamo.reset()
    x = torch.randn(4, 8)
    compiled = [apart(model, backend=torch._dynamo.lookup_backend("eager")) for _ in range(programs)]
    with torch.no_grad():
        for program in compiled:
            program(x)
    return [len(torch_private_caches.entries_searched_by(program)) for program in compiled]


def test_a_program_compiled_apart_searches_its_own_code_alone() -> None:
    """Also where the model is compiled in the usual way beside it."""
    model = Layers(False).eval()
    assert entries_looked_at(model, 3, compile_apart) == [1, 1, 1]
    compiled: list[str] = []

    def backend(graph_module: Any, example_inputs: Any) -> Any:
        compiled.append("once")
        return graph_module.forward

    x = torch.randn(4, 8)
    with torch.no_grad():
        torch.compile(model, backend=backend)(x)
        assert len(compiled) == 1
        for number in (2, 3):
            compile_apart(model, backend=backend)(x)
            assert len(compiled) == number  # it did not take what the other one had compiled


def test_where_torch_cannot_keep_them_apart_each_gets_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As before torch 2.13."""
    monkeypatch.setattr(torch_private_caches, "separate_caches", dict)
    model = Layers(True).eval()
    assert entries_looked_at(model, 3, compile_apart) == [1, 1, 1]
    twin = torch_private_caches.with_code_of_its_own(model)
    assert twin is not model
    assert twin.first.weight is model.first.weight
    x = torch.randn(4, 8)
    torch.testing.assert_close(twin(x), model(x))
    function = torch_private_caches.with_code_of_its_own(events)
    assert function.__code__ is not events.__code__


def test_a_forward_of_another_object_stays_its_own() -> None:
    model, other = Layers(True).eval(), Layers(False).eval()
    model.forward = other.forward  # type: ignore[method-assign]
    x = torch.randn(4, 8)
    torch.testing.assert_close(torch_private_caches.with_code_of_its_own(model)(x), other(x), rtol=0, atol=0)


def test_a_partial_function_gets_code_of_its_own() -> None:
    twin = torch_private_caches.with_code_of_its_own(functools.partial(torch.nn.functional.softplus, beta=2))
    x = torch.randn(4)
    torch.testing.assert_close(twin(x), torch.nn.functional.softplus(x, beta=2))
    partial = functools.partial(events, lambda: None)
    assert torch_private_caches.with_code_of_its_own(partial).func.__code__ is not events.__code__  # type: ignore[attr-defined]


def test_settling_draws_no_random_number_of_the_caller() -> None:
    begin_anew()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    settle()
    assert torch.equal(torch.rand(1), expected)


def test_a_twin_sees_weights_that_are_exchanged() -> None:
    model = Layers(True).eval()
    twin = torch_private_caches.with_code_of_its_own(model)
    x = torch.randn(4, 8)
    model.first.weight = nn.Parameter(torch.randn(8, 8))
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_settling_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lncompile.comparisons import even_terms

    even_terms._small_programs.cache_clear()
    compiled: list[Any] = []

    def compile_nothing(model: Any, *, backend: str) -> Callable[..., Any]:
        compiled.append(backend)
        return model

    monkeypatch.setattr(even_terms, "compile_apart", compile_nothing)
    settle()
    settle("cpu")
    assert compiled == ["inductor"] * SMALL_MODULES
    even_terms._small_programs.cache_clear()


def test_a_process_that_cannot_be_settled_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from lncompile.comparisons import even_terms

    def broken(model: Any, *, backend: str) -> Callable[..., Any]:
        def program(value: Tensor) -> Tensor:
            raise RuntimeError("no compiler here")

        return program

    even_terms._small_programs.cache_clear()
    monkeypatch.setattr(even_terms, "compile_apart", broken)
    settle()
    even_terms._small_programs.cache_clear()
    assert "no compiler here" in caplog.text
