"""What people read of a report: lines that stand for many sites, any width, a notebook, and why there is none."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, DECODER, hf, randomise, text
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.decisions import REMEDIES, GraphBreak, Reason, Verdict
from lncompile.reporting import lines as report_lines
from lncompile.reporting.model_reports import Reports
from lncompile.reporting.report import FoldReport, merge

D = 16


class Block(nn.Module):
    """A pre-norm layer; ``shows`` makes its second stream visible to an activation."""

    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = nn.Linear(D, D), nn.Linear(D, D)
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out = self.mlp(self.ln_2(x))
        return self.mlp(functional.relu(x)) + out if self.shows else x + out


class Decoder(nn.Module):
    def __init__(self, layers: int = 12, shows: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, D)
        self.h = nn.ModuleList(Block(index == shows) for index in range(layers))
        self.ln_f = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.h:
            x = block(x)
        return self.ln_f(x).sum(-1)


ABSORBED = "; γ and β absorbed by h.0-11.{}.weight: moves 256 bytes less a call, keeps 0 bytes of weights more"
IDS = torch.tensor([[1, 5, 3]])


def model(**arguments: int) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Decoder(**arguments).double()).eval()


def site(name: str, *, location: str = "model.py:7", reason: Reason | None = None, detail: str = "") -> Verdict:
    detail = detail or ("centered in 2 parameters" if reason is None else "the stream is also read by 'linear'")
    return Verdict(name, location, reason is None, "layer_norm" if reason else "rms_norm", reason, detail, ())


def said(lines: list[report_lines.Line]) -> list[tuple[str, str, str]]:
    return [(line.name, line.count, line.why) for line in lines]


# --- Lines that stand for many sites ---------------------------------------------------------------------------------


def test_a_model_takes_a_line_for_each_kind() -> None:
    report = lncompile.explain(model(), IDS)
    assert (report.folded, report.total) == (25, 25)
    assert said(report_lines.merged(report.sites)) == [
        ("h.0-11.ln_1", "12 of 12", "centered in 1 to 45 parameters" + ABSORBED.format("attn")),
        ("h.0-11.ln_2", "12 of 12", "centered in 3 to 47 parameters" + ABSORBED.format("mlp")),
        ("ln_f", "", "centered in 49 parameters"),
    ]
    assert len(report.table(full=True).splitlines()) > 25 > len(str(report).splitlines())
    assert len(report.to_dict()["sites"]) == 25
    for verdict in report.sites:
        assert verdict.name in report.table(full=True)


def test_an_exception_has_a_line_of_its_own_and_says_why() -> None:
    report = lncompile.explain(model(shows=3), IDS)
    assert report.total - report.folded == 5 * 2 - 2
    lines = report_lines.merged(report.sites)
    left = [line for line in lines if not line.folded]
    assert sum(len(line.sites) for line in lines) == 25
    assert {line.name for line in left} == {"h.0-3.ln_1", "h.0-3.ln_2"}
    assert all(line.count == "4 of 12" and "relu (h.3, test_reports.py:" in line.why for line in left)
    assert {line.name for line in lines if line.folded} == {"h.4-11.ln_1", "h.4-11.ln_2", "ln_f"}


def test_one_of_many_that_stays_is_said_in_full() -> None:
    sites = [site(f"h.{i}.ln", reason=Reason.VISIBLE if i == 3 else None) for i in range(12)]
    assert said(report_lines.merged(sites)) == [
        ("h.0-2,4-11.ln", "11 of 12", "centered in 2 parameters"),
        ("h.3.ln", "", "visible: the stream is also read by 'linear'"),
    ]


@pytest.mark.parametrize(
    ("others", "kinds"),
    [
        ([site("h.1.ln", location="model.py:8")], 2),
        ([site("h.1.ln", reason=Reason.VISIBLE)], 2),
        ([site("h.1.ln", detail="centered at run time after embedding")], 2),
        ([site("g.1.ln")], 2),
        ([site("h.1.ln_2")], 2),
        ([site("h.1.ln", detail="centered in 4 parameters")], 1),
        ([site("h.1.ln"), site("h.7.ln")], 1),
    ],
)
def test_what_is_of_another_kind_is_not_put_together(others: list[Verdict], kinds: int) -> None:
    lines = report_lines.merged([site("h.0.ln"), *others])
    assert len(lines) == kinds
    assert sum(len(line.sites) for line in lines) == 1 + len(others)


def test_a_line_of_the_source_is_not_a_number_that_may_differ() -> None:
    details = ["add (h.0, model.py:10)", "add (h.1, model.py:10)", "add (h.2, model.py:11)"]
    sites = [site(f"h.{i}.ln", reason=Reason.VISIBLE, detail=detail) for i, detail in enumerate(details)]
    assert [line.why for line in report_lines.merged(sites)] == [
        "visible: add (h.0-1, model.py:10)",
        "visible: add (h.2, model.py:11)",
    ]


def test_ranges_name_no_site_that_is_not_there() -> None:
    names = [f"stages.{i}.blocks.{j}.norm" for i, count in enumerate((2, 2, 6)) for j in range(count)]
    lines = report_lines.merged([site(name) for name in names])
    assert [(line.name, line.count) for line in lines] == [
        ("stages.0-1.blocks.0-1.norm", "4 of 10"),
        ("stages.2.blocks.0-5.norm", "6 of 10"),
    ]


def test_many_gaps_are_counted_and_not_listed() -> None:
    (line,) = report_lines.merged([site(f"h.{i}.ln") for i in range(0, 20, 2)])
    assert (line.name, line.count) == ("h.0-18.ln", "10 of 10")


def test_calls_of_functions_are_told_apart_by_their_lines() -> None:
    names = ["h.0.attn:layer_norm", "h.1.attn:layer_norm_1", "h.2.attn:layer_norm_2"]
    (line,) = report_lines.merged([site(name) for name in names])
    assert line.name == "h.0-2.attn:layer_norm"
    assert len(report_lines.merged([site(names[0]), site(names[1], location="model.py:8")])) == 2


# --- Any width -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160])
@pytest.mark.parametrize("name", ["gpt2", "bert", "clip", "bloom"])
def test_nothing_is_cut_and_nothing_is_lost(name: str, width: int, explained: dict[str, FoldReport]) -> None:
    report = explained[name]
    for full in (False, True):
        table = report.table(width, full)
        assert all(len(line) <= width for line in table.splitlines())
        together = "".join(table.split())
        for line in report_lines.each(report.sites) if full else report_lines.merged(report.sites):
            for words in (line.name, line.location, line.lowering, line.count, line.why):
                assert "".join(words.split()) in together or width > 100
        for words in (report.summary(), report.headline(), *(s.remedy or "" for s in report.sites)):
            assert "".join(words.split()) in together


def test_in_a_wide_terminal_a_site_is_one_line(explained: dict[str, FoldReport]) -> None:
    lines = explained["gpt2"].table(160).splitlines()
    assert lines[0].split() == ["site", "at", "lowered", "to", "why"]
    assert len(lines) == 1 + 3 + 1
    assert re.fullmatch(
        r"transformer\.h\.0-1\.ln_1 +\S+:\d+ +rms_norm +2 of 2 +centered in 2 to 6 parameters", lines[1]
    )


def test_in_a_narrow_one_the_reason_stands_below() -> None:
    report = FoldReport((site("model.layers.0.norm", reason=Reason.VISIBLE, detail="somebody reads it"),))
    assert report.table(50).splitlines()[:2] == [
        "site                 at          lowered to",
        "model.layers.0.norm  model.py:7  layer_norm",
    ]
    assert report.table(50).splitlines()[2] == "    visible: somebody reads it"
    assert report.table(30).splitlines()[:3] == [
        "model.layers.0.norm",
        "  model.py:7  layer_norm",
        "    visible: somebody reads it",
    ]


def test_the_width_is_the_terminals_or_80(monkeypatch: pytest.MonkeyPatch, explained: dict[str, FoldReport]) -> None:
    report = explained["bert"]
    monkeypatch.delenv("COLUMNS", raising=False)
    assert str(report) == report.table(80)
    monkeypatch.setenv("COLUMNS", "57")
    assert str(report) == report.table(57)
    for width in (57, 130):
        console = Console(file=io.StringIO(), width=width)
        console.print(report)
        assert isinstance(console.file, io.StringIO)
        printed = [line.rstrip() for line in console.file.getvalue().splitlines()]
        assert printed == [line.rstrip() for line in report.table(width).splitlines()]


@pytest.fixture(scope="module")
def explained() -> dict[str, FoldReport]:
    by_name = {architecture.name: architecture for architecture in ARCHITECTURES}
    found = {}
    with torch.no_grad():
        for name in ("gpt2", "bert", "clip", "bloom"):
            found[name] = lncompile.explain(by_name[name].model(), **by_name[name].inputs(torch.float64))
    return found


# --- Notebooks -------------------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_notebook_shows_a_table(explained: dict[str, FoldReport]) -> None:
    report = explained["clip"]
    page = Tags(report._repr_html_())
    assert page.tags.count("tr") == 1 + len(report_lines.merged(report.sites))
    assert set(page.tags) <= {"div", "table", "thead", "tbody", "tr", "th", "td", "p", "strong", "ul", "li"}
    assert {name for name, _ in page.attributes} == {"style"}
    remedies = {site.remedy for site in report.sites if site.remedy}
    for words in ("vision_model.encoder.layers.0-1.layer_norm1", "2 of 2", report.summary(), *remedies):
        assert words in page.text


def test_names_are_escaped_in_it() -> None:
    evil = "<script>alert('&')</script>"
    report = FoldReport(
        (site(evil, location=evil, reason=Reason.VISIBLE, detail=evil),),
        graph_breaks=(GraphBreak(evil, evil),),
        norms_outside=(evil,),
    )
    page = Tags(report._repr_html_())
    assert "script" not in page.tags
    assert page.text.count(evil) >= 5
    assert "<script" not in Reports([report])._repr_html_()


# --- The reports of a model ------------------------------------------------------------------------------------------


def test_reports_print_as_one_table_and_stay_a_list(without_inductor: None) -> None:
    net = model(layers=2)
    compiled = torch.compile(net, backend="lnfold")
    compiled(IDS)
    found = lncompile.reports(compiled)
    assert isinstance(found, list)
    assert found == [found[0]] == list(found)
    assert sum(report.folded for report in found) == 5
    assert str(found) == repr(found) == str(found[0])
    assert "h.0-1.ln_1" in str(found)
    assert "5 of 5 LayerNorms folded" in str(found)
    assert found._repr_html_() == found[0]._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["folded"] == 5
    console = Console(file=io.StringIO(), width=90)
    console.print(found)
    assert isinstance(console.file, io.StringIO)
    assert "5 of 5 LayerNorms folded" in console.file.getvalue()


def test_several_graphs_are_one_table_in_the_order_of_compilation(without_inductor: None) -> None:
    net = model(layers=1)
    linear, norm = nn.Linear(D, D).double(), nn.LayerNorm(D).double()

    def function(ids: Tensor) -> Tensor:
        x = net(ids)
        torch._dynamo.graph_break()
        return norm(linear(x[..., None].expand(-1, -1, D)))

    compiled = torch.compile(function, backend="lnfold")
    compiled(IDS)
    found = lncompile.reports(compiled)
    assert [report.total for report in found] == [3, 1], "what stands behind the break belongs to the function too"
    assert "4 of 4 LayerNorms folded" in found.merged().summary()
    assert "in 2 graphs" in found.merged().summary()
    (graph_break,) = found.merged().graph_breaks
    line = Path(__file__).read_text().splitlines().index("        torch._dynamo.graph_break()") + 1
    assert graph_break.location == f"test_reports.py:{line}"
    assert f"graph break at test_reports.py:{line}" in str(found)


def test_no_reports_before_the_first_call_and_they_say_so(without_inductor: None) -> None:
    net = model(layers=1)
    compiled = torch.compile(net, backend="lnfold")
    for function, words in (
        (net, "No graph of this model was compiled with lnfold"),
        (compiled, "it was not called yet"),
        (torch.compile(net), "compiled with backend 'inductor', not with lnfold"),
        (torch.compile(net, backend="eager"), "not with lnfold"),
        (torch.compile(lambda x: x, backend="lnfold"), "No graph of this function is compiled"),
    ):
        found = lncompile.reports(function)
        assert found == []
        assert words in " ".join(str(found).split())
        assert words in Tags(found._repr_html_()).text
        assert all(len(line) <= 40 for line in found.table(40).splitlines())
    compiled(IDS)
    assert "No graph" not in str(lncompile.reports(compiled))
    assert "No graph" not in str(lncompile.reports(net))


def test_a_graph_without_a_norm_is_not_no_graph(without_inductor: None) -> None:
    compiled = torch.compile(nn.Linear(D, D), backend="lnfold")
    compiled(torch.ones(2, D))
    found = lncompile.reports(compiled)
    assert len(found) == 1
    assert "No LayerNorm in the graph: there is nothing to fold" in " ".join(str(found).split())


# --- What kind of model it is ----------------------------------------------------------------------------------------


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


# --- Norms outside of the graphs -------------------------------------------------------------------------------------


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
    assert where.location == f"test_reports.py:{line}"
    assert "torch.compiler.disable" in where.reason
    for report in (explained, found):
        words = " ".join(str(report).split())
        assert (
            "4 LayerNorm modules of the model are in no captured graph: outside.norm, never.0, never.1 and 1" in words
        )
        assert f"graph break at test_reports.py:{line}: " in words


def test_a_model_that_is_captured_as_a_whole_has_none(explained: dict[str, FoldReport]) -> None:
    assert all(not report.norms_outside and not report.graph_breaks for report in explained.values())


def test_a_break_without_a_graph_in_front_of_it_is_named_too() -> None:
    report = lncompile.explain(nn.Sequential(Outside()), torch.randn(3, D))
    assert (report.total, report.norms_outside) == (0, ("0.norm",))
    assert any("torch.compiler.disable" in found.reason for found in report.graph_breaks)


# --- Gradients -------------------------------------------------------------------------------------------------------


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


# --- Plain English ---------------------------------------------------------------------------------------------------


def test_every_remedy_says_what_to_do() -> None:
    assert REMEDIES.keys() == set(Reason)
    verbs = "put use start make return let normalise write set to keep subtract report".split()
    for remedy in REMEDIES.values():
        assert remedy.split()[0] in verbs, remedy
        assert not re.search(r"\bis no\b|\bfor want of\b|\bnobody\b|\bwhoever\b|would fold with", remedy)
    assert REMEDIES[Reason.DIFFERENT_AXES] == "normalise over the axis that the layer before it produces"
