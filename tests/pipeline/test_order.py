"""The list of passes: each reads what was made before it, and can be switched off or says why it cannot."""

from __future__ import annotations

import pytest
import torch
from architectures import randomise
from graphs import Captured, capture
from torch import nn

import lncompile
from lncompile.options import Options
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.pipeline import runner as running
from lncompile.passes.pipeline.context import Known, Rewriting
from lncompile.passes.pipeline.interface import Kind, Made, NotMadeYet, Pass, decides
from lncompile.passes.pipeline.order import DECIDE, PIPELINE, REWRITE
from lncompile.passes.pipeline.runner import Runner
from lncompile.passes.switches import DECIDES_FOR, NEEDED, SWITCHES, switched_off


def net() -> nn.Module:
    return randomise(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.LayerNorm(8))).eval()


def captured() -> Captured:
    return capture(net(), torch.randn(3, 8))


def known(graph: Captured) -> Known:
    return Known(copy_graph_module(graph.graph_module), graph.example_inputs, Options())


def test_names_are_unique_and_every_one_is_known() -> None:
    names = [one.name for one in PIPELINE]
    assert len(set(names)) == len(names)
    assert set(names) == {*SWITCHES, *NEEDED, *DECIDES_FOR}
    assert set(DECIDES_FOR.values()) <= SWITCHES.keys()
    assert all(one.description for one in PIPELINE)


def test_every_attribute_is_made_by_one_pass() -> None:
    for context, passes in ((Known, DECIDE), (Rewriting, REWRITE)):
        attributes = [made for made in vars(context).values() if isinstance(made, Made)]
        assert sorted(map(id, attributes)) == sorted(id(one.makes) for one in passes)


def test_a_pass_that_runs_too_early_is_told() -> None:
    """Each pass but the first few reads something of an earlier one, so none can move to the front."""
    graph = captured()
    early = [one.name for one in DECIDE if _runs_alone(one, graph)]
    assert early == ["regions", "expand", "gather", "writes", "gradients"]
    with pytest.raises(NotMadeYet, match="'writes' is read before a pass has made it"):
        Runner().run([one for one in DECIDE if one.name == "facts"], known(graph))
    analysis = graph.analyse()
    with pytest.raises(NotMadeYet, match="pass 'hoist' runs before 'handwritten'"):
        Runner().run([one for one in REWRITE if one.name != "handwritten"], Rewriting(analysis, Options()))


def _runs_alone(one: Pass[Known], graph: Captured) -> bool:
    try:
        Runner().run([one], known(graph))
    except NotMadeYet:
        return False
    return True


def test_nothing_is_made_twice() -> None:
    graph = captured()
    with pytest.raises(AttributeError, match="'writes' is made twice"):
        Runner().run([*DECIDE[:4], DECIDE[3]], known(graph))


def test_a_pass_without_a_word_on_its_absence_is_no_pass() -> None:
    with pytest.raises(AssertionError, match="needed, or what instead"):

        @decides(Known.sites)
        def unheard_of(known: Known) -> tuple[()]:
            return ()


def test_deciding_leaves_the_captured_graph_alone() -> None:
    graph = captured()
    before = str(graph.graph_module.graph)
    graph.analyse()
    assert str(graph.graph_module.graph) == before


def test_a_graph_is_linted_behind_each_pass_that_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = captured()
    assert running.lint_each, "the tests' own setting"

    def spoil(work: Rewriting) -> None:
        output = next(node for node in work.graph.nodes if node.op == "output")
        work.graph._root.append(output)
        next(node for node in work.graph.nodes if node.op == "call_function").prepend(output)

    spoils = Pass("center", Kind.REWRITES, Rewriting.rewritten, spoil, lambda work: None)
    with pytest.raises(RuntimeError):
        Runner().run([spoils], Rewriting(graph.analyse(), Options()))
    monkeypatch.setattr(running, "lint_each", False)
    Runner().run([spoils], Rewriting(captured().analyse(), Options()))


def test_each_pass_is_timed_in_the_report(without_inductor: None) -> None:
    compiled = torch.compile(net(), backend="lnfold")
    compiled(torch.randn(3, 8))
    (report,) = lncompile.reports(compiled)
    assert [one.name for one in report.passes] == [one.name for one in PIPELINE]
    assert all(one.seconds > 0 for one in report.passes)
    assert sum(one.seconds for one in report.passes) <= report.seconds
    listed = report.to_dict()["passes"]
    assert [one["name"] for one in listed] == [one.name for one in PIPELINE]
    assert all(isinstance(one["seconds"], float) for one in listed)


def test_times_of_several_graphs_are_added() -> None:
    first, second = net(), net()

    def function(x: torch.Tensor) -> torch.Tensor:
        y = first(x)
        torch._dynamo.graph_break()
        return second(y)

    report = lncompile.explain(function, torch.randn(3, 8))
    assert report.graphs == 2
    assert [one.name for one in report.passes] == [one.name for one in PIPELINE]


def test_the_runner_stops_where_it_is_told() -> None:
    graph = captured()
    runner = Runner(until="sites")
    work = known(graph)
    runner.run(DECIDE, work)
    assert list(runner.times) == ["regions", "expand", "gather", "writes", "gradients", "facts", "chains", "sites"]
    assert len(work.sites) == 2
    with pytest.raises(NotMadeYet, match="variables"):
        _ = work.variables


def test_names_that_cannot_be_switched_off_say_why() -> None:
    assert switched_off(["place"]) == switched_off(["center"]) == {"center", "place"}
    for name, why in NEEDED.items():
        with pytest.raises(ValueError, match="cannot be switched off: ") as error:
            switched_off([name])
        assert why in str(error.value)
    with pytest.raises(ValueError, match=r"there is no pass 'centre' \(did you mean 'center'\?\); those that can be"):
        switched_off(["centre"])
