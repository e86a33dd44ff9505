"""Plans of several calls, of tied tables, and of models that one graph does not hold."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from plan_models import (
    IDS,
    WIDTH,
    CalledTwiceOnce,
    Once,
    QueriesAndKeysNormed,
    Residual,
    Tied,
    becomes,
    centered,
    check,
    error,
    kept,
    randomised,
    value,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lncompile
from lncompile.nn import CenteredEmbedding

# --- several calls ---


class TwoWays(nn.Module):
    """Reads a layer into a norm, or raw; returns its stream if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.other = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, way: str = "normed") -> Any:
        stream = self.linear(x)
        if way == "raw":
            return torch.tanh(stream)
        if way == "states":
            return self.norm(stream), stream
        return self.other(self.norm(stream)) if way == "other" else self.norm(stream)

    def raw(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def test_what_one_call_reads_raw_stays_everywhere() -> None:
    x = value(2, 3)
    plan = check(randomised(TwoWays()), 1, 1, (x,))
    assert plan.unreached == ("other.weight", "other.bias")
    assert "other.weight" in str(plan)
    assert not check(randomised(TwoWays()), 1, 1, (x,), (x, "other")).unreached
    plan = check(randomised(TwoWays()), 0, 1, (x,), (x, "raw"))
    assert "is also read as it is in call 2: linear" in kept(plan)["linear.weight"]
    plan = check(randomised(TwoWays()), 0, 1, (x,), (x, "states"))
    assert plan.norms[0].calls == 2


def test_a_method_is_an_example_as_well() -> None:
    x, model = value(2, 3), randomised(TwoWays())
    plan = lncompile.plan(model, x, more_calls=[lncompile.Call.of("raw", x)])
    assert plan.folded == 0
    assert lncompile.plan(model, more_calls=[lncompile.Call(x), lncompile.Call(x, way="other")]).folded == 1


def test_a_stream_that_is_returned_does_not_fold() -> None:
    plan = check(randomised(TwoWays()), 0, 1, (value(2, 3), "states"))
    assert "returned" in plan.norms[0].detail


class InABody(nn.Module):
    """Norms and look-ups that another call does inside of an operator that runs a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(48, WIDTH), nn.Linear(WIDTH, 48)
        self.head.weight = self.table.weight
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=False)

    def forward(self, ids: Tensor, way: str = "") -> Tensor:
        if way == "norm":
            return checkpoint(self.second, torch.relu(self.table(ids)), use_reentrant=False)
        if way == "table":
            return checkpoint(lambda ids: torch.relu(self.table(ids)), ids, use_reentrant=False)
        stream = self.table(ids)
        return self.head(torch.relu(self.first(stream)) + self.second(stream))


@pytest.mark.parametrize(("way", "replaced", "folded"), [("", 2, 2), ("norm", 0, 0), ("table", 0, 0)])
def test_calls_inside_of_operators_count(way: str, replaced: int, folded: int) -> None:
    plan = check(randomised(InABody()), folded, 2, (IDS,), (IDS, way))
    assert len(plan.replace) == replaced
    assert len(plan.lookups) == (1 if replaced else 0)


class NormInABody(Once):
    """The same norm on a raw input, inside of an operator that runs a graph."""

    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=affine)

    def forward(self, x: Tensor, inside: bool = False) -> Tensor:
        return checkpoint(self.norm, x, use_reentrant=False) if inside else self.norm(self.linear(x))


@pytest.mark.parametrize("affine", [False, True])
def test_a_norm_that_is_also_called_inside_of_an_operator_stays(affine: bool) -> None:
    plan = check(randomised(NormInABody(affine)), 0, 1, (value(2, 3),), (value(2, 3), True))
    assert not plan.replace
    assert [entry.name for entry in plan.center] == ["linear.weight", "linear.bias"], "one call of it has a zero mean"


# --- tied tables ---


class OneNormBehind(nn.Module):
    """A tied table with one norm behind it: centering it at each call would cost what the fold saves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(48, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 48)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.table(ids))))


