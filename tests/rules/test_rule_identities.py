"""What does not notice a shift, checked number by number; and that every rule and every invariance is checked."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from graphs import Captured, capture
from rule_cases import CASES, OF_SEVERAL_PROCESSES
from rule_identities import axis_sets, shift_along
from shifts import shifted_from
from torch import Tensor, fx
from torch.nn import functional

from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.graph.effects import examples_of, find_writes
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.placement.streams import build_streams
from lncompile.passes.rules import INVARIANCES, RULES
from lncompile.passes.rules.writes import can_be_read

# What does not notice a shift: functions of a tensor [4, 6, 6], by the names of the invariances they show.
SINKS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "layer_norm": ("layer_norm", lambda x: functional.layer_norm(x, (6,))),
    "layer_norm_of_two": ("layer_norm", lambda x: functional.layer_norm(x, (6, 6))),
    "native": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0]),
    "native_root": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[2]),
    "native_mean": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[1]),
    "group_norm": ("group_norm", lambda x: functional.group_norm(x, 2)),
    "group_norm_of_rows": ("group_norm", lambda x: functional.group_norm(x.flatten(0, 1), 3)),
    "native_group": ("native_group_norm", lambda x: torch.native_group_norm(x, None, None, 4, 6, 6, 3, 1e-5)[0]),
    "softmax": ("softmax", lambda x: torch.softmax(x, 1)),
    "log_softmax": ("log_softmax", lambda x: functional.log_softmax(x, dim=-1)),
    "cross_entropy": ("cross_entropy", lambda x: functional.cross_entropy(x, torch.arange(24).view(4, 6) % 6)),
    "cross_entropy_of_one": ("cross_entropy", lambda x: functional.cross_entropy(x[0, 0], torch.tensor(2))),
    "var": ("var", lambda x: x.var(-1)),
    "var_of_two": ("var", lambda x: torch.var(x, (0, 2), correction=0)),
    "std": ("std", lambda x: x.std(1, keepdim=True)),
    "difference": ("mean sub", lambda x: x - x.mean(-1, keepdim=True)),
    "difference_from_sum": ("sum sub", lambda x: x - x.sum(-1, keepdim=True) / 6),
    "negative_mean_added": ("mean add", lambda x: x + -x.mean(-1, keepdim=True)),
    "reversed_subtraction": ("mean rsub", lambda x: torch.rsub(x.mean(-1, keepdim=True), x)),
    "subtracted_from_the_mean": ("mean sub", lambda x: x.mean(1, keepdim=True) - x),
    "difference_from_einsum": ("einsum sub", lambda x: x - torch.einsum("abc->ab", x)[..., None] / 6),
    "difference_from_labels": (
        "einsum",
        lambda x: x - torch.einsum("abc,bd->ac", x, torch.full((6, 1), 1 / 6, dtype=x.dtype))[:, None],
    ),
    "difference_from_product": ("matmul", lambda x: x - x @ torch.full((6, 1), 1 / 6, dtype=x.dtype)),
    "difference_from_left": ("matmul", lambda x: x - torch.full((1, 6), 1 / 6, dtype=x.dtype) @ x),
    "difference_from_linear": ("linear", lambda x: x - functional.linear(x, torch.ones(1, 6, dtype=x.dtype) / 6)),
    "difference_from_pool": ("average_pool_1d", lambda x: x - functional.adaptive_avg_pool1d(x, 1)),
    "var_and_mean": ("var_mean", lambda x: x - torch.var_mean(x, -1, keepdim=True)[1]),
    "std_and_mean": ("std_mean", lambda x: x - torch.std_mean(x, (1, 2), keepdim=True)[1]),
    "moments": ("mul", lambda x: (x * x).mean(-1) - x.mean(-1) ** 2),
    "moments_of_squares": ("square", lambda x: x.square().mean(-1) - x.mean(-1).square()),
    "moments_of_powers": ("pow", lambda x: (x**2).mean(-1, True) - x.mean(-1, True) ** 2),
    "shape": ("metadata", lambda x: torch.ones(2) * x.size(0) + torch.ones_like(x).sum()),
    "zeros": ("zeros", lambda x: torch.zeros_like(x) + 1),
    "half_the_mean": ("", lambda x: x - 0.5 * x.mean(-1, keepdim=True)),
    "mean_added": ("", lambda x: x + x.mean(-1, keepdim=True)),
    "product_alone": ("", lambda x: x @ torch.full((6, 1), 1 / 6, dtype=x.dtype)),
    "product_and_mean_of_others": ("", lambda x: x - x @ torch.full((6, 1), 1 / 5, dtype=x.dtype)),
    "pool_of_halves": ("", lambda x: x.view(4, 12, 3) - functional.avg_pool1d(x, 3).view(4, 12, 1) * 2),
    "mean_alone": ("", lambda x: x.mean(-1)),
    "square_alone": ("", lambda x: (x * x).sum(-1)),
    "maximum": ("", lambda x: x.amax(-1)),
}


def is_unseen(captured: Captured, start: fx.Node, axes: Axes) -> bool:
    """Whether the passes say that nobody sees a shift of a tensor: not its readers, not what is computed from it."""
    site = SimpleNamespace(input=start, axes=axes, handwritten=None, folded_before=False)
    graph, inputs = captured.graph_module.graph, captured.example_inputs
    writes = find_writes(graph, examples_of(graph, inputs), can_be_read)
    variables = build_streams([site], GraphFacts(graph, inputs, writes))  # type: ignore[list-item]
    return shifted_from((start, axes), variables) is not None


@pytest.mark.parametrize("name", SINKS)
def test_what_does_not_notice_a_shift(name: str) -> None:
    """For every set of axes: what the passes say is not seen changes nothing, and some shift is not seen."""
    names, function = SINKS[name]
    value = torch.randn(4, 6, 6, dtype=torch.float64) + 0.5
    captured = capture(lambda x: function(x * 1.0), value)
    graph = captured.graph_module.graph
    start = next(node for node in graph.nodes if node.op != "placeholder")
    generator = torch.Generator().manual_seed(0)
    unseen = 0
    for axes in axis_sets(tuple(value.shape)):
        if is_unseen(captured, start, axes):
            unseen += 1
            shifted = function(value + shift_along(value, axes, generator))
            torch.testing.assert_close(shifted, function(value), rtol=1e-8, atol=1e-8)
    assert bool(unseen) == (bool(names) and name != "native_mean")
    found = {operation.name for node in graph.nodes if (operation := canonicalise(node)) is not None}
    assert set(names.split()) <= found


def test_every_invariance_and_every_rule_is_checked() -> None:
    """A rule that nothing above can exercise would be a rule without a test."""
    assert set(INVARIANCES) - {"getitem"} <= {each for names, _ in SINKS.values() for each in names.split()}
    in_cases = {rule for case in CASES.values() for rule in case.rules.split()}
    assert set(RULES) - OF_SEVERAL_PROCESSES <= in_cases
