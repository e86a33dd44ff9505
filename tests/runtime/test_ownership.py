"""Which parameters may be overwritten with their centered weight: only those that nobody reads in another way."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile
from lncompile.runtime import in_place

pytestmark = pytest.mark.usefixtures("without_inductor")

IN_PLACE = {"lnfold.weights": "inplace"}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.arange(10).reshape(2, 5)


class Stream(nn.Module):
    """An embedding and a residual branch in front of two norms, and a head: three parameters are centered."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.branch = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.final, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return stream if hidden else self.head(self.final(stream))


CENTERED = {"table.weight", "branch.weight", "branch.bias"}


def made(kind: Callable[[], nn.Module] = Stream) -> Any:
    return randomise(kind().double()).eval()


def compiled(model: nn.Module | Callable[..., Tensor]) -> Any:
    return torch.compile(model, backend="lnfold", options=IN_PLACE)


def storage_of(function: Any) -> dict[str, str]:
    """Where each centered weight is, by its name; for copies the reason."""
    (report,) = lncompile.reports(function)
    return {weight.name: weight.detail or weight.storage for weight in report.weights}


def check(model: nn.Module, function: Any = None, *args: Any) -> dict[str, str]:
    """Compare with eager, computed before and after; return where the weights are."""
    function = compiled(model) if function is None else function
    expected = model(*(args or (IDS,)))
    torch.testing.assert_close(function(*(args or (IDS,))), expected, **TOLERANCE)
    torch.testing.assert_close(function(*(args or (IDS,))), expected, **TOLERANCE)
    torch.testing.assert_close(model(*(args or (IDS,))), expected, **TOLERANCE)
    return storage_of(function)


def test_what_only_norms_see_is_overwritten() -> None:
    model = made()
    before = copy.deepcopy(model.state_dict())
    assert check(model) == dict.fromkeys(CENTERED, "inplace")
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])} == CENTERED
    for weight, along in ((model.table.weight, 1), (model.branch.weight, 0), (model.branch.bias, 0)):
        assert weight.mean(along).abs().max() < 1e-15 < 1e-2 < before["table.weight"].mean(1).abs().max()


def test_explain_says_what_would_be_overwritten_and_touches_nothing() -> None:
    model = made()
    before, versions = copy.deepcopy(model.state_dict()), [p._version for p in model.parameters()]
    report = lncompile.explain(compiled(model), IDS)
    assert {weight.name: weight.storage for weight in report.weights} == dict.fromkeys(CENTERED, "inplace")
    assert versions == [p._version for p in model.parameters()]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    function = compiled(model)
    function(IDS)
    assert set(lncompile.reports(function)[0].weights) == set(report.weights)


def test_one_layer_called_twice_in_front_of_norms() -> None:
    class Twice(Stream):
        def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
            stream = self.table(ids)
            for _ in range(2):
                stream = stream + self.branch(torch.relu(self.norm(stream)))
            return self.head(self.final(stream))

    assert check(made(Twice)) == dict.fromkeys(CENTERED, "inplace")


# --- in the graph ---


def test_a_tied_head() -> None:
    model = made()
    model.head.weight = model.table.weight
    found = check(model)
    assert "uncentered" in found.pop("table.weight")
    assert found == dict.fromkeys(CENTERED - {"table.weight"}, "inplace")


def test_a_layer_that_something_else_sees_as_well() -> None:
    class Seen(Stream):
        def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
            stream = self.table(ids)
            normed = torch.relu(self.norm(stream))
            return self.head(self.final(stream + self.branch(normed))) + self.branch(normed).square().sum()

    found = check(made(Seen))
    assert found.pop("table.weight") == "inplace"
    assert all("uncentered" in words for words in found.values())
    assert set(found) == {"branch.weight", "branch.bias"}


def test_a_scaled_layer_and_a_buffer_get_copies() -> None:
    class Scaled(Stream):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(8))
            self.register_buffer("positions", torch.randn(5, 8))

        def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
            stream = self.table(ids) + self.positions
            return self.head(self.final(stream + self.scale * self.branch(torch.relu(self.norm(stream)))))

    found = check(made(Scaled))
    assert found.pop("positions") == "it is a buffer"
    assert found.pop("table.weight") == "inplace"
    assert all("computed from parameters" in words for words in found.values())
    assert len(found) == 2


