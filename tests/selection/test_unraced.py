"""What is not raced, with the reason in the report; and races that fail or take too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from racing import MEASURE, Lab, compiled, selection
from residual import TOLERANCE, model, value
from torch import Tensor, nn

import lncompile
from lncompile.selection import choose


@torch.library.custom_op("lnfold_race_test::remember", mutates_args=())
def remember(x: Tensor) -> Tensor:
    REMEMBERED.append(1)
    return x.clone()


@remember.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


REMEMBERED: list[int] = []


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = model()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.ops.lnfold_race_test.remember(x))


def _unraced(fast: Any, arguments: Sequence[Any], lab: Lab, words: str, folded: int = 2) -> None:
    fast(*arguments)
    assert not lab.calls
    reports = lncompile.reports(fast)
    assert [report.folded for report in reports] == [folded]
    (found,) = reports[0].selections
    assert found.chosen == "model"
    assert not found.is_race
    assert words in found.reason
    assert words in " ".join(str(reports[0]).split())
    assert not lab.files()


def test_what_an_operator_keeps_to_itself_is_not_raced(lab: Lab) -> None:
    REMEMBERED.clear()
    _unraced(compiled(Remembering()), [value()], lab, "effects are not known (lnfold_race_test.remember")
    assert len(REMEMBERED) == 1


def test_dynamic_sizes_are_not_raced(lab: Lab) -> None:
    fast = torch.compile(model(), backend="lnfold", dynamic=True, options=MEASURE)
    _unraced(fast, [value()], lab, "its sizes are dynamic")


def test_training_is_not_raced(lab: Lab) -> None:
    with torch.enable_grad():
        fast = compiled(model().train(), training="on")
        _unraced(fast, [value()], lab, "gradients are recorded")


def test_a_graph_in_which_nothing_folds_is_not_raced(lab: Lab) -> None:
    fast = compiled(nn.Sequential(nn.Linear(16, 4)).double())
    _unraced(fast, [value()], lab, "every way leads to the same code", folded=0)
    assert len(lab.compiled) == 1


def test_a_call_that_takes_too_long_is_left_to_the_model(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "SECONDS", 0.0)
    fast = compiled(model())
    fast(value())
    (found,) = lncompile.reports(fast)[0].selections
    assert (found.chosen, "takes too long" in found.reason) == ("model", True)
    assert not lab.files()


def test_races_of_a_process_are_bounded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_spent", 1e9)
    _unraced(compiled(model()), [value()], lab, "races of this process")


def test_a_failure_of_the_race_costs_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(call: Any) -> float:
        raise ZeroDivisionError("a broken clock")

    monkeypatch.setattr(lab, "stopwatch", broken)
    monkeypatch.setattr("lncompile.safety_net.enabled", True)
    net, x = model(), value()
    fast = compiled(net)
    torch.testing.assert_close(fast(x), net(x), **TOLERANCE)
    (report,) = lncompile.reports(fast)
    assert report.folded == 2
    assert "a broken clock" in report.selections[0].reason


def test_a_way_that_cannot_be_compiled_drops_out(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.seconds = {"affine absorbed": 0.1, "model": 0.5}
    plain = choose.Contestant

    def failing(candidate: Any, *arguments: Any) -> Any:
        if candidate.name == "affine absorbed":
            raise torch.OutOfMemoryError("no memory for it")
        return plain(candidate, *arguments)

    monkeypatch.setattr(choose, "Contestant", failing)
    fast = compiled(model())
    fast(value())
    found = selection(fast)
    assert found.chosen == "model"
    assert "no memory for it" in next(way.note for way in found.raced if way.name == "affine absorbed")
