"""Every pass that can be switched off: what is left out then, and that outputs stay right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from architectures import randomise
from graphs import run_as_it_is
from torch import Tensor, fx, nn
from torch.nn import functional

import lncompile
import lncompile.nn
from lncompile import Reason
from lncompile.lowering import torch_private_inductor
from lncompile.options import OptionError, parse_options, parse_ours
from lncompile.passes.pipeline.graph_text import graph_text
from lncompile.passes.switches import SWITCHES
from lncompile.reporting.report import FoldReport
from lncompile.verification import relative_error

WIDTH = 12
#: What puts every pass to work.
EVERYTHING = {
    "lnfold.absorb_affine": "on",
    "lnfold.defer": "on",
    "lnfold.matrix_vector": "on",
    "lnfold.nonfoldable": "eager",
}


class Region(nn.Module):
    """A block that is compiled once, however often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    @torch.compiler.nested_compile_region
    def forward(self, value: Tensor) -> Tensor:
        return value + self.linear(self.norm(value))


class Everything(nn.Module):
    """A stream with something for each pass: a region, an opaque layer, norms by hand and folded before, one left.

    Of one row its products become sums; of several, scales are deferred.
    """

    def __init__(self) -> None:
        super().__init__()
        self.table, self.regions = nn.Embedding(19, WIDTH), nn.Sequential(Region(), Region())
        self.opaque = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True, norm_first=True)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)
        self.norm, self.last, self.stays = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.square, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 7)
        self.before = lncompile.nn.RMSNorm.in_place_of(nn.LayerNorm(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.opaque(self.regions(self.table(ids)))
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        centered = x - x.mean(-1, keepdim=True)
        x = x + self.down(functional.gelu(self.up(centered * torch.rsqrt(centered.square().mean(-1, True) + 1e-5))))
        x = self.last(x)
        squared = self.square(x)
        return self.head(x) + self.head(self.stays(torch.relu(squared))) + self.head(self.before(squared))


@dataclass(frozen=True)
class Compiled:
    """What became of the model.

    Attributes:
        report: of the compilation.
        code: the graph that Inductor was handed.
    """

    report: FoldReport
    code: str

    def lowered(self, way: str) -> int:
        """How many sites were lowered in a way."""
        return sum(site.lowering == way for site in self.report.sites)


def compiled_and_checked(
    monkeypatch: pytest.MonkeyPatch, rows: int, switched_off: Any = (), options: Mapping[str, Any] = EVERYTHING
) -> Compiled:
    """Compile the model with some passes off; its outputs are compared with eager's."""
    codes: list[str] = []

    def run(graph_module: fx.GraphModule, example_inputs: Any, config: Any) -> Callable[..., Any]:
        codes.append(graph_text(graph_module.graph))
        return run_as_it_is(graph_module, example_inputs, config)

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run)
    net = randomise(Everything()).double().eval()
    ids = torch.arange(rows)[None] % 19
    expected = net(ids)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="lnfold", options={**options, "lnfold.disable_passes": switched_off})
    assert relative_error(compiled(ids), expected) <= 1e-10
    (report,), (code,) = lncompile.reports(compiled), codes
    return Compiled(report, code)


# Of each pass: rows, how many norms of how many fold without it, and what can be seen where it is off and only there.
WITHOUT: dict[str, tuple[int, int, int, Callable[[Compiled], bool]]] = {
    "regions": (5, 6, 9, lambda made: "invoke_subgraph" in made.code),
    "expand": (5, 4, 9, lambda made: "_transformer_encoder_layer_fwd" in made.code),
    "gather": (5, 7, 8, lambda made: "rms_norm(" in made.code),
    "handwritten": (5, 7, 8, lambda made: "    mean = " in made.code),
    "obstacles": (5, 8, 9, lambda made: made.report.sites[-1].returned == ()),
    "center": (5, 1, 9, lambda made: made.report.sites[0].reason is Reason.SWITCHED_OFF),
    "absorb": (5, 8, 9, lambda made: not any(site.affine_absorbed_by for site in made.report.sites)),
    "defer": (5, 8, 9, lambda made: made.lowered("rms_norm_deferred") == 0),
    "matrix_vector": (1, 8, 9, lambda made: "torch.sum(" not in made.code),
    "lower": (5, 8, 9, lambda made: "functional.layer_norm" in made.code and made.lowered("layer_norm") > 1),
    "eager": (5, 8, 9, lambda made: "lncompile.layer_norm" not in made.code),
}


