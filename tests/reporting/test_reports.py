"""What people read of a report: lines that stand for many sites, any width, a notebook, and why there is none."""

from __future__ import annotations

import gc
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from reported import IDS, D, model
from rich.console import Console
from torch import Tensor, nn

import lncompile
from lncompile.compiled_graphs import compiled_graphs
from lncompile.passes.decisions import GraphBreak, Reason, Verdict
from lncompile.reporting import lines as report_lines
from lncompile.reporting.model_reports import Reports
from lncompile.reporting.report import FoldReport

ABSORBED = "; γ and β absorbed by h.0-11.{}.weight: moves 256 bytes less a call, keeps 0 bytes of weights more"


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
    assert all(line.count == "4 of 12" and "relu (h.3, reported.py:" in line.why for line in left)
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


def test_a_method_is_told_from_that_of_another_model_of_its_class(without_inductor: None) -> None:
    """Compiled methods of one class have their source in common."""
    models = [model(layers=1), model(layers=2)]
    compiled = [torch.compile(each.forward, backend="lnfold") for each in models]
    for function in compiled:
        function(IDS)
    for function, folded in zip(compiled, (3, 5), strict=True):
        assert [report.folded for report in lncompile.reports(function)] == [folded]


def test_a_method_is_told_from_that_of_a_model_that_is_gone(without_inductor: None) -> None:
    """Code outlives its model: it is kept with the class's method, and something may hold it."""
    before = set(compiled_graphs)
    gone = model(layers=2)
    compiled = torch.compile(gone.forward, backend="lnfold")
    compiled(IDS)
    (held,) = set(compiled_graphs) - before
    assert held.served()
    del gone, compiled
    gc.collect()
    assert not held.served()
    function = torch.compile(model(layers=1).forward, backend="lnfold")
    function(IDS)
    assert [report.folded for report in lncompile.reports(function)] == [3]


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
