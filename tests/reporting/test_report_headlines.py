"""What a report says first: the kind of model, norms outside of the graphs, gradients that keep norms from folding."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import DECODER, hf, randomise, text
from reported import IDS, D, model
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.decisions import REMEDIES, Reason
from lncompile.reporting.report import FoldReport, merge


def by_hand(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def by_product(x: Tensor) -> Tensor:
    return x / torch.sqrt(torch.mean(x * x, -1, keepdim=True))


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: functional.rms_norm(x, (D,)), 1),
        (lambda x: by_hand(by_product(x)), 2),
        (lambda x: torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1), 0),
        (lambda x: torch.rsqrt(x.pow(3).mean(-1, keepdim=True)), 0),
        (lambda x: x.pow(2).mean(-1), 0),
    ],
)
def test_rms_norms_are_counted(function: Callable[[Tensor], Tensor], count: int) -> None:
    report = lncompile.explain(function, torch.randn(3, D))
    assert (report.total, report.rms_norms) == (0, count)
    assert ("RMSNorm" in str(report)) == bool(count)


def test_llama_is_told_what_it_is() -> None:
    from architecture_rows import Model  # a row knows how its model is built
    from text_architectures import TEXT_DECODERS

    llama: Model = next(row for row in TEXT_DECODERS if row.name == "llama")
    report = lncompile.explain(llama.model(), **llama.inputs(torch.float64))
    assert report.rms_norms == 5
    assert str(report).startswith("No LayerNorm in the graph (5 RMSNorms, which subtract no mean)")


def test_a_post_norm_model_is_told_what_it_is(explained: dict[str, FoldReport]) -> None:
    assert explained["bert"].headline().startswith("This is a post-norm model: 4 of its 6 LayerNorms")
    assert str(explained["bert"]).startswith("This is a post-norm model")
    assert [explained[name].headline() for name in ("gpt2", "clip", "bloom")] == ["", "", ""]


class Outside(nn.Module):
    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)


class Parts(nn.Module):
    """Norms that are captured, run in eager, never called; with and without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.plain = nn.Linear(D, D), nn.LayerNorm(D), nn.LayerNorm(D, elementwise_affine=False)
        self.outside, self.never = Outside(), nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D)])
        self.idle = nn.LayerNorm(D, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x))
        x = self.outside(x)
        return self.plain(self.linear(x))


OUTSIDE = ("outside.norm", "never.0", "never.1", "idle")


def test_norms_in_no_graph_are_named(without_inductor: None) -> None:
    net, x = randomise(Parts()).eval(), torch.randn(3, D)
    compiled = torch.compile(net, backend="lnfold")
    compiled(x)
    explained = lncompile.explain(net, x)
    found = lncompile.reports(compiled)
    assert explained.norms_outside == found.norms_outside == found.merged().norms_outside == OUTSIDE
    (where,) = found.merged().graph_breaks
    assert where in explained.graph_breaks
    line = Path(__file__).read_text().splitlines().index("        x = self.outside(x)") + 1
    assert where.location == f"test_report_headlines.py:{line}"
    assert "torch.compiler.disable" in where.reason
    for report in (explained, found):
        words = " ".join(str(report).split())
        assert (
            "4 LayerNorm modules of the model are in no captured graph: outside.norm, never.0, never.1 and 1" in words
        )
        assert f"graph break at test_report_headlines.py:{line}: " in words


def test_a_model_that_is_captured_as_a_whole_has_none(explained: dict[str, FoldReport]) -> None:
    assert all(not report.norms_outside and not report.graph_breaks for report in explained.values())


def test_a_break_without_a_graph_in_front_of_it_is_named_too() -> None:
    report = lncompile.explain(nn.Sequential(Outside()), torch.randn(3, D))
    assert (report.total, report.norms_outside) == (0, ("0.norm",))
    assert any("torch.compiler.disable" in found.reason for found in report.graph_breaks)


@pytest.mark.parametrize("is_function", [False, True])
@pytest.mark.parametrize("training", ["auto", "off"])
def test_gradients_that_keep_norms_from_folding_are_the_first_line(
    training: str, is_function: bool, without_inductor: None
) -> None:
    net = model(layers=2)
    function = (lambda ids: net(ids)) if is_function else net
    compiled = torch.compile(function, backend="lnfold", options={"lnfold.training": training})
    with torch.enable_grad():
        compiled(IDS)
    report = merge(lncompile.reports(compiled))
    assert (report.folded, report.total, report.folded_without_gradients) == (0, 5, 5)
    assert str(lncompile.reports(compiled)).startswith("Wrap the call in torch.no_grad()")
    assert "5 of 5 LayerNorms fold, with them 0" in report.headline()
    with torch.enable_grad():
        assert lncompile.explain(compiled, IDS).headline() == report.headline()
    assert lncompile.explain(compiled, IDS).headline() == ""


def test_a_model_that_is_trained_is_not_told_so(without_inductor: None) -> None:
    net = model(layers=2).train()
    with torch.enable_grad():
        report = lncompile.explain(net, IDS)
        assert (report.folded, report.folded_without_gradients, report.headline()) == (0, None, "")
        assert {verdict.reason for verdict in report.sites} == {Reason.TRAINING}
        frozen = model(layers=2).requires_grad_(False)
        assert lncompile.explain(frozen, IDS).headline() == ""
        assert lncompile.explain(frozen, IDS).folded == 5
        wanted = torch.compile(net.eval(), backend="lnfold", options={"lnfold.training": "on"})
        assert lncompile.explain(wanted, IDS).headline() == ""


def test_what_stays_for_another_reason_is_not_blamed_on_gradients() -> None:
    bert = hf("BertModel", "BertConfig", **DECODER)().double().eval()
    with torch.enable_grad():
        report = lncompile.explain(bert, **text(torch.float64))
    left = [verdict for verdict in report.sites if verdict.reason is not Reason.TRAINING]
    assert left
    assert report.folded_without_gradients is None or report.folded_without_gradients <= report.total - len(left)


def test_every_remedy_says_what_to_do() -> None:
    assert REMEDIES.keys() == set(Reason)
    verbs = "put take use start make return let normalise write set to keep subtract report".split()
    for remedy in REMEDIES.values():
        assert remedy.split()[0] in verbs, remedy
        assert not re.search(r"\bis no\b|\bfor want of\b|\bnobody\b|\bwhoever\b|would fold with", remedy)
    assert REMEDIES[Reason.DIFFERENT_AXES] == "normalise over the axis that the layer before it produces"
