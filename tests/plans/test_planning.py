"""What a plan says of a model, and what it may center."""

from __future__ import annotations

import copy

import pytest
import torch
from plan_models import (
    IDS,
    WIDTH,
    CalledTwice,
    CalledTwiceOnce,
    Once,
    QueriesAndKeysNormed,
    Residual,
    Tied,
    becomes,
    centered,
    check,
    kept,
    randomised,
    value,
)
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.nn import RMSNorm
from lncompile.plans.entries import Centering


def test_a_residual_stream() -> None:
    plan = check(randomised(Residual()), 2, 2, (IDS,))
    assert centered(plan) == ["table.weight", "branch.weight", "branch.bias"]
    assert [entry.centerings for entry in plan.center] == [
        (Centering((48, 16), (1,)),),
        (Centering((16, 16), (0,)),),
        (Centering((16,), (0,)),),
    ]
    assert [(norm.path, norm.normalized_shape, norm.weight, norm.bias) for norm in plan.replace] == [
        ("norm", (16,), "weight", "bias"),
        ("final", (16,), "weight", "bias"),
    ]
    assert not plan.kept
    assert not plan.lookups
    assert not plan.unreached
    assert becomes(plan) == ["rms_norm", "rms_norm"]


def test_the_table_names_what_is_done() -> None:
    words = " ".join(str(lncompile.plan(randomised(Tied()), IDS)).split())
    assert "Tied: 2 of 2 LayerNorms fold, 2 of them to an RMSNorm; 2 parameters are centered." in words
    for part in ("branch.weight", "[16, 16]", "axis 0", "centered at each call", "tied: head.weight"):
        assert part in words


def test_layers_alike_share_a_line() -> None:
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)) for _ in range(4)))
    assert "{0..3}.0.weight" in str(check(randomised(blocks), 4, 4, (value(2, 3),)))


# --- what may be centered ---


class ReadRawAsWell(Once):
    """The bias is also read as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) + self.linear.bias.square()


def test_a_parameter_that_is_read_as_it_is_stays() -> None:
    plan = check(randomised(ReadRawAsWell()), 0, 1, (value(2, 3),))
    assert plan.is_empty
    assert "is also read as it is: square" in kept(plan)["linear.bias"]
    assert "'linear.bias' is also read as it is: square" in plan.norms[0].detail


class TwoStreams(nn.Module):
    """Two streams share one layer, of which one is seen raw; a third has layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.first, self.second, self.third = (nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        seen, other = self.shared(x), self.own(x)
        return self.first(self.shared(torch.relu(x))) + self.second(seen) + torch.tanh(seen) + self.third(other)


def test_what_depends_on_a_parameter_that_stays_stays_and_the_rest_folds() -> None:
    plan = check(randomised(TwoStreams()), 1, 3, (value(2, 3),))
    assert [norm.path for norm in plan.replace] == ["third"]
    assert centered(plan) == ["own.weight", "own.bias"]
    assert "is also read as it is: linear (shared" in kept(plan)["shared.weight"]
    assert becomes(plan) == ["layer_norm", "layer_norm", "rms_norm"]


def test_a_module_that_is_called_twice_is_replaced_if_both_calls_fold() -> None:
    plan = check(randomised(CalledTwice()), 2, 2, (value(2, 3),))
    assert [norm.path for norm in plan.replace] == ["norm"]
    plan = check(randomised(CalledTwiceOnce()), 1, 2, (value(2, 3),))
    assert not plan.replace
    assert becomes(plan) == ["layer_norm", "centered"]
    assert "another call of it does not fold" in plan.norms[1].detail


def test_a_shared_module_is_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH)] * 2)
            self.norms = nn.ModuleList([nn.LayerNorm(WIDTH)] * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norms[1](self.layers[1](torch.relu(self.norms[0](self.layers[0](x)))))

    model = randomised(Shared())
    plan = check(model, 2, 2, (value(2, 3),))
    assert (plan.center[0].name, plan.center[0].also) == ("layers.0.weight", ("layers.1.weight",))
    assert [(entry.path, entry.also) for entry in plan.replace] == [("norms.0", ("norms.1",))]
    folded = lncompile.fold(model, value(2, 3))
    assert folded.norms[0] is folded.norms[1]
    assert isinstance(folded.norms[0], RMSNorm)


def test_a_part_of_a_joint_projection() -> None:
    plan = check(randomised(QueriesAndKeysNormed()), 2, 2, (value(2, 5),))
    weight, bias = plan.center
    assert (weight.name, bias.name) == ("qkv.weight", "qkv.bias")
    assert len(weight.centerings) == 2, "queries and keys are centered apart"
    model = randomised(QueriesAndKeysNormed())
    folded = plan.apply(copy.deepcopy(model))
    assert torch.equal(folded.qkv.weight[2 * WIDTH :], model.qkv.weight[2 * WIDTH :]), "values stay as they are"
    assert folded.qkv.weight[: 2 * WIDTH].unflatten(0, (4, -1)).mean(1).abs().max() < 1e-15


class OneStorage(nn.Module):
    """Two parameters on one storage."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(2 * WIDTH, WIDTH, dtype=torch.float64)
        self.upper, self.lower = nn.Parameter(both[:WIDTH]), nn.Parameter(both[WIDTH:])
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.linear(x, self.upper)) + functional.linear(x, self.lower)


class WithBuffer(nn.Module):
    """A table of positions in a buffer."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("positions", torch.randn(5, WIDTH), persistent=persistent)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x) + self.positions)


class Unregistered(nn.Module):
    """A parameter that no state dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = [nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.float64))]
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.linear(x, self.hidden[0]))


def test_memory_that_parameters_share_is_not_written_to() -> None:
    plan = check(OneStorage().eval(), 0, 1, (value(2, 3),))
    assert "'upper' shares its memory with 'lower'" in plan.norms[0].detail


def test_a_buffer_is_centered_if_the_state_dict_has_it() -> None:
    assert "positions" in centered(check(randomised(WithBuffer(True)), 1, 1, (value(2, 5),)))
    plan = check(randomised(WithBuffer(False)), 0, 1, (value(2, 5),))
    assert "not in the state dict" in plan.norms[0].detail


def test_a_parameter_without_a_name_stays() -> None:
    plan = check(Unregistered().double().eval(), 0, 1, (value(2, 3),))
    assert "is not in the model's state dict" in plan.norms[0].detail


class Masked(Once):
    """A weight that is multiplied by a mask before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.linear(x, self.linear.weight * self.mask, self.linear.bias))


