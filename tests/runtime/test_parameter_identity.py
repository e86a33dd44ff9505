"""Parameters are recognised without weak references, so that torch may exchange what they hold; none is mistaken."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures import randomise
from streams import CENTERED, IDS, TOLERANCE, Stream, made
from torch import Tensor, nn

import lncompile
from lncompile.runtime import parameter_identity
from lncompile.runtime.parameter_identity import ParameterReference, Place
from lncompile.runtime.parameter_state import ParameterState

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture
def swapping() -> Iterator[None]:
    """Conversions and loads exchange what the parameters hold, in place of their data."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def check(function: Callable[..., Tensor], model: nn.Module, folded: int = 2) -> Tensor:
    """Compare with eager; returns the answer, for controls that it did change."""
    expected = model(IDS)
    torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    torch.testing.assert_close(model(IDS), expected, **TOLERANCE)
    assert {(report.folded, report.total) for report in lncompile.reports(function)} == {(folded, 2)}
    return expected


# --- what torch is let do ---


@pytest.mark.usefixtures("swapping")
def test_conversions_and_loads_that_swap() -> None:
    model = made()
    objects = list(model.parameters())
    function = torch.compile(model, backend="lnfold")
    answers = [check(function, model)]
    other = randomise(Stream().double(), seed=3).state_dict()
    model.load_state_dict(other)
    answers.append(check(function, model))
    model.load_state_dict({name: value * 1.5 + 0.25 for name, value in other.items()})
    answers.append(check(function, model))
    model.bfloat16().double()
    answers.append(check(function, model))
    model.double()
    torch.testing.assert_close(check(function, model), answers[-1], **TOLERANCE)
    assert all((one - other).abs().max() > 1e-3 for one, other in itertools.pairwise(answers))
    assert all(one is other for one, other in zip(objects, model.parameters(), strict=True)), (
        "the control: same objects"
    )


@pytest.mark.usefixtures("swapping")
def test_a_graph_that_folds_nothing_is_found_after_a_swap() -> None:
    model = made()
    function = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    expected = model(IDS, True)
    torch.testing.assert_close(function(IDS, True), expected, **TOLERANCE)
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    torch.testing.assert_close(function(IDS, True), expected, **TOLERANCE)
    assert [(report.folded, report.total) for report in lncompile.reports(function)] == [(0, 1)]


@pytest.mark.parametrize("calls", ["inference", "training", "other sizes"])
def test_no_parameter_has_weak_references(calls: str) -> None:
    model = made()
    function = torch.compile(model, backend="lnfold")
    for ids in (IDS, IDS[:1], IDS[:, :3])[: 3 if calls == "other sizes" else 1]:
        with torch.set_grad_enabled(calls == "training"):
            function(ids)
    model.branch.weight.mul_(2)
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    assert {name for name, value in model.named_parameters() if weakref.getweakrefs(value)} == set()


@pytest.mark.parametrize("name", sorted(CENTERED))
def test_swapped_by_hand(name: str) -> None:
    model = made()
    function = torch.compile(model, backend="lnfold")
    before = check(function, model)
    replacement = nn.Parameter(torch.randn_like(model.get_parameter(name)))
    torch.utils.swap_tensors(model.get_parameter(name), replacement)
    del replacement
    assert not torch.equal(check(function, model), before)


# --- none is mistaken for another ---


@pytest.mark.parametrize("name", ["table.weight", "branch.weight", "branch.bias"])
def test_another_parameter_in_the_same_place_on_the_same_storage(name: str) -> None:
    """A parameter is freed, its storage is not, and the next one has its address, its memory and its version."""
    model = made()
    function = torch.compile(model, backend="lnfold")
    before = check(function, model)
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    old = id(module._parameters[last]), module._parameters[last]._version
    data = module._parameters[last].data
    while data._version < old[1]:
        data.add_(0)
    module._parameters[last].mul_(1.5).add_(0.25)
    delattr(module, last)
    # Another object may have got the address meanwhile.
    held = [candidate := nn.Parameter(data)]
    while id(candidate) != old[0] and len(held) < 50_000:
        held.append(candidate := nn.Parameter(data))
    setattr(module, last, candidate)
    assert (id(candidate), candidate._version) == old, "the control: nothing else tells them apart"
    del data, held, candidate
    assert not torch.equal(check(function, model), before)


def test_a_state_ends_with_a_parameter_whose_storage_lives_on() -> None:
    ended: list[ParameterState] = []
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    data = second.data
    state = ParameterState((first, second), ended.append)
    assert state.living() == {id(first), id(second)}
    del second
    assert ended == [state]
    assert state.living() == {id(first)}
    assert data is not None


def test_attributes_that_somebody_copied_belong_to_the_original() -> None:
    first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    lifetime = parameter_identity.watch(first)
    second.__dict__.update(first.__dict__)
    other = parameter_identity.watch(second)
    assert other() is not lifetime()
    del first
    assert lifetime() is None
    assert other() is not None


def test_copies_and_pickles_have_no_part_in_a_lifetime() -> None:
    model = made()
    model.register_buffer("positions", torch.randn(8))
    originals = [*model.parameters(), *model.buffers()]
    references = [parameter_identity.watch(value) for value in originals]
    saved = io.BytesIO()
    torch.save(originals, saved)
    saved.seek(0)
    copies = [copy.deepcopy(model), torch.load(saved, weights_only=True)]
    for value in [*copies[0].parameters(), *copies[0].buffers(), *copies[1]]:
        assert parameter_identity.watch(value)() not in [reference() for reference in references]
    del model, originals, value
    gc.collect()
    assert all(reference() is None for reference in references)


def test_a_reference_by_place_finds_what_stands_there_and_one_by_object_that_object() -> None:
    layer = nn.Linear(2, 2)
    by_place, by_object = ParameterReference(layer.weight, Place(layer, "weight")), ParameterReference(layer.bias, None)
    bias, other = layer.bias, nn.Parameter(torch.randn(2, 2))
    layer.weight, layer.bias = other, nn.Parameter(torch.randn(2))
    assert by_place.identity() == id(other)
    assert by_object.identity() == id(bias)
    del bias
    assert by_object.identity() is None
    del layer
    assert by_place.identity() is None


@pytest.mark.parametrize("kind", ["method", "function", "in a list", "in a dictionary", "wrapped"])
def test_places(kind: str) -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"first": nn.Linear(4, 4)})
            self.loose = [nn.Parameter(torch.randn(4))]
            self.register_buffer("shift", torch.randn(4))

        def forward(self, value: Tensor) -> Tensor:
            return self.parts["first"](value) * self.loose[0] + self.shift

    model, found = Holder(), {}
    holders = {"in a list": [model], "in a dictionary": {"key": model}}
    chosen = holders.get(kind)

    def capture(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        for value, place in zip(example_inputs, parameter_identity.places_of(graph_module.graph), strict=True):
            found[id(value)] = place
        return graph_module.forward

    def call(value: Tensor) -> Tensor:
        return (chosen[0] if isinstance(chosen, list) else chosen["key"] if chosen else model)(value)

    value = torch.randn(3, 4)
    called = {"method": model.forward, "wrapped": torch.compiler.disable(recursive=False)(call)}.get(kind, call)
    torch.compile(called if kind != "wrapped" else call, backend=capture)(value)
    first = model.parts["first"]
    assert found[id(first.weight)] == (first, "weight")
    assert found[id(first.bias)] == (first, "bias")
    assert found[id(model.shift)] == (model, "shift")
    assert found[id(model.loose[0])] is None
    assert found[id(value)] is None
