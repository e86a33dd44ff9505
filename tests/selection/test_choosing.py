"""The race as the backend runs it: who wins, what is compiled, and what the caller sees of it (nothing)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from architectures import randomise
from racing import Lab, compiled, selection
from residual import TOLERANCE, Residual, model, value
from torch import Tensor, nn

import lncompile
from lncompile import Reason
from lncompile.nn import RMSNorm


def test_by_default_nothing_is_raced(lab: Lab) -> None:
    net = model()
    fast = torch.compile(net, backend="lnfold")
    torch.testing.assert_close(fast(x := value()), net(x), **TOLERANCE)
    (report,) = lncompile.reports(fast)
    assert report.selections == ()
    assert len(lab.compiled) == 1
    assert not lab.calls
    assert not lab.files()


def test_the_fastest_way_is_compiled(lab: Lab) -> None:
    lab.seconds = {"affine absorbed": 0.5, "model": 0.9}
    net = model()
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value()), net(x), **TOLERANCE)
    found = selection(fast)
    assert found.chosen == "affine absorbed"
    (report,) = lncompile.reports(fast)
    assert (report.folded, report.total) == (2, 2)
    assert [bool(site.affine_absorbed_by) for site in report.sites] == [False, True], "a ReLU reads the first"
    assert lab.compiled[-1] == lab.compiled[2], "the graph that won is the one that is compiled in the end"
    assert len(lab.compiled) == len(set(lab.compiled)) + 1, "no graph is compiled twice for the race"


def test_ways_that_lead_to_one_graph_run_once(lab: Lab) -> None:
    fast = compiled(model())
    fast(value())
    ways = {way.name: way for way in selection(fast).raced}
    assert list(ways) == [
        "stock", "model", "fold alone", "affine absorbed", "scales deferred", "sums for one row", "rows looped over",
        "no centering at run time",
    ]  # fmt: skip
    assert {name for name, way in ways.items() if way.rounds} == set(lab.calls)
    assert ways["rows looped over"].note == "the same as 'model'", "on a CPU no kernel holds its rows"
    assert ways["no centering at run time"].note == "the same as 'model'"
    assert ways["stock"].speedup == 1.0


def test_stock_wins_where_nothing_is_faster(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    lab.seconds = {"stock": 0.5}
    net = model()
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value()), net(x), **TOLERANCE)
    (report,) = lncompile.reports(fast)
    assert (report.folded, report.total) == (0, 2)
    assert {site.reason for site in report.sites} == {Reason.MEASURED}
    assert report.weights == ()
    assert lab.compiled[-1] == lab.compiled[0], "stock's graph"
    assert "layer_norm" in lab.compiled[-1]
    assert selection(fast).chosen == "stock"
    assert not [record for record in caplog.records if record.levelname == "WARNING"], "it is what the race was for"


def test_norms_that_were_folded_before_are_rms_norms_where_stock_wins_too(lab: Lab) -> None:
    lab.seconds = {"stock": 0.5}
    net = model()
    net.norm_2 = RMSNorm.in_place_of(net.norm_2)
    fast = compiled(net)
    torch.testing.assert_close(fast(x := value()), net(x), **TOLERANCE)
    assert selection(fast).chosen == "stock"
    (report,) = lncompile.reports(fast)
    assert {site.folded_before for site in report.sites} == {True, False}
    assert all(site.folded == site.folded_before for site in report.sites)


@pytest.mark.parametrize(("least", "folded"), [(1.0, 2), (1.3, 0)])
def test_the_least_speedup_is_an_option(lab: Lab, least: float, folded: int) -> None:
    lab.seconds = {"stock": 1.2}
    fast = compiled(model(), minimum_speedup=least)
    fast(value())
    (report,) = lncompile.reports(fast)
    assert report.folded == folded


def test_what_the_user_set_stays(lab: Lab) -> None:
    lab.seconds = {"scales deferred": 0.1, "affine absorbed": 0.1}
    fast = compiled(model(), absorb_affine="off", defer="off", matrix_vector="off")
    fast(value())
    assert selection(fast).chosen == "stock", "neither of the two runs, and the other two are equal"
    assert set(lab.calls) == {"stock", "model"}


def test_a_memory_budget_leaves_out_what_copies_more(lab: Lab) -> None:
    fast = compiled(model(), memory_budget=1.0)
    fast(value())
    names = {way.name for way in selection(fast).raced}
    assert names == {"stock", "model", "fold alone", "rows looped over", "no centering at run time"}


class Counting(nn.Module):
    """Writes into what it is given, into a view of it, and into a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Residual()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        self.steps.add_(1)
        cache[1:].add_(self.steps)
        return self.inner(x) + cache.sum()


