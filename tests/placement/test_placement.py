"""The minimum cut against brute force, and ties: what merely breaks even is left alone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from architectures import randomise
from graphs import capture
from hypothesis import given, settings
from hypothesis import strategies as st
from shifts import shifted_from
from torch import Tensor, fx, nn
from torch.nn import functional

from lncompile.options import Options
from lncompile.passes.decisions import Blocker, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.placement import cut
from lncompile.passes.placement.costs import Bytes
from lncompile.passes.placement.cut import place
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.verdicts.judge import describe_centerings

AXES = Axes.trailing((2, 8), 1)


@dataclass(frozen=True)
class FakeSite:
    """All that placement reads of a site."""

    input: fx.Node
    worth: int
    axes: Axes = AXES
    folded_before: bool = False


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[VariableKey, Variable], list[FakeSite]]:
    """A random small stream graph: a few tensors, their operands among the earlier ones, blockers, costs, sites."""
    count = draw(st.integers(1, 6))
    graph = fx.Graph()
    nodes = [graph.placeholder(f"v{index}") for index in range(count)]
    variables: dict[VariableKey, Variable] = {}
    for index, node in enumerate(nodes):
        variable = Variable(node, AXES)
        cost = draw(st.one_of(st.none(), st.integers(0, 6)))
        variable.centering_cost = None if cost is None else Bytes(cost, cost)
        if draw(st.booleans()):
            variable.source_blocker = Blocker(Reason.NON_COMMUTING, "cannot be computed centered", node)
        if draw(st.integers(0, 3)) == 0:
            variable.reader_blocker = Blocker(Reason.VISIBLE, "somebody notices", node)
        operands = draw(st.lists(st.integers(0, index - 1), max_size=2, unique=True)) if index else []
        variable.needs = {nodes[operand]: AXES for operand in operands}
        making = draw(st.sampled_from((0, 0, 1, 3)))
        variable.making_cost = Bytes(making, making)
        variables[variable.key] = variable
    for variable in variables.values():
        for operand in variable.needs:
            # A shift spreads to what is computed linearly from it.
            variables[(operand, AXES)].successors.append(variable.key)
    sites = [
        FakeSite(nodes[draw(st.integers(0, count - 1))], draw(st.integers(1, 6)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    return variables, sites


def brute_force(variables: dict[VariableKey, Variable], sites: list[FakeSite]) -> tuple[int, int]:
    """The least cost over all assignments, and the fewest tensors centered at that cost."""
    keys = list(variables)
    unseen = {key: shifted_from(key, variables) is not None for key in keys}
    best = (10**9, 10**9)
    for bits in itertools.product((False, True), repeat=2 * len(keys)):
        stream = dict(zip(keys, bits[: len(keys)], strict=True))
        available = dict(zip(keys, bits[len(keys) :], strict=True))
        cost = 0
        legal = True
        for key, variable in variables.items():
            if stream[key]:
                legal &= available[key] and variable.source_blocker is None and unseen[key]
                legal &= all(available[need] for need in variable.needs.items())
                cost += variable.making_cost.hint
            elif available[key]:
                legal &= variable.centering_cost is not None
                cost += variable.centering_cost.hint if variable.centering_cost else 0
        if legal:
            cost += sum(site.worth for site in sites if not available[(site.input, site.axes)])
            best = min(best, (cost, sum(stream.values()) + sum(available.values())))
    return best


@settings(max_examples=150, deadline=None)
@given(problems())
def test_the_cut_is_the_optimum_and_does_the_least(problem: tuple[dict[VariableKey, Variable], list[FakeSite]]) -> None:
    variables, sites = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cut, "benefit", lambda site, costs: Bytes(site.worth, site.worth))
        placement = place(sites, variables)  # type: ignore[arg-type]
    cost, touched = brute_force(variables, sites)
    assert sum(site.worth for site in sites) - placement.saved.hint == cost
    assert len(placement.streams) + len(placement.centered) == touched


class Streams(nn.Module):
    """An activation that starts a stream, read by `norms` LayerNorms after that many residual adds."""

    def __init__(self, norms: int, raw_read: bool = False) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(8, 8) for _ in range(norms)])
        self.norms = nn.ModuleList([nn.LayerNorm(8) for _ in range(norms)])
        self.raw_read = raw_read

    def forward(self, value: Tensor) -> Tensor:
        stream = start = functional.gelu(value)
        out = start.new_zeros(())
        for inner, norm in zip(self.inner, self.norms, strict=True):
            normed = norm(stream)
            out = out + normed.sum()
            stream = stream + inner(functional.relu(normed))
        return out + (functional.relu(start).sum() if self.raw_read else 0)


def test_amounts_are_formulas_in_the_dynamic_sizes() -> None:
    """Two norms of [n, 8] in float64 save 2 · 64n bytes, one centering of it costs 64n."""
    value = torch.randn(6, 8, dtype=torch.float64)
    torch._dynamo.mark_dynamic(value, 0)
    analysis = capture(randomise(Streams(2).double()), value).analyse(Options())
    assert analysis.placement is not None
    saved = analysis.placement.saved
    (size,) = saved.formula.free_symbols
    assert saved.formula == 64 * size
    assert saved.hint == 64 * 6
    (centering,) = describe_centerings(analysis.placement, analysis.variables, analysis.costs)
    assert f"costs {64 * size} bytes of memory traffic a call, saves {128 * size}" in centering.detail


@pytest.mark.parametrize(
    ("norms", "raw_read", "assist", "folded", "centerings"),
    [
        (1, False, "auto", 0, 0),  # break-even: one centering for one norm
        (2, False, "auto", 2, 1),
        (2, False, "off", 0, 0),
        (2, True, "auto", 0, 0),  # the raw tensor must be written as well: break-even again
        (3, True, "auto", 2, 1),  # centered one residual add later, where nobody reads it raw
    ],
)
def test_a_runtime_centering_pays_only_where_it_saves_more(
    norms: int, raw_read: bool, assist: str, folded: int, centerings: int
) -> None:
    captured = capture(randomise(Streams(norms, raw_read).double()), torch.randn(4, 8, dtype=torch.float64))
    analysis = captured.analyse(Options(assist=assist))
    assert sum(verdict.folded for verdict in analysis.verdicts) == folded
    placement = analysis.placement
    explicit = placement.centered - placement.streams if placement else set()
    assert sum(not analysis.variables[key].is_parameter for key in explicit) == centerings
