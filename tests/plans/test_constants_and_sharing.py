"""What a rewrite of a graph can do and centered parameters cannot; memory and values that a plan must not count on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_models import error, kept, randomised, value
from torch import Tensor, nn
from torch.nn import functional

import lncompile

D = 16
Body = Callable[[Any, Tensor], Tensor]
ROWS = torch.arange(3)[:, None]


class Behind(nn.Module):
    """A norm behind a layer and something else."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.linear, self.norm, self.single = nn.Linear(D, D), nn.LayerNorm(D), nn.Parameter(torch.zeros(1))
        self.register_buffer("column", torch.full((3, 1), 2.0))
        self.row, self.body = nn.Parameter(torch.zeros(D)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.body(self, self.linear(x)))


def _assigned(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 1.0
    return x


#: What is the same for all features, added into a stream.
CONSTANTS: dict[str, Body] = {
    "number": lambda m, x: x + 1.0,
    "number_minus": lambda m, x: 1 - x,
    "scaled": lambda m, x: (x + 3) / 2,
    "in_place": lambda m, x: x.add_(1.0),
    "tensor_of_one": lambda m, x: x + torch.tensor(1.5),
    "parameter_of_one": lambda m, x: x + m.single,
    "function_of_it": lambda m, x: x + torch.tanh(m.single),
    "expanded": lambda m, x: m.single.expand(2, 3, D) + x,
    "column": lambda m, x: x + m.column,
    "filled": lambda m, x: x.masked_fill(ROWS > 0, 2.0),
    "chosen": lambda m, x: torch.where(ROWS > 0, x, 0.5),
    "padded": lambda m, x: functional.pad(x, (0, 0, 1, 0), value=1.0),
    "assigned": _assigned,
    "into_a_parameter": lambda m, x: x + (m.row + 1),
    "stacked": lambda m, x: torch.stack([x, x + 1]),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_a_norm_behind_a_constant_stays(name: str) -> None:
    """A LayerNorm takes it out with the mean; an RMSNorm would see it. The backend rewrites the graph, and folds."""
    model, x = randomised(Behind(CONSTANTS[name])), value(2, 3)
    plan = lncompile.plan(model, x)
    assert (plan.folded, plan.total) == (0, 1)
    assert error(plan.apply(copy.deepcopy(model)), model, x) <= 1e-10
    assert lncompile.explain(model, x).folded == 1, "the control"


@pytest.mark.parametrize("body", [lambda m, x: x + 0.0, lambda m, x: x.masked_fill(ROWS > 0, 0)])
def test_zero_is_no_obstacle(body: Body) -> None:
    model, x = randomised(Behind(body)), value(2, 3)
    plan = lncompile.plan(model, x)
    assert (plan.folded, plan.total) == (1, 1)
    assert error(plan.apply(copy.deepcopy(model)), model, x) <= 1e-10


class Detached(nn.Module):
    """A head on the memory of a table, that the state dict does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(11, D), nn.LayerNorm(D)
        self.head = [self.table.weight.t()]

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.table(ids)) @ self.head[0]


def test_memory_that_a_tensor_without_a_name_shares_is_not_written_to() -> None:
    model, ids = randomised(Detached()), torch.tensor([[1, 2, 3]])
    model.head = [model.table.weight.t()]
    plan = lncompile.plan(model, ids)
    assert plan.folded == 0
    assert "shares its memory with a tensor" in kept(plan)["table.weight"]
    assert error(plan.apply(copy.deepcopy(model)), model, ids) <= 1e-10


class SharedBias(nn.Module):
    """Two layers behind a norm that share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.q, self.k = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)
        self.k.bias = self.q.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.linear(x))
        return self.q(y) * self.k(y)


@pytest.mark.parametrize("absorb", ["bias", "affine"])
def test_layers_that_share_a_bias_take_no_shift(absorb: str) -> None:
    model, x = randomised(SharedBias()), value(2, 3)
    plan = lncompile.plan(model, x, absorb=absorb)
    assert plan.folded == 1
    assert not plan.absorb
    assert error(plan.apply(copy.deepcopy(model)), model, x) <= 1e-10


def test_a_plan_of_new_weights_is_one_of_trained_ones() -> None:
    """New biases are zero, and centered as they are."""
    model, x = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)).double().eval(), value(2, 3)
    nn.init.zeros_(model[0].bias)
    plan = lncompile.plan(model, x)
    assert [entry.name for entry in plan.center] == ["0.weight", "0.bias"]
    trained = randomised(copy.deepcopy(model))
    assert error(plan.apply(copy.deepcopy(trained)), trained, x) <= 1e-10


def test_another_epsilon_is_refused() -> None:
    x = value(2, 3)
    plan = lncompile.plan(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)).double().eval(), x)
    other = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D, eps=0.1)).double().eval()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(lncompile.PlanError, match=r"'eps' of module '1' is 0\.1, not 1e-05"):
        plan.apply(other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize("norm", [{"bias": False}, {"elementwise_affine": False}])
def test_a_plan_of_norms_without_parameters_is_loaded(norm: dict[str, bool], tmp_path: Path) -> None:
    model = randomised(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D, **norm)))
    plan = lncompile.plan(model, value(2, 3))
    plan.save(tmp_path / "plan.json")
    assert lncompile.FoldPlan.load(tmp_path / "plan.json") == plan
    assert plan.folded == 1


class LooksAtTheClass(Behind):
    """Code that depends on what a fold changes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if type(self.norm) is nn.LayerNorm else 1.0)


def test_a_fold_that_answers_in_another_way_is_refused() -> None:
    model = randomised(LooksAtTheClass(lambda m, x: x))
    with pytest.raises(lncompile.PlanError, match="answers example 1 in another way: the relative error"):
        lncompile.fold(model, value(2, 3))


class ReadsTheAttribute(nn.Module):
    """A head that reads the table as the embedding's attribute: there is no other name that keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.branch = nn.Embedding(11, D), nn.Linear(D, D)
        self.first, self.second = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        stream = stream + self.branch(self.first(stream))
        return functional.linear(self.second(stream), self.table.weight)


@pytest.mark.parametrize("untie", [True, False])
def test_a_table_without_another_name_is_centered_behind_its_look_up(untie: bool) -> None:
    model, ids = randomised(ReadsTheAttribute()), torch.tensor([[1, 2, 3]])
    plan = lncompile.plan(model, ids, untie=untie)
    assert plan.folded == 2
    assert [entry.untied for entry in plan.lookups] == [False]
    assert error(plan.apply(copy.deepcopy(model)), model, ids) <= 1e-10
