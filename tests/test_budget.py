"""Placement within a budget of memory: against brute force, on a tied GPT-2, and as users meet it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from architectures import randomise
from graphs import Captured, capture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import lncompile
from lncompile.options import OptionError, Options, parse_options
from lncompile.passes import placement as placement_module
from lncompile.passes.axes import Axes
from lncompile.passes.budget import Budgeted, limit_in_bytes, place_within
from lncompile.passes.costs import Bytes, CostModel
from lncompile.passes.decisions import Blocker, Reason
from lncompile.passes.placement import place
from lncompile.passes.streams import Variable, VariableKey

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
AXES = Axes.trailing((2, 8), 1)


# --- against brute force ---


@dataclass(frozen=True)
class FakeSite:
    """All that placement reads of a site."""

    node: fx.Node
    input: fx.Node
    worth: int
    axes: Axes = AXES


Problem = tuple[dict[VariableKey, Variable], list[FakeSite]]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A few weights, and tensors made of them and of each other; some can be centered explicitly, at a cost."""
    weights, tensors = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    graph = fx.Graph()
    variables: dict[VariableKey, Variable] = {}
    nodes = []
    for index in range(weights + tensors):
        node = graph.placeholder(f"v{index}")
        variable = Variable(node, AXES)
        if index < weights:
            # Whole bytes, several of one size: ties are the rule in models.
            node.meta["example_value"] = torch.empty(draw(st.integers(1, 5)), dtype=torch.uint8)
            variable.parameter, variable.centering_cost = node, Bytes(0, 0)
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, "a parameter", node)
        else:
            cost = draw(st.one_of(st.none(), st.integers(0, 8)))
            variable.centering_cost = None if cost is None else Bytes(cost, cost)
            operands = draw(st.lists(st.integers(0, index - 1), min_size=1, max_size=3, unique=True))
            variable.needs = {nodes[operand]: AXES for operand in operands}
        nodes.append(node)
        variables[variable.key] = variable
    sites = [
        FakeSite(node, node, draw(st.integers(1, 8)))
        for node in draw(st.lists(st.sampled_from(nodes[weights:]), min_size=1, max_size=4))
    ]
    return variables, sites


def frontier(variables: dict[VariableKey, Variable], sites: list[FakeSite]) -> dict[int, int]:
    """The most that can be saved with copies of each number of bytes."""
    weights = [v for v in variables.values() if v.parameter is not None]
    tensors = [v for v in variables.values() if v.parameter is None]
    best: dict[int, int] = {}
    for copied in itertools.product((False, True), repeat=len(weights)):
        size = sum(
            v.node.meta["example_value"].nbytes for v, is_copied in zip(weights, copied, strict=True) if is_copied
        )
        for explicit in itertools.product((False, True), repeat=len(tensors)):
            available = {v.key: is_copied for v, is_copied in zip(weights, copied, strict=True)}
            saved = 0
            for variable, is_explicit in zip(tensors, explicit, strict=True):
                is_stream = all(available[need] for need in variable.needs.items())
                available[variable.key] = is_stream or (is_explicit and variable.centering_cost is not None)
                if is_explicit and not is_stream and variable.centering_cost is not None:
                    saved -= variable.centering_cost.hint
            saved += sum(site.worth for site in sites if available[(site.input, site.axes)])
            best[size] = max(best.get(size, 0), saved)
    return best


def within(problem: Problem, limit: int) -> Budgeted:
    variables, sites = problem
    return place_within(limit, sites, variables, True, CostModel())  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(problems())
def test_no_placement_with_as_many_bytes_saves_more(problem: Problem) -> None:
    """At every budget: what is chosen fits, is optimal for the bytes that are proven, and saves no less with more."""
    variables, sites = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(placement_module, "benefit", lambda site, costs: Bytes(site.worth, site.worth))
        best = frontier(variables, sites)
        everything = sum(v.node.meta["example_value"].nbytes for v in variables.values() if v.parameter is not None)
        before = 0
        for limit in range(everything + 1):
            chosen = within(problem, limit)
            saved = chosen.placement.saved.hint
            assert chosen.proven <= chosen.used <= limit
            assert saved >= max(value for size, value in best.items() if size <= chosen.proven)
            assert saved <= max(value for size, value in best.items() if size <= limit)
            if limit == 0:
                assert chosen.used == 0
                assert saved == best[0]
            before = max(before, saved)
        # Everything fits: what is chosen without a limit.
        assert chosen.placement == place(sites, variables)  # type: ignore[arg-type]
        assert before == saved == max(best.values())
