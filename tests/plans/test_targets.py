"""Targets that differ from the plan's model where names, shapes and classes do not: refused, or folded right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_models import IDS, TOLERANCE, WIDTH, Residual, Scaled, Tied, error, randomised, value
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.plans import application


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- a tied table that is read by the embedding's own attribute ---


class Functional(Residual):
    """A head that reads the table by the embedding's attribute; another name of the table is not read at all."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return {"logits": functional.linear(self.final(stream), self.table.weight) * scale}


class BothWays(Functional):
    """A head that reads the table by both attributes."""

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        x = self.final(stream)
        return {"logits": functional.linear(x, self.table.weight), "own": self.head(x) * scale}


@pytest.mark.parametrize("absorb", [None, "affine"])
@pytest.mark.parametrize(("model", "untied"), [(Functional, False), (BothWays, False), (Tied, True)])
def test_a_table_is_untied_where_nothing_reads_it_by_the_embedding(
    model: type[nn.Module], untied: bool, absorb: str | None
) -> None:
    made = randomised(model())
    plan = lncompile.plan(made, IDS, untie=True, absorb=absorb)
    assert (plan.folded, plan.total) == (2, 2)
    assert [entry.untied for entry in plan.lookups] == [untied], "Tied is the control"
    assert made.head.weight is made.table.weight, "it was only tried"
    folded = plan.apply(copy.deepcopy(made))
    assert error(folded, made, IDS) <= TOLERANCE
    assert isinstance(folded.table, CenteredEmbedding) == (not untied)
    assert error(lncompile.fold(made, IDS, untie=True, absorb=absorb), made, IDS) <= TOLERANCE
    with torch.device("meta"):
        empty = model().double().eval()
    assert lncompile.plan(empty, IDS.to("meta"), untie=True, absorb=absorb) == plan


def test_a_target_that_was_never_tied_gets_its_own_table_centered() -> None:
    plan = lncompile.plan(randomised(Tied()), IDS, untie=True)
    target = randomised(Tied())
    target.table.weight = nn.Parameter(torch.randn(48, WIDTH, dtype=torch.float64))
    folded = plan.apply(copy.deepcopy(target))
    assert error(folded, target, IDS) <= TOLERANCE
    assert folded.table.weight.mean(1).abs().max() < 1e-15
    assert torch.equal(folded.head.weight, target.head.weight)
    before = state(folded)
    assert same(plan.apply(folded), before)


# --- ties and memory ---


def with_views(tie: Callable[[nn.Module], None]) -> nn.Module:
    model = randomised(Residual())
    tie(model)
    return model


def alias(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.table.weight.data)


def overlapping(model: nn.Module) -> None:
    memory = torch.randn(48 * WIDTH + 8, dtype=torch.float64)
    model.table.weight = nn.Parameter(memory[: 48 * WIDTH].view(48, WIDTH))
    model.head.weight = nn.Parameter(memory[8:].view(48, WIDTH))


def through_numpy(model: nn.Module) -> None:
    """Memory that torch does not know to be shared."""
    array = model.table.weight.data.numpy()
    model.head.weight = nn.Parameter(torch.from_numpy(array))


def neighbours(model: nn.Module) -> None:
    memory = torch.randn(2 * 48 * WIDTH, dtype=torch.float64)
    model.table.weight = nn.Parameter(memory[: 48 * WIDTH].view(48, WIDTH))
    model.head.weight = nn.Parameter(memory[48 * WIDTH :].view(48, WIDTH))


@pytest.mark.parametrize(
    ("tie", "says"),
    [
        (alias, r"'head\.weight' is tied to 'table\.weight': it was not tied"),
        (through_numpy, r"'head\.weight' is tied to 'table\.weight': it was not tied"),
        (overlapping, r"'head\.weight' shares its memory with 'table\.weight'"),
        (neighbours, ""),
    ],
)
def test_memory_that_two_weights_of_a_target_share(tie: Callable[[nn.Module], None], says: str) -> None:
    plan = lncompile.plan(randomised(Residual()), IDS)
    target = with_views(tie)
    before = state(target)
    if not says:
        expected = target(IDS)["logits"]
        torch.testing.assert_close(plan.apply(target)(IDS)["logits"], expected, rtol=1e-10, atol=1e-10)
        return
    with pytest.raises(lncompile.PlanError, match=says):
        plan.apply(target)
    assert same(target, before)