def test_what_the_graph_writes_is_written_once(lab: Lab) -> None:
    lab.seconds = {"model": 0.5}
    net = Counting()
    net.inner = randomise(Residual().double())
    cache, x = torch.zeros(3, dtype=torch.float64), value()
    fast = compiled(net)
    actual = fast(x, cache)
    assert sum(lab.calls.values()) > 24, "it was raced"
    assert net.steps == 1
    assert cache.tolist() == [0.0, 1.0, 1.0]
    net.steps.zero_()
    torch.testing.assert_close(actual, net(x, torch.zeros(3, dtype=torch.float64)), **TOLERANCE)
    fast(x, cache)
    assert cache.tolist() == [0.0, 3.0, 3.0], "eager has made the count 1, and this call 2"


def test_every_call_of_a_race_gets_the_same(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    plain = lab.stopwatch

    def looking(call: Any) -> float:
        contestant = call._contestants[call.name]
        before = [v.clone() for v in contestant._arguments if isinstance(v, Tensor) and v.shape == (3,)]
        seen.extend(before)
        return plain(call)

    monkeypatch.setattr(lab, "stopwatch", looking)
    net = Counting()
    net.inner = model()  # type: ignore[assignment]
    compiled(net)(value(), torch.zeros(3, dtype=torch.float64))
    assert len(seen) > 24
    assert all(torch.equal(found, torch.zeros(3, dtype=torch.float64)) for found in seen)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.inner(x), 0.5, training=True)


def test_random_numbers_go_on_as_if_there_was_no_race(lab: Lab) -> None:
    net, x = Dropping(), value()
    torch.manual_seed(7)
    expected, after = net(x), torch.rand(3)
    torch.manual_seed(7)
    torch.testing.assert_close(compiled(net)(x), expected, **TOLERANCE)
    assert lab.calls
    assert torch.equal(torch.rand(3), after)


def test_graph_breaks_are_raced_each(lab: Lab) -> None:
    net, x = model(breaks=True), value()
    fast = compiled(net)
    torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
    assert all(len(report.selections) == 1 for report in lncompile.reports(fast))


def test_the_report_says_what_was_raced(lab: Lab) -> None:
    lab.seconds = {"model": 0.5}
    fast = compiled(model())
    fast(value())
    (report,) = lncompile.reports(fast)
    text = " ".join(str(report).split())
    assert "'model' is chosen" in text
    assert "model 2.000 [2.000, 2.000] (12 rounds)" in text
    data = json.loads(json.dumps(report.to_dict()))["selections"]
    assert data[0]["chosen"] == "model"
    assert {way["name"] for way in data[0]["raced"]} >= {"stock", "model", "affine absorbed"}
    assert "is chosen" in report._repr_html_()
    assert "model 2.000 [2.000, 2.000]" in report.to_html("a model")


def test_weights_that_change_later_are_followed(lab: Lab) -> None:
    lab.seconds = {"affine absorbed": 0.5}
    net, x = model(), value()
    fast = compiled(net)
    fast(x)
    net.first.weight.mul_(2)
    net.norm_2.bias.add_(1)
    torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
