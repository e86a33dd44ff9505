"""Graphs that operators of a graph run, and what such an operator passes to them.

``torch.cond`` has two of them, one for each branch; a region (``torch.compiler.nested_compile_region``) and a
checkpointed part have one. What other operators of the kind do with their graphs is not known here.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from lncompile.lowering import torch_private


class Call(NamedTuple):
    """How an operator runs graphs.

    Attributes:
        bodies: the graphs. Each of them gets all operands.
        operands: one for each placeholder of a body: nodes, or constants.
    """

    bodies: tuple[fx.GraphModule, ...]
    operands: tuple[Any, ...]


def call_of(node: fx.Node) -> Call | None:
    """Return which graphs a node runs, and with what; None where it runs none, or that is not known."""
    if node.op != "call_function" or not isinstance(node.target, torch_private.HigherOrderOperator):
        return None
    operator_of: Any = node.target
    match operator_of.name(), node.args:
        case "cond", (_, fx.Node() as yes, fx.Node() as no, [*operands]):
            attributes: Sequence[fx.Node] = (yes, no)
        case "invoke_subgraph", (fx.Node() as body, str(), *operands):
            attributes = (body,)
        case "tag_activation_checkpoint" | "wrap", (fx.Node() as body, *operands):
            attributes = (body,)
        case _:
            return None
    bodies = [found for attribute in attributes if (found := body_at(attribute)) is not None]
    fits = all(len(_placeholders(body)) == len(operands) for body in bodies)
    return Call(tuple(bodies), tuple(operands)) if fits and len(bodies) == len(attributes) else None


def body_at(node: fx.Node) -> fx.GraphModule | None:
    """Return the graph that a ``get_attr`` node stands for; None for any other node."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return None
    held = operator.attrgetter(str(node.target))(owner)
    return held if isinstance(held, fx.GraphModule) else None


def _placeholders(body: fx.GraphModule) -> list[fx.Node]:
    return [node for node in body.graph.nodes if node.op == "placeholder"]


def counterparts(call: Call, body: fx.GraphModule) -> dict[fx.Node, Any]:
    """Return what each placeholder of a body stands for in the graph around it."""
    return dict(zip(_placeholders(body), call.operands, strict=True))