class Two(nn.Module):
    """A norm whose γ goes into a layer; another norm of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(torch.relu(self.second(self.norm(self.first(x)))))


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_ties_of_what_is_absorbed(which: str) -> None:
    plan = lncompile.plan(randomised(Two()), value(2, 3), absorb="affine")
    assert [entry.path for entry in plan.absorb] == ["norm"]
    target = randomised(Two())
    setattr(target.other, which, getattr(target.norm, which))
    with pytest.raises(lncompile.PlanError, match=rf"'other\.{which}' is tied to 'norm\.{which}'"):
        plan.apply(target)
    free = lncompile.plan(randomised(Two()), value(2, 3))
    expected = target(value(2, 3))
    torch.testing.assert_close(free.apply(target)(value(2, 3)), expected, rtol=1e-10, atol=1e-10)


# --- what a module computes ---


class Settled(Residual):
    """With a word, a number and a function that say what it computes, and a counter."""

    def __init__(self, mode: str = "pre", axis: int = -1, temperature: float = 1.0, act: Any = torch.relu) -> None:
        super().__init__()
        self.mode, self.axis, self.temperature, self.act = mode, axis, temperature, act
        self.dropout, self.calls = 0.1, 0

    def forward(self, ids: Tensor, scale: float = 1.0) -> Any:
        self.calls += 1
        stream = self.table(ids)
        stream = stream + self.branch(self.act(self.norm(stream)))
        return {"logits": self.head(self.final(stream)) * self.temperature}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"mode": "post"}, "'mode' of module '' is 'post', not 'pre'"),
        ({"axis": 1}, "'axis' of module '' is 1, not -1"),
        ({"temperature": 2.0}, r"'temperature' of module '' is 2\.0, not 1\.0"),
        ({"act": torch.tanh}, r"'act' of module '' is 'the function .*tanh', not 'the function .*relu'"),
    ],
)
def test_settings_of_a_module_have_to_be_the_same(changed: dict[str, Any], says: str) -> None:
    plan = lncompile.plan(randomised(Settled()), IDS)
    assert plan == lncompile.FoldPlan.from_dict(plan.to_dict())
    target = randomised(Settled())
    target.calls, target.dropout = 7, 0.3
    assert plan.apply(target), "what calls change may differ, and what is for training"
    target = randomised(Settled(**changed))
    before = state(target)
    with pytest.raises(lncompile.PlanError, match=says):
        plan.apply(target)
    assert same(target, before)
    assert type(target.norm) is nn.LayerNorm


def test_a_forward_that_was_replaced() -> None:
    plan = lncompile.plan(randomised(Residual()), IDS)
    target = randomised(Residual())
    target.branch.forward = lambda x: x
    with pytest.raises(
        lncompile.PlanError, match=r"'forward' of module 'branch' is 'the function .*lambda>', not None"
    ):
        plan.apply(target)


@pytest.mark.parametrize("path", ["", "branch", "norm"])
def test_hooks_of_a_target(path: str) -> None:
    plan = lncompile.plan(randomised(Residual()), IDS)
    target = randomised(Residual())
    target.get_submodule(path).register_forward_pre_hook(shift_hidden_states)
    with pytest.raises(lncompile.PlanError, match=rf"module '{path}' has the hooks .*shift_hidden_states"):
        plan.apply(target)
    hooked = lncompile.plan(target, IDS)
    assert hooked.form.hooks == {path: (f"{__name__}.shift_hidden_states",)}
    assert hooked.apply(target)
    with pytest.raises(lncompile.PlanError, match=r"and in the plan's model the hooks .*shift_hidden_states"):
        hooked.apply(randomised(Residual()))


def shift_hidden_states(module: nn.Module, args: Any) -> None:
    """A hook that changes nothing, which its name does not say."""


# --- failures ---


def test_a_failure_behind_the_values_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomised(Tied())
    plan = lncompile.plan(model, IDS, untie=True, absorb="bias")
    assert plan.absorb
    assert plan.lookups
    before, modules, parameters = state(model), dict(model.named_modules()), dict(model.named_parameters())
    for name in ("_put_tables", "_exchange", "_finish_absorption"):
        original = getattr(application, name)

        def fails(*args: Any, original: Any = original) -> None:
            original(*args)
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(application, name, fails)
            with pytest.raises(MemoryError):
                plan.apply(model)
        assert dict(model.named_modules()) == modules, name
        now = dict(model.named_parameters())
        assert all(now[own] is parameter for own, parameter in parameters.items()), name
        assert now.keys() == parameters.keys()
        assert model.head.weight is model.table.weight
        assert same(model, before)
    assert error(plan.apply(copy.deepcopy(model)), model, IDS) <= TOLERANCE


# --- values that a dtype does not hold ---


def test_a_weight_that_half_precision_cannot_hold_once_it_is_centered() -> None:
    model = randomised(Residual()).half()
    with torch.no_grad():
        model.branch.weight[0, 0], model.branch.weight[1:, 0] = 6e4, -6e4
    plan = lncompile.plan(model, IDS)
    before = state(model)
    with pytest.raises(
        lncompile.PlanError, match=r"'branch\.weight' would have values that torch\.float16 cannot hold"
    ):
        plan.apply(model)
    assert same(model, before)
    assert plan.apply(copy.deepcopy(model).float()).branch.weight.isfinite().all()
    with torch.no_grad():
        model.branch.weight[0, 0] = float("nan")
    with pytest.raises(lncompile.PlanError, match="or has some that are not finite"):
        plan.apply(model)


@pytest.mark.parametrize(
    ("scale", "says"), [(1e5, "cannot hold"), (1e-6, "so small that torch.float16 loses them"), (0.1, "")]
)
def test_a_scale_that_half_precision_does_not_hold_in_the_weight(scale: float, says: str) -> None:
    model = randomised(Scaled())
    plan = lncompile.plan(model, IDS)
    assert {name for entry in plan.center for name in entry.scaled_by} == {"scale"}
    with torch.no_grad():
        model.branch.weight.mul_(6e4 / model.branch.weight.abs().max() / max(scale, 1) if scale > 1 else 1)
        model.scale.fill_(min(scale, 6e4))
        model.branch.weight.mul_(4 if scale > 1 else 1)
    half = copy.deepcopy(model).half()
    before = state(half)
    if not says:
        assert plan.apply(half)
        return
    with pytest.raises(lncompile.PlanError, match=says):
        plan.apply(half)
    assert same(half, before)
    assert error(plan.apply(copy.deepcopy(model)), model, IDS) <= 1e-9


def test_inference_mode_is_refused_with_what_to_do() -> None:
    model = randomised(Residual())
    plan = lncompile.plan(model, IDS)
    with torch.inference_mode():
        with pytest.raises(
            lncompile.PlanError, match=r"cannot fold a model under torch\.inference_mode\(\).*Do it before"
        ):
            lncompile.fold(model, IDS)
        with pytest.raises(lncompile.PlanError, match="cannot apply a plan"):
            plan.apply(model)
        assert lncompile.plan(model, IDS) == plan
    assert not any(isinstance(module, RMSNorm) for module in model.modules())
