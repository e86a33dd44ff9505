"""What a graph does with its parameters: which it reads as they are, and which only centered, in one way.

Read after the centered expressions have left the graph (``expressions.hoist``): a parameter whose placeholder nobody
reads any more is one of which the graph needs nothing but its expressions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.effects import written_arguments
from lncompile.passes.graph.expressions import Expression, closure
from lncompile.passes.graph.operands import CENTERED_ALONG

#: How a parameter is read: along which axes it is centered; None where it is read as it is, or in several ways.
Use = tuple[Axes, ...] | None


def uses_of(
    graph: fx.Graph, expressions: Sequence[Expression], placeholders: int, in_graph: Sequence[fx.Node] = ()
) -> dict[int, Use]:
    """Return how a graph reads its inputs, by position; what it does not read is not there.

    Args:
        graph: the graph, with or without expressions taken out.
        expressions: what was taken out of it.
        placeholders: how many there were before.
        in_graph: nodes that center a weight at every call (``Rewrite.trained``).
    """
    living = _living(graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"][:placeholders]
    uses: dict[int, set[Use]] = defaultdict(set)
    centering: dict[fx.Node, Use] = {}
    for root in in_graph:
        # What centers a weight reads it, and nothing else reads what is computed on the way.
        centering.update(dict.fromkeys(closure(root), root.meta.get(CENTERED_ALONG)))
    for index, node in enumerate(inputs):
        uses[index].update(centering.get(user) for user in node.users if user in living)
    for expression in expressions:
        for leaf in expression.leaves:
            uses[leaf].add(expression.centered_along)
    return {index: next(iter(ways)) if len(ways) == 1 else None for index, ways in uses.items() if ways}


def _living(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the outputs or the effects of a graph depend on."""
    pending = [
        node
        for node in graph.nodes
        if node.op == "output" or (node.op != "placeholder" and (node.is_impure() or written_arguments(node)))
    ]
    living = set(pending)
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in living:
                living.add(source)
                pending.append(source)
    return living