def test_an_expression_of_a_parameter_stays() -> None:
    plan = check(randomised(Masked()), 0, 1, (value(2, 3),))
    assert "linear.weight" in kept(plan)


class Adapted(Once):
    """A weight plus a low-rank product: centering both terms centers the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(WIDTH, 3)), nn.Parameter(torch.zeros(3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(functional.linear(x, self.linear.weight + self.up @ self.down, self.linear.bias))


def test_a_sum_of_parameters_is_centered_term_by_term() -> None:
    plan = check(randomised(Adapted()), 1, 1, (value(2, 3),))
    assert sorted(centered(plan)) == ["linear.bias", "linear.weight", "up"]


class LayerScale(nn.Module):
    """A residual branch whose features a parameter scales."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.stem, self.branch = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.final = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.scale, self.way = nn.Parameter(torch.ones(WIDTH)), way

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x)
        branch = self.branch(torch.relu(self.norm(stream)))
        stream = stream + branch * (self.scale.square() if self.way == "expression" else self.scale)
        result = self.final(stream)
        if self.way == "scale":
            return result * self.scale
        return result + self.branch(result) if self.way == "layer" else result


def test_a_scale_of_the_features_goes_into_the_layer() -> None:
    model = randomised(LayerScale())
    plan = check(model, 2, 2, (value(2, 3),))
    entry = next(entry for entry in plan.center if entry.name == "branch.weight")
    assert (entry.scaled_by, entry.dimension) == (("scale",), 0)
    assert "axis 0, times scale" in str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert bool((folded.scale == 1).all())
    again = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    assert all(torch.equal(tensor, again[name]) for name, tensor in plan.apply(folded).state_dict().items())
    assert lncompile.plan(folded, value(2, 3)).is_empty
    narrow = plan.apply(copy.deepcopy(model).float())
    exact = plan.apply(copy.deepcopy(model).float().double())
    assert torch.equal(narrow.branch.weight, exact.branch.weight.float()), "rounded once"


@pytest.mark.parametrize("way", ["scale", "layer", "expression"])
def test_a_scale_or_a_layer_that_something_else_reads_stays(way: str) -> None:
    plan = check(randomised(LayerScale(way)), 1, 2, (value(2, 3),))
    assert not any(entry.scaled_by for entry in plan.center)
    assert plan.kept