def test_centered_along_two_sets_of_axes() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.heads = nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(4)

        def forward(self, value: Tensor) -> Tensor:
            made = self.layer(value)
            return self.norm(made) + self.heads(self.layer(value * 2).unflatten(-1, (2, 4))).flatten(-2)

    found = check(made(Both), None, torch.randn(3, 8, dtype=torch.float64))
    assert len(found) >= 2
    assert all("several ways" in words for words in found.values())


# --- other tensors on the storage ---


def test_other_tensors_on_the_storage() -> None:
    model = made()
    kept = [model.table.weight[:3], model.branch.weight.detach().numpy()]
    found = check(model)
    assert found.pop("branch.bias") == "inplace"
    assert all("another tensor" in words for words in found.values())
    del kept
    torch._dynamo.reset()
    assert set(check(model).values()) == {"inplace"}


def test_a_state_dict_that_is_kept() -> None:
    model = made()
    state = model.state_dict()
    assert all("state_dict" in words for words in check(model).values())
    del state


def test_tied_through_data() -> None:
    model = made()
    model.head.weight = nn.Parameter(model.table.weight.data)
    assert "another tensor" in check(model)["table.weight"]


def test_a_part_of_a_larger_storage() -> None:
    model = made()
    flat = torch.cat([model.branch.weight.detach().flatten(), model.branch.bias.detach()])
    model.branch.weight = nn.Parameter(flat[:64].view(8, 8))
    model.branch.bias = nn.Parameter(flat[64:])
    del flat
    found = check(model)
    assert found.pop("table.weight") == "inplace"
    assert all("larger storage" in words for words in found.values())


def test_memory_shared_with_other_processes() -> None:
    model = made().share_memory()
    assert all("other processes" in words for words in check(model).values())


# --- other modules and other parts of the model ---


def test_held_by_another_model() -> None:
    model, other = made(), made()
    other.branch.weight = model.branch.weight
    found = check(model)
    assert "several modules hold it" in found.pop("branch.weight")
    assert set(found.values()) == {"inplace"}


def test_a_layer_that_another_model_holds() -> None:
    model, other = made(), made()
    other.branch = model.branch
    found = check(model)
    assert found.pop("table.weight") == "inplace"
    assert all("another module" in words for words in found.values())


