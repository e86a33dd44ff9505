"""`lncompile.plan`: which parameters are centered, which stay and why, and that the model computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from plan_models import IDS, WIDTH, Once, QueriesAndKeysNormed, Residual, Tied, check, error, randomised, value
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.plans.entries import Centering


def centered(plan: lncompile.FoldPlan) -> list[str]:
    return [entry.name for entry in plan.center]


def kept(plan: lncompile.FoldPlan) -> dict[str, str]:
    return {entry.name: entry.reason for entry in plan.kept}


def becomes(plan: lncompile.FoldPlan) -> list[str]:
    return [norm.becomes for norm in plan.norms]


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
    words = str(lncompile.plan(randomised(Tied()), IDS))
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


class CalledTwice(Once):
    """One layer and one norm, called twice in the same way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(torch.relu(self.norm(self.linear(x)))))


class CalledTwiceOnce(Once):
    """One norm: one call of it folds, the other cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.norm(torch.relu(x))))


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
    assert "untied: 6144 bytes for a table of its own" in str(plan)
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


# --- norms of other classes ---


class Renamed(nn.Module):
    """γ and β under other names, computed in float32 or wider."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (hidden.shape[-1],), self.gamma, self.beta, 1e-3)


class OnePlus(Renamed):
    """γ is one more than its parameter."""

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.layer_norm(hidden, (hidden.shape[-1],), self.gamma + 1, self.beta, 1e-3)


class Added(Renamed):
    """The norm, and its input."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden) + 2.0


class Handwritten(Renamed):
    """A norm written by hand."""

    def forward(self, hidden: Tensor) -> Tensor:
        mean = hidden.mean(-1, keepdim=True)
        variance = (hidden - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * ((hidden - mean) / torch.sqrt(variance + 1e-3)) + self.beta


class Wide(Renamed):
    """Computed in double precision, and returned in the dtype that came."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.float64)
        result = functional.layer_norm(wide, (hidden.shape[-1],), self.gamma.double(), self.beta.double(), 1e-3)
        return result.to(hidden.dtype)


NORMS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer_norm": (lambda: nn.LayerNorm(WIDTH), "rms_norm"),
    "no_affine": (lambda: nn.LayerNorm(WIDTH, elementwise_affine=False), "rms_norm"),
    "no_bias": (lambda: nn.LayerNorm(WIDTH, bias=False), "rms_norm"),
    "renamed": (lambda: Renamed(WIDTH), "rms_norm"),
    "wide": (lambda: Wide(WIDTH), "rms_norm"),
    "one_plus": (lambda: OnePlus(WIDTH), "centered"),
    "added": (lambda: Added(WIDTH), "centered"),
    "handwritten": (lambda: Handwritten(WIDTH), "centered"),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_other_classes(name: str) -> None:
    make, outcome = NORMS[name]
    model = Once()
    model.norm = make()
    plan = check(randomised(model), 1, 1, (value(2, 3),))
    assert becomes(plan) == [outcome]
    if outcome == "rms_norm":
        (entry,) = plan.replace
        assert entry.eps == (1e-5 if "layer" in name or "no_" in name else 1e-3)
        assert isinstance(plan.apply(randomised(model)).norm, RMSNorm)


def test_a_norm_over_other_axes_stays_on_a_centered_stream() -> None:
    class ChannelsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, WIDTH, 3), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).permute(0, 2, 3, 1))

    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert becomes(check(randomised(ChannelsFirst()), 1, 1, (x,))) == ["rms_norm"], "permuted outside of the norm"

    class Inside(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), Inside(WIDTH))
    assert becomes(check(randomised(model), 1, 1, (x,))) == ["centered"]


def test_a_norm_with_a_hook_is_not_replaced() -> None:
    model = randomised(Once())
    model.norm.register_forward_hook(lambda module, args, output: None)
    assert becomes(check(model, 1, 1, (value(2, 3),))) == ["centered"]


# --- capture ---


class Breaks(Residual):
    """A graph break in the middle of the residual stream."""

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.table(ids)
        torch._dynamo.graph_break()
        return self.head(self.final(stream + self.branch(torch.relu(self.norm(stream)))))


class Decides(Once):
    """What it does depends on a value."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) if x.sum() > 0 else self.linear(x)


def test_a_graph_break_is_passed() -> None:
    plan = check(randomised(Breaks()), 2, 2, (IDS,))
    assert centered(plan) == ["table.weight", "branch.weight", "branch.bias"]
    assert becomes(plan) == ["rms_norm", "rms_norm"]


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
