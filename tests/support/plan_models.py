"""Small models whose folds are known, for the tests of fold plans."""

from __future__ import annotations

import copy
from typing import Any

import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.verification import floating_outputs, relative_error

WIDTH, WORDS = 16, 48
TOLERANCE = 1e-10
IDS = torch.arange(10).reshape(2, 5)


def value(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    return randomise(model.double(), seed).eval()


def error(model: nn.Module, other: nn.Module, *args: Any, **kwargs: Any) -> float:
    """The largest relative difference between the outputs of two models."""
    expected, actual = floating_outputs(other(*args, **kwargs)), floating_outputs(model(*args, **kwargs))
    assert expected.keys() == actual.keys()
    return max(relative_error(actual[name], reference) for name, reference in expected.items())


def check(model: nn.Module, folded: int, total: int, *calls: tuple[Any, ...], **options: Any) -> lncompile.FoldPlan:
    """Plan a model with example calls, apply the plan to a copy, compare; and a control without centering."""
    first, *others = calls
    more = [lncompile.Call(*arguments) for arguments in others]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = lncompile.plan(model, *first, more_calls=more, **options)
    assert (plan.folded, plan.total) == (folded, total), str(plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    changed = plan.apply(copy.deepcopy(model))
    assert list(changed.state_dict()) == list(model.state_dict())
    for arguments in calls:
        assert error(changed, model, *arguments) <= TOLERANCE
    if plan.replace and plan.center:
        control = plan.replace_modules(copy.deepcopy(model))
        assert max(error(control, model, *arguments) for arguments in calls) > 1e-4, "the control: nothing is centered"
    return plan


class Residual(nn.Module):
    """An embedding, a residual branch, and a head."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, width)
        self.norm, self.branch = nn.LayerNorm(width), nn.Linear(width, width)
        self.final, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)

    def forward(self, ids: Tensor, scale: float = 1.0) -> dict[str, Tensor | float]:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return {"logits": self.head(self.final(stream)) * scale, "scale": scale}


class Tied(Residual):
    """With a head that reads the table."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(width)
        self.head.weight = self.table.weight


class Once(nn.Module):
    """A layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.norm(self.linear(x))


class Scaled(nn.Module):
    """A branch with LayerScale, which the layer before it takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.scale = nn.Embedding(WORDS, WIDTH), nn.Parameter(torch.ones(WIDTH))
        self.norm, self.branch, self.final = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.final(x + self.scale * self.branch(self.norm(x)))


class QueriesAndKeysNormed(nn.Module):
    """Queries and keys are normed head by head, values are not: a part of the joint projection is centered."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q_norm, self.k_norm = nn.LayerNorm(WIDTH // heads), nn.LayerNorm(WIDTH // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.out(attended.transpose(1, 2).flatten(2))


class CalledTwice(Once):
    """One layer and one norm, called twice in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.relu(self.norm(self.linear(x)))))


class CalledTwiceOnce(Once):
    """One norm: one call of it folds, the other cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(torch.relu(x))))


def centered(plan: lncompile.FoldPlan) -> list[str]:
    return [entry.name for entry in plan.center]


def kept(plan: lncompile.FoldPlan) -> dict[str, str]:
    return {entry.name: entry.reason for entry in plan.kept}


def becomes(plan: lncompile.FoldPlan) -> list[str]:
    return [norm.becomes for norm in plan.norms]