def test_every_switch_is_tested() -> None:
    assert WITHOUT.keys() == SWITCHES.keys()


@pytest.mark.parametrize("name", SWITCHES)
def test_outputs_stay_right_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, folded, sites, is_left_out = WITHOUT[name]
    made = compiled_and_checked(monkeypatch, rows, name)
    assert (made.report.folded, made.report.total) == (folded, sites)
    assert is_left_out(made)
    everything = compiled_and_checked(monkeypatch, rows)
    assert (everything.report.folded, everything.report.total) == (8, 9)
    assert not is_left_out(everything) or name == "obstacles", "the control: with it on that is not so"


@pytest.mark.parametrize("rows", [1, 5])
def test_outputs_stay_right_without_all_of_them(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled_and_checked(monkeypatch, rows, tuple(SWITCHES))
    assert made.report.folded == 0


def test_outputs_stay_right_without_any_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that rewrite folded norms, in pairs: none counts on another."""
    for pair in itertools.combinations(["handwritten", "absorb", "defer", "matrix_vector", "lower"], 2):
        made = compiled_and_checked(monkeypatch, 1, pair)
        assert made.report.folded == (7 if "handwritten" in pair else 8)


def test_obstacles_are_for_the_report_alone(monkeypatch: pytest.MonkeyPatch, without_inductor: None) -> None:
    """Without them a returned stream is said to be in the way, and not which tensors to leave out."""

    class Returned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.linear(x)
            return self.norm(x), x

    net, x = randomise(Returned()), torch.randn(3, 4)
    off = {"lnfold.disable_passes": "obstacles", "lnfold.assist": "off"}
    on, without = (
        lncompile.explain(torch.compile(net, backend="lnfold", options=options), x).sites[0]
        for options in ({"lnfold.assist": "off"}, off)
    )
    assert len(on.returned) == 1
    assert without.returned == ()
    assert on.reason is without.reason is Reason.GRAPH_OUTPUT


def test_the_environment_switches_passes_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LNCOMPILE_DISABLE_PASSES", "defer, absorb")
    assert parse_ours({"lnfold.disable_passes": ["lower"]}).disable_passes == ("lower", "defer", "absorb")
    made = compiled_and_checked(monkeypatch, 5)
    assert made.lowered("rms_norm_deferred") == 0
    assert not any(site.affine_absorbed_by for site in made.report.sites)
    monkeypatch.setenv("LNCOMPILE_DISABLE_PASSES", "hoist")
    message = (
        "the environment variable LNCOMPILE_DISABLE_PASSES: pass 'hoist' cannot be switched off: it takes centered"
    )
    with pytest.raises(OptionError, match=message):
        parse_options(None, None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "takes names of passes, in a tuple or in a string with commas between, not 3"),
        ("facts", "option 'lnfold.disable_passes': pass 'facts' cannot be switched off: it finds whose values"),
        ("deferral", r"there is no pass 'deferral' \(did you mean 'defer'\?\)"),
    ],
)
def test_what_cannot_be_switched_off(value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_options(None, {"lnfold.disable_passes": value})


def test_training_without_centering(without_inductor: None) -> None:
    """Gradients stay right, and nothing is centered."""
    net = randomise(nn.Sequential(nn.Embedding(19, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))).double()
    ids = torch.arange(5)[None]
    for off, folded in (("", 1), ("center", 0)):
        torch._dynamo.reset()
        options = {"lnfold.training": "on", "lnfold.disable_passes": off}
        compiled = torch.compile(net, backend="lnfold", options=options)
        with torch.enable_grad():
            (actual,) = torch.autograd.grad(compiled(ids).pow(3).sum(), net[1].weight)
            (expected,) = torch.autograd.grad(net(ids).pow(3).sum(), net[1].weight)
        assert relative_error(actual, expected) <= 1e-10
        assert [report.folded for report in lncompile.reports(compiled)] == [folded]
