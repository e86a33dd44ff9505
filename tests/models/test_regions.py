"""Models compiled in parts: block by block, as regions, with graph breaks. What is folded as a whole stays folded."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hand_folded import IDS, MODELS, Block, Decoder
from torch import Tensor, nn

import lncompile
from lncompile import Reason

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
LINE = "model = lncompile.fold(model, *args)"


class Region(Block):
    """A block that is a region of its own: compiled once, called often."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Broken(Decoder):
    """Graph breaks between blocks."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        x = self.blocks[0](x)
        torch._dynamo.graph_break()
        x = self.blocks[1](x)
        torch._dynamo.graph_break()
        return self.head(self.norm(self.blocks[2](x)))


class BrokenInALoop(Decoder):
    """A graph break in a loop: Dynamo leaves this code to Python, and compiles the modules that it calls."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            torch._dynamo.graph_break()
            x = block(x)
        return self.head(self.norm(x))


def block_by_block(model: nn.Module, backend: str) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


def repeated_blocks(model: nn.Module, backend: str) -> nn.Module:
    model._repeated_blocks = ["Block"]
    pytest.importorskip("diffusers").ModelMixin.compile_repeated_blocks(model, backend=backend)
    return model


def regional_compilation(model: nn.Module, backend: str) -> nn.Module:
    return pytest.importorskip("accelerate.utils").compile_regions(model, backend=backend)


def nested_regions(model: nn.Module, backend: str) -> nn.Module:
    for block in model.blocks:
        block.__class__ = Region
    return torch.compile(model, backend=backend)


def graph_breaks(model: nn.Module, backend: str) -> nn.Module:
    model.__class__ = Broken
    return torch.compile(model, backend=backend)


def graph_breaks_in_a_loop(model: nn.Module, backend: str) -> nn.Module:
    model.__class__ = BrokenInALoop
    return torch.compile(model, backend=backend)


#: How a model is compiled, and how many norms its graphs have. Equal blocks share a graph, and one outside is eager's.
WAYS: dict[str, tuple[Callable[[nn.Module, str], nn.Module], int]] = {
    "block_by_block": (block_by_block, 2),
    "repeated_blocks": (repeated_blocks, 2),
    "regional_compilation": (regional_compilation, 3),
    "nested_regions": (nested_regions, 7),
    "graph_breaks": (graph_breaks, 7),
    "graph_breaks_in_a_loop": (graph_breaks_in_a_loop, 3),
}


def reports_of(model: nn.Module) -> list[lncompile.FoldReport]:
    """The reports of all graphs that hold parts of a model, each graph once."""
    return list(lncompile.reports(getattr(model, "_orig_mod", model)))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["decoder", "tied_decoder"])
@pytest.mark.usefixtures("without_inductor")
def test_a_folded_model_is_folded_in_every_part(way: str, name: str) -> None:
    case = MODELS[name]
    model, folded = case.models()
    expected = model(IDS)
    compile_parts, sites = WAYS[way]
    compiled = compile_parts(folded, "lnfold")
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)
    found = [site for report in reports_of(compiled) for site in report.sites]
    assert (len(found), sum(site.folded for site in found)) == (sites, sites)
    assert all(site.folded_before for site in found)


@pytest.mark.parametrize("way", WAYS)
def test_by_stock(way: str) -> None:
    model, folded = MODELS["decoder"].models()
    compiled = WAYS[way][0](folded, "aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)


@pytest.mark.parametrize("way", ["block_by_block", "nested_regions"])
@pytest.mark.parametrize("backend", ["inductor", "lnfold"])
def test_with_generated_code(way: str, backend: str) -> None:
    model, folded = MODELS["decoder"].models()
    compiled = WAYS[way][0](folded, backend)
    torch.testing.assert_close(compiled(IDS), model(IDS), **TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("without_inductor")
def test_the_control_a_model_that_is_not_folded_cannot_be_folded_in_parts(way: str) -> None:
    model, _ = MODELS["decoder"].models()
    expected = model(IDS)
    compile_parts, sites = WAYS[way]
    compiled = compile_parts(copy.deepcopy(model), "lnfold")
    torch.testing.assert_close(compiled(IDS), expected, **TOLERANCE)
    found = [site for report in reports_of(compiled) for site in report.sites]
    # A module of torch's own that is called from Python is not compiled: the last norm.
    assert len(found) == (2 if way == "graph_breaks_in_a_loop" else sites)
    if way == "nested_regions":  # these are written out
        assert all(site.folded for site in found)
        return
    assert not any(site.folded_before for site in found)
    left = [site for site in found if not site.folded]
    assert len(left) >= 2
    for site in left:
        assert site.reason in (Reason.USER_TENSOR, Reason.GRAPH_OUTPUT)
        assert LINE in site.remedy


@pytest.mark.usefixtures("without_inductor")
def test_a_region_of_folded_norms_stays_closed() -> None:
    """It is there to be compiled once; with it closed the graph has no norm but the last."""
    _, folded = MODELS["decoder"].models()
    compiled = nested_regions(folded, "lnfold")
    compiled(IDS)
    (report,) = reports_of(compiled)
    assert (report.total, report.folded) == (7, 7)