class Scaled(nn.Embedding):
    """An embedding that scales what it looks up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 4.0


def test_a_tied_table_is_centered_behind_its_look_up() -> None:
    model = randomised(Tied())
    plan = check(model, 2, 2, (IDS,))
    assert [(entry.path, entry.table, entry.tied, entry.untied) for entry in plan.lookups] == [
        ("table", "table.weight", ("head.weight",), False)
    ]
    assert centered(plan) == ["branch.weight", "branch.bias"]
    folded = plan.apply(copy.deepcopy(model))
    assert isinstance(folded.table, CenteredEmbedding)
    assert folded.table.weight is folded.head.weight
    assert torch.equal(folded.table.weight, model.table.weight)
    model.table = Scaled(48, WIDTH).double()
    model.head.weight = model.table.weight
    assert check(randomised(model), 2, 2, (IDS,)).lookups


def test_a_tied_table_can_be_untied() -> None:
    model = randomised(Tied())
    plan = check(model, 2, 2, (IDS,), untie=True)
    assert [(entry.untied, entry.bytes) for entry in plan.lookups] == [(True, 48 * WIDTH * 8)]
    assert "untied: 6144" in str(plan)
    folded = plan.apply(copy.deepcopy(model))
    assert type(folded.table) is nn.Embedding
    assert torch.equal(folded.head.weight, model.head.weight)
    assert folded.table.weight.mean(1).abs().max() < 1e-15
    again = plan.apply(folded)
    assert error(again, model, IDS) <= 1e-10


def test_one_norm_is_not_worth_a_centering_at_each_call() -> None:
    plan = check(randomised(OneNormBehind()), 0, 1, (IDS,))
    assert "is also read as it is: linear (head" in kept(plan)["table.weight"]
    assert check(randomised(OneNormBehind()), 1, 1, (IDS,), untie=True).lookups


class TwoLookups(nn.Module):
    """Two embeddings and a head share a table. One stream has two norms, the other one."""

    def __init__(self) -> None:
        super().__init__()
        self.long, self.short, self.head = nn.Embedding(48, WIDTH), nn.Embedding(48, WIDTH), nn.Linear(WIDTH, 48)
        self.short.weight = self.head.weight = self.long.weight
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        long, short = self.long(ids), self.short(ids)
        return self.head(self.norms[0](long) + torch.relu(self.norms[1](long)) + self.norms[2](short))


def test_each_look_up_is_worth_it_by_itself() -> None:
    plan = check(randomised(TwoLookups()), 2, 3, (IDS,))
    assert [entry.path for entry in plan.lookups] == ["long"]
    plan = check(randomised(TwoLookups()), 3, 3, (IDS,), untie=True)
    assert [entry.path for entry in plan.lookups] == ["long", "short"]
    folded = plan.apply(randomised(TwoLookups()))
    assert folded.long.weight is folded.short.weight is not folded.head.weight


class NormOfHeads(nn.Module):
    """What is looked up in a tied table is normed in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(48, WIDTH), nn.Linear(WIDTH, 48)
        self.head.weight = self.table.weight
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH // 2) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        groups = self.table(ids).unflatten(-1, (2, -1))
        return self.head(sum(torch.relu(norm(groups)) for norm in self.norms).flatten(-2))


def test_rows_of_a_tied_table_are_centered_as_a_whole_or_not() -> None:
    plan = check(randomised(NormOfHeads()), 0, 3, (IDS,))
    assert "in parts of its rows" in kept(plan)["table.weight"]
    check(randomised(NormOfHeads()), 0, 3, (IDS,), untie=True)


# --- capture ---


class Breaks(Residual):
    """A graph break in the middle of the residual stream."""

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        torch._dynamo.graph_break()
        return self.head(self.final(stream + self.branch(torch.relu(self.norm(stream)))))


class Picks(Breaks):
    """Picks positions of the stream with an index tensor, or features along the normalised axis."""

    def __init__(self, features: bool = False) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("picked", torch.tensor([2, 0, 2, 1]))

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        torch._dynamo.graph_break()
        if self.features:
            return self.head(
                self.final(stream.transpose(0, 2)[self.picked].mean(0, keepdim=True).transpose(0, 2) + stream)
            )
        return self.head(self.final(stream[:, self.picked]))


class Decides(Once):
    """What it does depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) if x.sum() > 0 else self.linear(x)


def test_a_graph_break_is_passed() -> None:
    plan = check(randomised(Breaks()), 2, 2, (IDS,))
    assert centered(plan) == ["table.weight", "branch.weight", "branch.bias"]
    assert becomes(plan) == ["rms_norm", "rms_norm"]


def test_index_tensors_in_atens_words() -> None:
    """torch.export writes them as aten.index."""
    plan = check(randomised(Picks()), 1, 1, (IDS,))
    assert centered(plan) == ["table.weight"]
    assert becomes(plan) == ["rms_norm"]
    stays = check(randomised(Picks(features=True)), 0, 1, (IDS,))
    assert becomes(stays) == ["layer_norm"]


def test_a_model_that_decides_by_values_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on the values of its tensors"):
        lncompile.plan(randomised(Decides()), value(2, 3))


def test_training_mode_and_functions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        lncompile.plan(Residual().train(), IDS)
    with pytest.raises(TypeError, match="takes a module"):
        lncompile.plan(torch.relu, IDS)


def test_a_compiled_model_and_a_model_without_norms() -> None:
    model = randomised(Residual())
    assert lncompile.plan(torch.compile(model, backend="eager"), IDS).folded == 2
    plan = check(nn.Identity().eval(), 0, 0, (value(2, 3),))
    assert plan.is_empty


def test_a_cache_that_a_call_appends_to_stays_as_it_was() -> None:
    class Appends(Once):
        def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
            cache.append(x)
            return self.norm(self.linear(sum(cache)))

    cache = [value(2, 3, seed=1)]
    assert lncompile.plan(randomised(Appends()), value(2, 3), cache).folded == 1
    assert len(cache) == 1


@pytest.mark.parametrize("model", [Residual, Tied, QueriesAndKeysNormed, CalledTwiceOnce])
def test_on_the_meta_device_the_plan_is_the_same(model: type[nn.Module]) -> None:
    x = IDS if issubclass(model, Residual) else value(2, 5)
    with torch.device("meta"):
        empty = model().double().eval()
    assert lncompile.plan(empty, x.to("meta")) == lncompile.plan(randomised(model()), x)
    assert all(parameter.device.type == "meta" for parameter in empty.parameters())


def test_norms_of_one_layer_have_a_line_each() -> None:
    """``ln_1`` and ``ln_2`` are names, and not the numbers of layers."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(self.ln_1(x))
            return x + self.second(self.ln_2(x))

    model = nn.Sequential(nn.Linear(16, 16), Layer(), Layer(), nn.LayerNorm(16))
    text = str(lncompile.plan(model.eval(), torch.randn(2, 16)))
    assert "{1..2}.ln_1" in text
    assert "{1..2}.ln_2" in text
