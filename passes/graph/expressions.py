"""A parameter expression on its own: a small graph that is evaluated outside of the graph it was cut out of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.operands import CENTERED_ALONG


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
        self.centered_along = along if along is not None and _leaves_something(along) else None

    def evaluate(self, leaves: Sequence[Tensor]) -> Tensor:
        """Compute the value from the parameters' tensors; it shares no storage with them."""
        # Out of inference mode as well: the value may later serve a call that records gradients for its inputs.
        with torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
            # Aliases hold the memory that is read: another thread may give a parameter other memory meanwhile.
            value: Tensor = self._module(*(leaf.detach() for leaf in leaves))
        return value


def _leaves_something(axes: Sequence[Axes]) -> bool:
    """Whether what centering takes out of a weight is less than the weight: there is something left that has a mean."""
    return all(part.normalised_dimensions for part in axes)


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


def after_definition(node: fx.Node) -> fx.Node:
    """Return the node before which something computed from ``node`` can stand; never one among the placeholders."""
    following = node.next
    while following.op == "placeholder":
        following = following.next
    return following
