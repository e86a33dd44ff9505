"""γ and β in the layers behind a norm: what is left is a plain RMSNorm."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import IDS, TOLERANCE, WIDTH, Once, Residual, Tied, error, randomised, value
from torch import Tensor, nn

import lncompile
from lncompile.nn import RMSNorm


def check(model: nn.Module, mode: str, absorbed: dict[str, str], *args: Any, **options: Any) -> lncompile.FoldPlan:
    """Plan with absorption, apply, compare; what is absorbed is said by norm: "γβ", "β", "γ"."""
    plan = lncompile.plan(model, *args, absorb=mode, **options)
    what = {entry.path: ("γ" if entry.weight else "") + ("β" if entry.bias else "") for entry in plan.absorb}
    assert what == absorbed, str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert error(folded, model, *args) <= TOLERANCE
    for entry in plan.absorb:
        norm = folded.get_submodule(entry.path)
        assert isinstance(norm, RMSNorm)
        assert entry.bias is None or norm.bias is None
        assert entry.weight is None or bool((norm.weight == 1).all())
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    again = plan.apply(folded).state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items()), "twice is once"
    assert error(plan.replace_modules(copy.deepcopy(model)), model, *args) > 1e-4, "the control"
    return plan


def test_beta_goes_into_biases_and_gamma_into_weights() -> None:
    model = randomised(Residual())
    # The branch reads the norm through an activation; the head reads the last norm, and has no bias.
    plan = check(model, "bias", {"final": "β"}, IDS)
    (layer,) = plan.absorb[0].layers
    assert (layer.weight, layer.bias, layer.adds_bias) == ("head.weight", "head.bias", True)
    assert "a bias is added to head" in str(plan)
    assert "γ and β stay: its output is read by" in str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert folded.state_dict().keys() ^ model.state_dict().keys() == {"final.bias", "head.bias"}
    assert torch.equal(folded.head.weight, model.head.weight)
    check(model, "affine", {"final": "γβ"}, IDS)


class Between(nn.Module):
    """A layer between two norms: it absorbs the first, and is centered for the second."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.second, self.final = nn.Linear(WIDTH, WIDTH, bias=bias), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.final(self.second(self.norm(self.first(x)))))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", ["bias", "affine"])
def test_a_layer_that_is_centered_and_absorbs(mode: str, bias: bool) -> None:
    what = "γβ" if mode == "affine" else "β"
    model = randomised(Between(bias))
    plan = check(model, mode, {"norm": what, "final": what}, value(2, 3))
    folded = plan.apply(copy.deepcopy(model))
    assert folded.second.weight.mean(0).abs().max() < 1e-15
    assert folded.second.bias.mean().abs() < 1e-15
    narrow = plan.apply(copy.deepcopy(model).float())
    for name, tensor in plan.apply(copy.deepcopy(model).float().double()).state_dict().items():
        torch.testing.assert_close(narrow.state_dict()[name], tensor.float(), rtol=1e-7, atol=1e-9)


def test_a_tied_head_takes_beta_and_takes_gamma_once_it_is_untied() -> None:
    check(randomised(Tied()), "bias", {"final": "β"}, IDS)
    plan = check(randomised(Tied()), "affine", {"final": "β"}, IDS)
    assert "'table.weight' is also looked up in" in str(plan)
    check(randomised(Tied()), "affine", {"final": "γβ"}, IDS, untie=True)


class TwoReaders(Once):
    """A layer that reads the norm, and something else with the same weights."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.head, self.way = nn.Linear(WIDTH, WIDTH, bias=way != "module"), way

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        if self.way == "activation":
            return self.head(y) + torch.tanh(y)
        if self.way == "returned":
            return self.head(y) * y.sum()
        if self.way == "bias":
            return self.head(y) + self.head.bias
        return self.head(y) + self.head(x)


@pytest.mark.parametrize("mode", ["bias", "affine"])
@pytest.mark.parametrize("way", ["activation", "returned", "bias", "module"])
def test_what_something_else_reads_stays(way: str, mode: str) -> None:
    x = value(2, 3)
    plan = lncompile.plan(randomised(TwoReaders(way)), x, absorb=mode)
    assert plan.folded == 1
    assert not plan.absorb
    assert "γ and β stay: " in plan.norms[0].detail


class OtherWay(Between):
    """Another call reads the head, or the norm, in another way."""

    def forward(self, x: Tensor, way: str = "") -> Tensor:
        return self.head(x) if way == "head" else super().forward(x)


def test_all_calls_have_a_say() -> None:
    x, model = value(2, 3), randomised(OtherWay())
    assert len(lncompile.plan(model, x, absorb="affine").absorb) == 2
    calls = [lncompile.Call(x, "head")]
    plan = lncompile.plan(model, x, more_calls=calls, absorb="affine")
    assert [entry.path for entry in plan.absorb] == ["norm"]
    folded = plan.apply(copy.deepcopy(model))
    assert max(error(folded, model, x), error(folded, model, x, "head")) <= TOLERANCE


def test_a_plan_that_absorbs_is_kept_in_a_file(tmp_path: Path) -> None:
    model = randomised(Between(False))
    plan = lncompile.plan(model, value(2, 3), absorb="affine")
    plan.save(tmp_path / "plan.json")
    loaded = lncompile.FoldPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    folded = loaded.apply(copy.deepcopy(model))
    other = loaded.replace_modules(randomised(Between(False), seed=4))
    other.load_state_dict(folded.state_dict())
    assert error(other, model, value(2, 3)) <= TOLERANCE
    with pytest.raises(ValueError, match="absorb takes 'bias' or 'affine' or None"):
        lncompile.plan(model, value(2, 3), absorb="all")


def test_a_failure_in_the_middle_puts_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Between())
    plan = lncompile.plan(model, value(2, 3), absorb="affine")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("lncompile.plans.application._exchange", lambda *_: None)
    put, written = lncompile.plans.application._put, []  # type: ignore[attr-defined]

    def fail_at_the_fifth(tensor: Tensor, value: Tensor) -> None:
        written.append(tensor)
        if len(written) == 5:
            raise MemoryError
        put(tensor, value)

    monkeypatch.setattr("lncompile.plans.application._put", fail_at_the_fifth)
    with pytest.raises(MemoryError):
        plan.apply(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-15, atol=1e-15)
