"""Graphs inside of the graph: regions that are compiled once, branches, checkpointed parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import lncompile
from lncompile.lowering import torch_private, torch_private_inductor

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
WIDTH = 8

region = torch.compiler.nested_compile_region


class Block(nn.Module):
    """A residual block in front of which there is a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def compute(self, value: Tensor) -> Tensor:
        return value + self.linear(torch.relu(self.norm(value)))

    @region
    def forward(self, value: Tensor) -> Tensor:
        return self.compute(value)


class Stack(nn.Module):
    """An embedding, equal blocks, a last norm and a head."""

    def __init__(self, kind: Callable[[], nn.Module] = Block, blocks: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(kind() for _ in range(blocks))
        self.final, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 5)

    def stream(self, ids: Tensor) -> Tensor:
        value = self.table(ids)
        for block in self.blocks:
            value = block(value)
        return value

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.final(self.stream(ids)))


class Returned(Stack):
    """The negative control: the caller sees the stream."""

    def forward(self, ids: Tensor) -> Any:
        value = self.stream(ids)
        return self.head(self.final(value)), value


IDS = torch.arange(10).reshape(2, 5)


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that Inductor got, run as they are."""
    graphs: list[fx.GraphModule] = []

    def run(graph_module: fx.GraphModule, example_inputs: Any, config: Any) -> Callable[..., Any]:
        graph_module.graph.lint()
        graphs.append(graph_module)
        return graph_module.forward

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run)
    return graphs


def operators(graphs: list[fx.GraphModule]) -> list[str]:
    """Names of the operators that run graphs, in the graphs that Inductor got."""
    higher = torch_private.HigherOrderOperator
    nodes = [node for graph in graphs for node in graph.graph.nodes if isinstance(node.target, higher)]
    return [node.target.name() for node in nodes]


def check(model: nn.Module, folded: int, total: int, *inputs: Any, **options: Any) -> lncompile.FoldReport:
    """Compare with eager, for each of the inputs; returns the report of the last graph."""
    function = torch.compile(model, backend="lnfold", fullgraph=True, **options)
    for value in inputs or (IDS,):
        torch.testing.assert_close(function(value), model(value), **TOLERANCE)
    reports = lncompile.reports(function)
    assert {(report.folded, report.total) for report in reports} == {(folded, total)}, reports[-1]
    return reports[-1]


def made(kind: Callable[[], nn.Module]) -> Any:
    return randomise(kind().double()).eval()


# --- regions ---


def test_each_call_of_a_region_folds_with_its_own_weights(handed_over: list[fx.GraphModule]) -> None:
    report = check(made(Stack), 4, 4)
    assert [site.name for site in report.sites] == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "final"]
    weights = {"table.weight"} | {f"blocks.{n}.linear.{part}" for n in range(3) for part in ("weight", "bias")}
    assert {weight.name for weight in report.weights} == weights
    assert operators(handed_over) == []


def test_through_inductor_and_after_updates() -> None:
    model = made(Stack)
    function = torch.compile(model, backend="lnfold", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
        for parameter in model.parameters():
            parameter.mul_(1.25).add_(0.1)
    assert [report.folded for report in lncompile.reports(function)] == [4]


def test_where_nothing_folds_regions_stay(handed_over: list[fx.GraphModule]) -> None:
    model = made(Returned)
    function = torch.compile(model, backend="lnfold", fullgraph=True, options={"lnfold.assist": "off"})
    torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)
    (report,) = lncompile.reports(function)
    assert [site.name for site in report.sites] == ["blocks.0.norm", "blocks.1.norm", "blocks.2.norm", "final"]
    assert {site.reason for site in report.sites} == {lncompile.Reason.GRAPH_OUTPUT}
    assert operators(handed_over) == ["invoke_subgraph"] * 3


class Mixed(Stack):
    """Two streams: the caller sees one of them, and a region of each is called."""

    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.other = nn.Embedding(11, WIDTH)

    def forward(self, ids: Tensor) -> Any:
        seen = self.blocks[0](self.other(ids))
        return self.head(self.final(self.blocks[1](self.table(ids)))), seen


def test_only_the_calls_that_have_a_part_are_written_out(handed_over: list[fx.GraphModule]) -> None:
    report = check(made(Mixed), 2, 3, options={"lnfold.assist": "off"})
    assert operators(handed_over) == ["invoke_subgraph"]
    assert {site.name: site.folded for site in report.sites} == {
        "blocks.0.norm": False,
        "blocks.1.norm": True,
        "final": True,
    }


class WithoutNorm(Block):
    @region
    def forward(self, value: Tensor) -> Tensor:
        return value + self.linear(torch.ones_like(value))


def test_a_stream_goes_through_regions_without_norms(handed_over: list[fx.GraphModule]) -> None:
    check(made(lambda: Stack(WithoutNorm)), 1, 1)
    assert operators(handed_over) == []


class Scaled(Block):
    """With a constant and a dynamic size as operands."""

    @region
    def scaled(self, value: Tensor, factor: float, length: int) -> Tensor:
        return self.compute(value * factor).narrow(1, 0, length - 1)

    def forward(self, value: Tensor) -> Tensor:
        return self.scaled(value, 0.5, value.shape[1])


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [Block, Scaled])
def test_sizes(handed_over: list[fx.GraphModule], kind: type[Block], dynamic: bool) -> None:
    inputs = (IDS, IDS[:1], torch.arange(24).reshape(4, 6) % 11) if dynamic else (IDS,)
    check(made(lambda: Stack(kind)), 4, 4, *inputs, dynamic=dynamic)


class Nested(nn.Module):
    """A region of two regions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    @region
    def forward(self, value: Tensor) -> Tensor:
        return self.second(self.first(value) * 0.5)


