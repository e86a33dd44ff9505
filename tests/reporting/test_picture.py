"""The streams as they are mapped, the picture drawn from them, and the page as a browser shows it."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, randomise
from browser import load, parse
from torch import nn
from typer.testing import CliRunner

import lncompile
from lncompile.cli.commands import app
from lncompile.passes.decisions import MemoryBudget, PartKind, Reason, Stream, StreamPart, Verdict, WeightRewrite
from lncompile.reporting import picture
from lncompile.reporting.report import FoldReport, merge

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 61}


def explained(name: str) -> FoldReport:
    architecture = next(architecture for architecture in ARCHITECTURES if architecture.name == name)
    model = randomise(architecture.build().eval())
    return lncompile.explain(model, **architecture.inputs(torch.float32))


@pytest.fixture(scope="module")
def gpt2() -> FoldReport:
    with torch.no_grad():
        return explained("gpt2")


@pytest.fixture(scope="module")
def bert() -> FoldReport:
    with torch.no_grad():
        return explained("bert")


def assert_every_site_is_in_one_stream(report: FoldReport) -> None:
    norms = [part for stream in report.streams for part in stream.parts if part.kind is PartKind.NORM]
    assert sorted(part.site for part in norms) == list(range(report.total))
    for part in norms:
        site = report.sites[part.site]
        assert (part.name, part.location, part.centered) == (site.name, site.location, site.folded)


# --- The map of the streams ------------------------------------------------------------------------------------------


def test_a_pre_norm_model_has_one_stream(gpt2):
    (stream,) = gpt2.streams
    assert_every_site_is_in_one_stream(gpt2)
    names = [part.name.removeprefix("transformer.") for part in stream.parts]
    assert set(names[:2]) == {"wte", "wpe"}
    block = [["ln_1", "attn.c_proj", "ln_2", "mlp.c_proj"][i % 4] for i in range(8)]
    assert names[2:] == [*(f"h.{i // 4}.{name}" for i, name in enumerate(block)), "ln_f"]
    assert all(part.centered for part in stream.parts)
    entered = {name for part in stream.parts for name in part.parameters}
    assert entered == {weight.name for weight in gpt2.weights}


def test_a_post_norm_model_has_a_stream_for_each_norm(bert):
    assert_every_site_is_in_one_stream(bert)
    assert len(bert.streams) == bert.total
    first, second = bert.streams[:2]
    assert [part.kind for part in first.parts] == [PartKind.WEIGHTS] * 3 + [PartKind.NORM]
    assert all(part.centered for part in first.parts)
    start, dense, norm = second.parts
    assert (start.kind, start.site, start.centered) == (PartKind.ACTIVATION, 0, False)
    assert "another norm's output" in start.detail
    assert (dense.kind, dense.centered) == (PartKind.WEIGHTS, False)
    assert dense.parameters == tuple(f"{dense.name}.{name}" for name in ("weight", "bias"))
    assert not norm.centered


def test_a_centering_at_run_time_starts_a_stream():
    report = explained("bloom")
    assert_every_site_is_in_one_stream(report)
    stream = report.streams[1]
    assert (stream.parts[0].kind, stream.parts[0].centered, stream.parts[0].site) == (PartKind.ACTIVATION, True, 0)
    assert report.sites[1].centered_after == (stream.parts[0].name,) == (report.centerings[0].after,)
    assert report.sites[0].centered_after == ()


def test_two_norms_of_one_tensor_read_one_stream_and_two_parts_of_it_two():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 16)
            self.one, self.two = nn.LayerNorm(16), nn.LayerNorm(16)
            self.left, self.right = nn.LayerNorm(8), nn.LayerNorm(8)
            self.register_parameter("token", nn.Parameter(torch.zeros(16)))

        def forward(self, x):
            stream = self.linear(x) + self.token
            left, right = self.linear(x).chunk(2, -1)
            return self.one(stream), self.two(stream), self.left(left), self.right(right)

    report = lncompile.explain(randomise(Parallel()), torch.randn(64, 8))
    assert_every_site_is_in_one_stream(report)
    assert report.folded == 4
    norms = [[part.name for part in stream.parts if part.kind is PartKind.NORM] for stream in report.streams]
    assert sorted(norms) == [["left"], ["one", "two"], ["right"]]
    together = report.streams[[len(names) for names in norms].index(2)]
    assert [part.name for part in together.parts[:2]] == ["linear", "token"]


def test_an_untouched_graph_has_a_stream_for_each_norm():
    model = randomise(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)))
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.training": "off"})
    with torch.enable_grad():
        report = lncompile.explain(compiled, torch.randn(2, 8))
    assert [site.reason for site in report.sites] == [Reason.TRAINING]
    assert_every_site_is_in_one_stream(report)


def test_reports_of_several_graphs_count_their_sites_on(gpt2, bert):
    both = merge([gpt2, bert])
    assert_every_site_is_in_one_stream(both)
    starts = [part.site for part in both.streams[2].parts if part.kind is PartKind.ACTIVATION]
    assert starts == [gpt2.total]


def test_norms_inside_an_operator_that_stays_closed_are_drawn():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=False)
    report = lncompile.explain(randomise(nn.TransformerEncoder(layer, 1)).eval(), torch.randn(2, 3, 16))
    assert report.total == 2
    assert_every_site_is_in_one_stream(report)
    assert len(parse(report.to_html()).find("li", class_="row")) == 2


# --- The drawing -----------------------------------------------------------------------------------------------------


def test_one_unbroken_line_where_everything_folds(gpt2):
    rows = picture.lay_out(gpt2)
    assert {row.x for row in rows} == {rows[0].x}
    assert {line.style for row in rows for line in row.lines} == {"centered"}
    for row in rows[1:-1]:  # from the row's top to the norm, and on to its bottom
        assert [(line.top, line.bottom) for line in row.lines] == [(0, picture.NORM), (picture.NORM, picture.ROW)]
    assert rows[-1].lines[-1].bottom == picture.NORM
    assert [row.layer for row in rows if row.starts_layer] == ["transformer.h.0", "transformer.h.1", ""]


def test_a_line_for_each_norm_where_streams_end_at_norms(bert):
    rows = picture.lay_out(bert)
    pieces = [[line for line in row.lines if line.style in ("centered", "raw")] for row in rows]
    assert all([(line.top, line.bottom) for line in lines] == [(picture.ENTERS, picture.NORM)] for lines in pieces)
    assert [lines[0].style for lines in pieces] == ["centered", *["raw"] * (bert.total - 1)]


def test_streams_side_by_side_have_lanes_of_their_own():
    def norm(site):
        return StreamPart(PartKind.NORM, f"norm{site}", "", False, "", (), site)

    sites = tuple(Verdict(f"norm{i}", "", False, "layer_norm", Reason.USER_TENSOR, "", ()) for i in range(6))
    long, inner, after = (Stream(tuple(map(norm, norms))) for norms in ((0, 3), (1, 2), (4, 5)))
    rows = picture.lay_out(FoldReport(sites, streams=(long, inner, after)))
    left, right = rows[0].x, rows[1].x
    assert left < right
    assert [row.x for row in rows] == [left, right, right, left, left, left]
    assert [len(row.lines) for row in rows] == [2, 3, 2, 1, 2, 1]


def test_layers_and_names():
    assert picture.layer_of("transformer.h.0.ln_1") == "transformer.h.0"
    assert picture.layer_of("encoder.layers.1.blocks.0.norm") == "encoder.layers.1.blocks.0"
    assert picture.layer_of("ln_f") == picture.layer_of("3") == ""
    assert picture.shortened("a.h.0.attn.out", "a.h.0") == "attn.out"
    assert picture.shortened("a.h.0.mlp.out", "a.h.1") == "h.0.mlp.out"
    assert picture.shortened("model.decoder.ln_f") == "decoder.ln_f"
    assert picture.readable_bytes(512) == "512 bytes"
    assert picture.readable_bytes(3 * 2**30) == "3.0 GiB"


# --- The page --------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_report_says(bert):
    page = parse(bert.to_html("a title", "a description"))
    rows = page.find("li", class_="row")
    assert len(rows) == bert.total == len(page.find("a"))
    assert len(page.find("li", class_="folded")) == bert.folded
    for row, site in zip(rows, bert.sites, strict=True):
        more = row.find(class_="more")[0].text
        for words in (site.name, site.detail, site.location, site.lowering, site.remedy or "", *site.centered_by):
            assert " ".join(words.split()) in more
        # A word beside each colour and shape.
        assert row.find(class_="verdict")[0].text == ("folded" if site.folded else f"stays: {site.reason.value}")
    assert page.find("h1")[0].text == "a title"
    assert f"{bert.folded} of {bert.total} LayerNorms folded" in page.text
    for weight in bert.weights:
        assert weight.name in page.find("details")[0].text
    assert picture.readable_bytes(bert.extra_bytes) in page.find(class_="totals")[0].text


def test_the_page_needs_nothing_else(gpt2):
    page = gpt2.to_html()
    for element in parse(page).elements():
        for name in ("src", "href", "action", "data", "srcset"):
            assert (element.attributes.get(name) or "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in element.attributes)
    assert not re.search(r"https?:|@import|url\(", page)
    (policy,) = parse(page).find("meta", http_equiv="Content-Security-Policy")
    assert policy.attributes["content"].startswith("default-src 'none'; style-src 'sha256-")


def test_a_budget_of_memory_is_said():
    budget = MemoryBudget(limit=2048, wanted=4096, binds=True)
    page = parse(FoldReport((), memory_budget=budget).to_html())
    assert "the budget is 2.0 KiB of 4.0 KiB" in page.find(class_="totals")[0].text


def test_a_model_without_norms_has_a_page():
    assert "No LayerNorm in the graph" in FoldReport(()).to_html()


def test_in_a_browser_a_norm_is_explained_when_it_is_pointed_at(bert, tmp_path, monkeypatch):
    read = picture._file

    def with_a_pointer(name: str) -> str:
        if name != "picture.js":
            return read(name)
        return read(name) + (
            "document.body.dataset.first = details.dataset.site;\n"
            "rows[0].dispatchEvent(new MouseEvent('mouseenter'));\n"
            "document.body.dataset.pointed = details.querySelector('h2').innerText;\n"
            "document.body.dataset.shown = details.offsetHeight > 100;\n"
            "rows[2].focus(); rows[2].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowDown'}));\n"
            "document.body.dataset.fetched = performance.getEntriesByType('resource').length;\n"
            "document.body.dataset.lines = document.querySelectorAll('.lanes .line').length;\n"
            "document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;\n"
        )

    monkeypatch.setattr(picture, "_file", with_a_pointer)
    (tmp_path / "page.html").write_text(bert.to_html("bert"))
    page = load(tmp_path / "page.html")
    body = page.find("body")[0].attributes
    first_that_stays = next(index for index, site in enumerate(bert.sites) if not site.folded)
    assert body["data-first"] == str(first_that_stays)
    assert body["data-pointed"] == bert.sites[0].name
    assert body["data-shown"] == "true"
    assert body["data-fetched"] == "0"
    assert body["data-wide"] == "false"
    assert body["data-lines"] == str(sum(len(row.lines) for row in picture.lay_out(bert)))
    details = page.find(id="details")[0]
    assert details.attributes["data-site"] == "3"  # the arrow went on from the third row
    assert bert.sites[3].detail in details.text
    assert len(page.find("li", class_="row")) == bert.total


def test_in_a_browser_hostile_names_are_text(tmp_path):
    evil = "<img src=x onerror=document.title='owned'>\"'</script><script>document.title='owned'</script>{{ 7*7 }}"
    site = Verdict(evil, evil, False, "layer_norm", Reason.USER_TENSOR, evil, (evil,), (evil,))
    part = StreamPart(PartKind.ACTIVATION, evil, evil, False, evil, (evil,))
    norm = StreamPart(PartKind.NORM, evil, evil, False, "", (), 0)
    report = FoldReport((site,), (WeightRewrite(evil, 8, "copy"),), streams=(Stream((part, norm)),))
    page = report.to_html(evil, evil)
    for element in parse(page).elements():
        assert element.tag not in ("img",)
    assert len(parse(page).find("script")) == 1
    (tmp_path / "page.html").write_text(page)
    shown = load(tmp_path / "page.html")
    assert shown.find("title")[0].text != "owned"
    assert not shown.find("img")
    assert evil in shown.find(id="details")[0].text
    assert shown.find("h1")[0].text == evil


def test_the_command_writes_the_page(tmp_path):
    transformers.BertConfig(**SMALL).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["explain", str(tmp_path), "--json", "--html", str(tmp_path / "out.html")])
    assert result.exit_code == 0, result.output
    page = parse((tmp_path / "out.html").read_text())
    assert page.find("h1")[0].text == str(tmp_path)
    assert "random weights" in page.find(class_="description")[0].text
    refused = CliRunner().invoke(app, ["explain", str(tmp_path), "--html", str(tmp_path / "no" / "out.html")])
    assert refused.exit_code == 2
    assert "there is no folder" in refused.stderr
