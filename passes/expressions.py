"""Parameter expressions leave the graph: each becomes a small graph of its own, and an extra input takes its place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes import in_place
from lncompile.passes.axes import Axes
from lncompile.passes.operands import CENTERED_ALONG


class Expression:
    """A function of parameters, cut out of a graph.

    Attributes:
        code: its source; two graphs that center one parameter in the same way have equal code and share the result.
        leaves: positions of its parameters among the graph's placeholders.
        centered_along: where it is the centering of one parameter in its own dtype, and nothing else: along which axes.
    """

    def __init__(self, root: fx.Node, placeholders: Sequence[fx.Node]) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        position = {node: index for index, node in enumerate(placeholders)}
        leaves = [node for node in closure(root) if node.op == "placeholder"]
        for index, leaf in enumerate(leaves):
            copies[leaf] = graph.placeholder(f"parameter_{index}")
        for index, node in enumerate(n for n in closure(root) if n.op != "placeholder"):
            copies[node] = graph.create_node(
                node.op,
                node.target,
                torch.fx.map_arg(node.args, copies.__getitem__),
                torch.fx.map_arg(node.kwargs, copies.__getitem__),
                name=f"value_{index}",
            )
        graph.output(copies[root])
        graph.lint()
        self._module = fx.GraphModule(torch.nn.Module(), graph)
        self.code: str = self._module.code
        self.leaves = tuple(position[leaf] for leaf in leaves)
        along: tuple[Axes, ...] | None = root.meta.get(CENTERED_ALONG)
        self.centered_along = along if along is not None and in_place.can_be_kept(along) else None

    def evaluate(self, leaves: Sequence[Tensor]) -> Tensor:
        """Compute the value from the parameters' tensors; it shares no storage with them."""
        # Out of inference mode as well: the value may later serve a call that records gradients for its inputs.
        with torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
            # Aliases hold the memory that is read: another thread may give a parameter other memory meanwhile.
            value: Tensor = self._module(*(leaf.detach() for leaf in leaves))
        return value


def closure(root: fx.Node) -> list[fx.Node]:
    """Everything ``root`` is computed from, itself last, operands before their users."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node not in seen:
            seen.add(node)
            for source in node.all_input_nodes:
                visit(source)
            order.append(node)

    visit(root)
    return order


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
