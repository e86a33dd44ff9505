"""A failure of ours breaks no call: it is logged, and the caller gets what stock torch gives. Off, it is raised."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn

import lncompile
from lncompile import explanation, pipeline, safety_net
from lncompile.passes.norms import sites
from lncompile.passes.pipeline import deciding


class Net(nn.Module):
    """Two norms, both foldable."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.second, self.final = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> dict[str, Tensor | None]:
        return {"y": self.final(self.second(torch.relu(self.norm(self.first(x))))), "cache": None}


def net_and_input() -> tuple[nn.Module, Tensor]:
    return randomise(Net().double()).eval(), torch.randn(3, 16, dtype=torch.float64)


def fail(*_: object, **__: object) -> Any:
    raise RuntimeError("a bug of ours")


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lncompile" and r.levelno >= logging.WARNING]


def explain_it(model: nn.Module, x: Tensor) -> lncompile.FoldReport:
    return lncompile.explain(model, x)


#: What is called, where it fails, what is logged (once for each failure), and how many sites the report has then.
FAILURES: dict[str, tuple[Callable[..., lncompile.FoldReport], list[tuple[object, str]], list[str], int]] = {
    "explain_deciding": (explain_it, [(pipeline, "analyse")], ["lncompile.explain failed"], 2),
    "explain_planning": (explain_it, [(explanation, "plan")], ["lncompile.explain failed"], 2),
    "explain_finding_sites": (
        explain_it,
        [(deciding, "find_sites"), (sites, "list_norms")],
        ["lncompile.explain failed"],
        0,
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_of_ours(name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    call, places, logged, sites = FAILURES[name]
    model, x = net_and_input()
    assert call(model, x).folded == 2
    for module, attribute in places:
        monkeypatch.setattr(module, attribute, fail)
    with pytest.raises(Exception, match="a bug of ours"):
        call(model, x)

    torch._dynamo.reset()
    monkeypatch.setattr(safety_net, "enabled", True)
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        report = call(model, x)
    found = messages(caplog)
    assert len(found) == len(logged)
    for message, beginning in zip(found, logged, strict=True):
        assert message.startswith(beginning)
        assert message.endswith("Please report it: RuntimeError: a bug of ours")
    assert [site.reason for site in report.sites] == [lncompile.Reason.INTERNAL_ERROR] * sites
    assert all("a bug of ours" in site.detail for site in report.sites)


def test_only_the_graph_that_fails_is_left_untouched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model with a graph break, explain() says of the other graph what it would have said."""
    first, x = net_and_input()
    second = randomise(Net().double(), seed=1).eval()

    def function(x: Tensor) -> Tensor:
        y = first(x)["y"]
        torch._dynamo.graph_break()
        return second(y)["y"]

    plan, calls = explanation.plan, []

    def fail_once(*arguments: Any) -> lncompile.FoldReport:
        calls.append(arguments)
        return fail() if len(calls) == 1 else plan(*arguments)

    monkeypatch.setattr(explanation, "plan", fail_once)
    monkeypatch.setattr(safety_net, "enabled", True)
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        report = lncompile.explain(function, x)
    assert len(messages(caplog)) == 1
    assert (report.graphs, report.total, report.folded) == (2, 4, 2)
    reasons = [site.reason for site in report.sites]
    assert reasons == [lncompile.Reason.INTERNAL_ERROR] * 2 + [None] * 2


def test_verify_stands_over_the_backend_s_net(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, without_inductor: None
) -> None:
    """What verify() does beside compiling is arithmetic on the model's outputs, for which stock torch has nothing."""
    model, x = net_and_input()
    monkeypatch.setattr(pipeline, "analyse", fail)
    with pytest.raises(Exception, match="a bug of ours"):
        lncompile.verify(model, x)
    torch._dynamo.reset()
    monkeypatch.setattr(safety_net, "enabled", True)
    with caplog.at_level(logging.WARNING, logger="lncompile"):
        assert lncompile.verify(model, x).passed
    assert [message.split(" and ")[0] for message in messages(caplog)] == ["lnfold failed"]


class Breaks(nn.Module):
    """Fails by itself, or is no single graph."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.norm = how, nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "graph break":
            torch._dynamo.graph_break()
        elif self.how == "error":
            raise ValueError("a bug of yours")
        return self.norm(x @ x)  # [3, 16] @ [3, 16] does not fit, which is the input's fault


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("error", ValueError, "a bug of yours"),
        ("input", RuntimeError, "cannot be multiplied|same reduction dim"),
        ("training", ValueError, r"call model\.eval\(\) first"),
    ],
)
def test_errors_of_the_caller_are_raised_with_the_net(
    how: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(safety_net, "enabled", True)
    model, x = Breaks(how).double().eval(), torch.randn(3, 16, dtype=torch.float64)
    model.train(how == "training")
    with pytest.raises(error, match=message), caplog.at_level(logging.WARNING, logger="lncompile"):
        lncompile.plan(model, x)
    assert not messages(caplog)
    if how in ("error", "input"):
        for call in (lncompile.explain, lncompile.verify):
            with pytest.raises(Exception, match=message):
                call(model, x)
