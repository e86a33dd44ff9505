"""What graphs inside of the graph write to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lncompile.passes.graph.bodies import call_of
from lncompile.passes.graph.effects import written_arguments


def graph_of(function: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """A function's graph with the values of its nodes."""

    class Noting(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            node.meta["example_value"] = value = super().run_node(node)
            return value

    graph_module = fx.symbolic_trace(function)
    Noting(graph_module).run(*args)
    return graph_module


def call(operator: Any, *bodies: fx.GraphModule, before: tuple[Any, ...] = ()) -> fx.Node:
    """A call of an operator that runs graphs with two operands, ``one`` and ``other``."""
    graph = fx.Graph()
    operands = [graph.placeholder(name) for name in ("one", "other")]
    attributes = [graph.get_attr(f"body_{index}") for index in range(len(bodies))]
    rest = operands if len(bodies) == 1 else [tuple(operands)]
    node = graph.call_function(
        operator, (*before, *attributes, *(["name"] if "invoke" in str(operator) else []), *rest)
    )
    graph.output(node)
    holder = nn.Module()
    for index, body in enumerate(bodies):
        holder.add_module(f"body_{index}", body)
    fx.GraphModule(holder, graph)
    return node


BODIES: dict[str, tuple[Callable[[Tensor, Tensor], Any], set[str]]] = {
    "nothing": (lambda one, other: (one + other,), set()),
    "something of its own": (lambda one, other: ((one + other).mul_(2),), set()),
    "an operand": (lambda one, other: (one.mul_(2) + other,), {"one"}),
    "a view of an operand": (lambda one, other: (other[0].mul_(2) + one,), {"other"}),
    "something that dropout in evaluation hands on": (
        lambda one, other: (nn.functional.dropout(one, 0.5, False).mul_(2) + other,), {"one"},
    ),
    "nothing, but hands an operand out": (lambda one, other: (one, one + other), {"one", "other"}),
    "nothing, but hands a view out": (lambda one, other: (other.view(-1), one + other), {"one", "other"}),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_what_bodies_write_to(name: str) -> None:
    function, written = BODIES[name]
    quiet = graph_of(BODIES["nothing"][0], torch.randn(3), torch.randn(3))
    body = graph_of(function, torch.randn(3), torch.randn(3))
    higher = torch.ops.higher_order
    for node in (
        call(higher.invoke_subgraph, body),
        call(higher.tag_activation_checkpoint, body),
        call(higher.cond, body, quiet, before=(True,)),
        call(higher.cond, quiet, body, before=(True,)),
    ):
        assert {target.name for target in written_arguments(node)} - {"body_0", "body_1"} == written
    outer = fx.GraphModule({"body_0": body}, call(higher.invoke_subgraph, body).graph)
    next(iter(outer.graph.find_nodes(op="placeholder"))).meta["example_value"] = torch.randn(3)
    assert written <= {target.name for target in written_arguments(call(higher.invoke_subgraph, outer))}


def test_an_operator_that_is_not_known_writes_to_everything() -> None:
    body = graph_of(BODIES["nothing"][0], torch.randn(3), torch.randn(3))
    node = call(torch.ops.higher_order.map_impl, body)
    assert call_of(node) is None
    assert {"one", "other"} <= {target.name for target in written_arguments(node)}