def test_regions_in_regions(handed_over: list[fx.GraphModule]) -> None:
    report = check(made(lambda: Stack(Nested, 2)), 5, 5)
    assert operators(handed_over) == []
    names = [f"blocks.{n}.{part}.norm" for n in range(2) for part in ("first", "second")]
    assert [site.name for site in report.sites if site.name != "final"] == names


class Several(Block):
    """Several results, one of which is what the region was given."""

    @region
    def forward(self, value: Tensor) -> Tensor:
        return self.parts(value)

    def parts(self, value: Tensor) -> Any:
        return self.linear(torch.relu(self.norm(value))), self.linear(torch.relu(value))


class Adding(Stack):
    def stream(self, ids: Tensor) -> Tensor:
        value = self.table(ids)
        for block in self.blocks:
            more, _ = block(value)
            value = value + more
        return value


def test_several_results_of_which_one_notices(handed_over: list[fx.GraphModule]) -> None:
    check(made(lambda: Adding(Several)), 0, 4, options={"lnfold.assist": "off"})
    assert operators(handed_over) == ["invoke_subgraph"] * 3


class Writing(Block):
    """A region that writes into what it is given."""

    @region
    def forward(self, value: Tensor) -> Tensor:
        value.mul_(0.5)
        return self.compute(value)


class Copied(Stack):
    def forward(self, ids: Tensor) -> Any:
        value = self.table(ids)
        before = value.clone()
        value = self.blocks[0](value)
        return self.head(self.final(value)) + self.head(torch.relu(before))


def test_a_region_that_writes_to_its_input() -> None:
    model = made(lambda: Copied(Writing, 1))
    function = torch.compile(model, backend="lnfold")
    expected = model(IDS)
    torch.testing.assert_close(function(IDS), expected, **TOLERANCE)
    model.blocks[0].forward = model.blocks[0].compute
    assert (model(IDS) - expected).abs().max() > 1e-3, "the control: it is another function"


class Deciding(Block):
    """A region whose sizes the data decides."""

    @region
    def forward(self, value: Tensor) -> Tensor:
        return self.compute(value[value[:, 0, 0] > -100])


@pytest.mark.usefixtures("handed_over")
def test_sizes_that_the_data_decides_keep_a_region() -> None:
    model = made(lambda: Stack(Deciding, 1))
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        function = torch.compile(model, backend="lnfold")
        torch.testing.assert_close(function(IDS), model(IDS), **TOLERANCE)


def test_gradients_through_regions() -> None:
    """Where all of them are written out: torch 2.13 computes wrong gradients through regions of its own."""
    model = made(Stack)
    function = torch.compile(model, backend="lnfold", fullgraph=True, options={"lnfold.training": "on"})
    with torch.enable_grad():
        gradients = [
            torch.autograd.grad(call(IDS).square().sum(), list(model.parameters())) for call in (function, model)
        ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert [report.folded for report in lncompile.reports(function)] == [4]


# --- branches ---


class Branching(nn.Module):
    """A norm in front of a condition, one in a branch, and one behind."""

    def __init__(self, reads_the_stream: bool = False) -> None:
        super().__init__()
        self.inner, self.yes, self.no = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.first, self.inside, self.last = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.reads_the_stream = reads_the_stream

    def forward(self, value: Tensor) -> Tensor:
        stream = self.inner(value)
        normed = self.first(stream)
        given = stream if self.reads_the_stream else normed
        chosen = torch.cond(
            value.sum() > 0, lambda x: self.inside(self.yes(x)), lambda x: torch.relu(self.no(x)), (given,)
        )
        return self.last(stream + self.yes(chosen))


@pytest.mark.usefixtures("without_inductor")
@pytest.mark.parametrize(("reads_the_stream", "folded"), [(False, 2), (True, 0)])
def test_a_condition(reads_the_stream: bool, folded: int) -> None:
    value = torch.randn(3, WIDTH, dtype=torch.float64)
    value = value - value.mean() + 0.1
    model = made(lambda: Branching(reads_the_stream))
    report = check(model, folded, 3, value, -value, options={"lnfold.assist": "off"})
    (inside,) = [site for site in report.sites if "cond" in site.detail and "not followed" in site.detail]
    assert inside.reason is lncompile.Reason.UNKNOWN_OPERATION


# --- checkpointed parts ---


class Checkpointed(Stack):
    def __init__(self) -> None:
        super().__init__(blocks=2)
        self.early = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Any:
        value = self.early(self.table(ids))
        for block in self.blocks:
            value = checkpoint(block.compute, value, use_reentrant=False)
        return self.head(self.final(self.blocks[0].linear(value)))


@pytest.mark.parametrize("inference", [False, True])
def test_checkpointed_parts_stay_and_norms_around_them_fold(inference: bool, handed_over: list[fx.GraphModule]) -> None:
    model = made(Checkpointed)
    report = check(model, 2, 4)
    assert [site.name for site in report.sites if site.folded] == ["early", "final"]
    assert operators(handed_over) == ["tag_activation_checkpoint"] * 2
    if inference:
        return
    function = torch.compile(model, backend="lnfold", fullgraph=True, options={"lnfold.training": "on"})
    with torch.enable_grad():
        gradients = [
            torch.autograd.grad(call(IDS).square().sum(), list(model.parameters())) for call in (function, model)
        ]
    torch.testing.assert_close(*gradients, **TOLERANCE)
    assert operators(handed_over[1:]) == ["tag_activation_checkpoint"] * 2