class Whole(nn.Module):
    """A model whose other half reads a weight of the first as it is, behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = Stream()
        self.breaks = False

    def forward(self, ids: Tensor) -> Tensor:
        value = self.stream(ids)
        if self.breaks:
            torch._dynamo.graph_break()
        return value @ self.stream.table.weight


def test_a_graph_break_behind_which_a_weight_is_read_as_it_is() -> None:
    model = made(Whole)
    model.breaks = True
    before = copy.deepcopy(model.state_dict())
    function = compiled(model)
    expected = model(IDS)
    for _ in range(2):
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    details = [weight.detail for report in lncompile.reports(function) for weight in report.weights]
    assert len(details) == 3
    assert all("graph break" in words for words in details)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    found = check(made(Whole))
    assert "uncentered" in found.pop("stream.table.weight")
    assert set(found.values()) == {"inplace"}, "the control: in one graph it is known"


def test_a_part_that_was_not_compiled_by_itself() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stream = Stream()

        @torch.compiler.disable(recursive=False)
        def forward(self, ids: Tensor) -> Tensor:
            return self.stream(ids)

    model = made(Outer)
    function = compiled(model)
    expected = model(IDS)
    torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    details = [weight.detail for report in lncompile.reports(function) for weight in report.weights]
    assert len(details) == 3
    assert all("only a part of its model" in words for words in details)


def test_a_function_and_a_method() -> None:
    class WithMethod(Stream):
        def other(self, ids: Tensor) -> Tensor:
            return super().forward(ids)

    model = made(WithMethod)
    for function, words in (
        (compiled(lambda ids: model(ids)), "is not a module"),
        (compiled(model.other), "only a part of its model"),
    ):
        expected = model(IDS)
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        details = [weight.detail for report in lncompile.reports(function) for weight in report.weights]
        assert details
        assert all(words in detail for detail in details)


def test_frozen_objects_cannot_be_asked() -> None:
    model = made()
    gc.freeze()
    try:
        assert all("gc.freeze()" in words for words in check(model).values())
    finally:
        gc.unfreeze()


# --- other graphs ---


def test_a_graph_that_reads_them_as_they_are_and_was_there_before() -> None:
    model = made()
    function = compiled(model)
    expected = model(IDS), model(IDS, True)
    torch.testing.assert_close(function(IDS, True), expected[1], **TOLERANCE)
    torch.testing.assert_close(function(IDS), expected[0], **TOLERANCE)
    torch.testing.assert_close(function(IDS, True), expected[1], **TOLERANCE)
    details = [weight.detail for report in lncompile.reports(function) for weight in report.weights]
    assert len(details) == 3
    assert all("another compiled graph" in words for words in details)


@pytest.mark.parametrize("options", [IN_PLACE, {}])
def test_a_graph_that_reads_them_as_they_are_and_comes_later(options: dict[str, str]) -> None:
    model = made()
    expected = model(IDS), model(IDS, True)
    function = compiled(model)
    assert set(check(model, function).values()) == {"inplace"}
    assert (model(IDS, True) - expected[1]).abs().max() > 1e-2, "the control: in eager the shift is visible"
    later = torch.compile(model, backend="lnfold", options=options)
    for _ in range(2):
        torch.testing.assert_close(later(IDS, True), expected[1], **TOLERANCE)
        torch.testing.assert_close(model(IDS, True), expected[1], **TOLERANCE)
        torch.testing.assert_close(function(IDS), expected[0], **TOLERANCE)


def test_a_graph_without_norms_that_reads_them_as_they_are() -> None:
    model = made()
    expected = model(IDS)
    function = compiled(model)
    function(IDS)
    table = compiled(model.table)
    torch.testing.assert_close(table(IDS), model.table.weight[IDS], **TOLERANCE)
    assert in_place.written(model.table.weight) is None
    assert in_place.written(model.branch.weight) is not None
    torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    assert in_place.written(model.table.weight) is None


def test_the_same_use_in_a_second_graph() -> None:
    model = made()
    function = compiled(model)
    expected = model(IDS)
    function(IDS)
    versions = [parameter._version for parameter in model.parameters()]
    torch.testing.assert_close(function(IDS[:1, :3]), expected[:1, :3], **TOLERANCE)
    other = torch.compile(model, backend="lnfold", options={"lnfold.assist": "off"})
    torch.testing.assert_close(other(IDS), expected, **TOLERANCE)
    assert versions == [parameter._version for parameter in model.parameters()]
    assert {weight.storage for weight in lncompile.reports(other)[0].weights} == {"inplace"}


@pytest.mark.parametrize("restored", [False, True])
def test_a_head_that_is_tied_later(restored: bool) -> None:
    model = made()
    table = model.table.weight.detach().clone()
    function = compiled(model)
    check(model, function)
    if restored:
        lncompile.restore(model)
    model.head.weight = model.table.weight
    for _ in range(3):
        expected = model(IDS)
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
        values = table if restored else model.table.weight.detach().clone()
        torch.testing.assert_close(model.table.weight.detach(), values, **TOLERANCE)
        table = table * 1.5 + 0.25
        model.table.weight.mul_(1.5).add_(0.25)  # from now on it is not overwritten: two modules hold it


def test_a_layer_that_another_model_gets_later() -> None:
    model, other = made(), made()
    function = compiled(model)
    check(model, function)
    other.branch = model.branch
    model.branch.weight.add_(torch.arange(8))
    values = model.branch.weight.detach().clone()
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    assert torch.equal(model.branch.weight, values)


def test_blocks_of_one_compiled_graph_each_in_place() -> None:
    blocks = nn.ModuleList([made() for _ in range(3)])
    for number, block in enumerate(blocks):
        randomise(block, seed=number)
    expected = [block(IDS) for block in blocks]
    for block in blocks:
        block.compile(backend="lnfold", options=IN_PLACE)
    for _ in range(2):
        for block, wanted in zip(blocks, expected, strict=True):
            torch.testing.assert_close(block(IDS), wanted, **TOLERANCE)
    assert len({id(report) for block in blocks for report in lncompile.reports(block)}) == 1, "Dynamo made one graph"
    for block in blocks:
        written = {name for name, value in block.named_parameters() if in_place.written(value) is not None}
        assert written == CENTERED


def test_blocks_of_one_compiled_graph_of_which_one_is_held_elsewhere() -> None:
    blocks = nn.ModuleList([made() for _ in range(3)])
    for number, block in enumerate(blocks):
        randomise(block, seed=number)
    other = nn.ModuleList([blocks[1].branch])
    expected = [block(IDS) for block in blocks]
    for block in blocks:
        block.compile(backend="lnfold", options=IN_PLACE)
    for _ in range(2):
        for block, wanted in zip(blocks, expected, strict=True):
            torch.testing.assert_close(block(IDS), wanted, **TOLERANCE)
    written = [sum(in_place.written(value) is not None for value in block.parameters()) for block in blocks]
    assert written == [3, 1, 3]
    del other
