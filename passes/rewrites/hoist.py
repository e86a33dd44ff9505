"""Parameter expressions leave the graph: each becomes a small graph of its own, and an extra input takes its place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.expressions import Expression, closure


def hoist(graph: fx.Graph, roots: Sequence[fx.Node]) -> tuple[list[Expression], list[fx.Node]]:
    """Cut the parameter expressions out of the graph and put placeholders in their place.

    Args:
        graph: changed in place. New placeholders stand behind the old ones, in the order of the expressions.
        roots: the nodes whose values are to be computed outside, functions of placeholders only.

    Returns:
        The expressions, and the new placeholders.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    expressions = [Expression(root, placeholders) for root in roots]
    new: list[fx.Node] = []
    insertion_point = next(node for node in graph.nodes if node.op != "placeholder")
    for root in roots:
        with graph.inserting_before(insertion_point):
            placeholder = graph.placeholder(f"{root.name}_materialized")
        torch_private.mark_static_input(placeholder)
        placeholder.meta["example_value"] = root.meta.get("example_value")
        root.replace_all_uses_with(placeholder)
        new.append(placeholder)
    for root in roots:
        for node in reversed(closure(root)):
            if node.op != "placeholder" and not node.users:
                graph.erase_node(node)
    return expressions, new
