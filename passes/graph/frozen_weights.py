"""Freezing: weights that are constants of a graph are placeholders for the passes, and constants again for Inductor.

With ``torch._inductor.config.freezing`` (TORCHINDUCTOR_FREEZING=1), which is how models are served on a CPU, Dynamo
hands the weights over as attributes of the graph and guards that they stay the same objects; Inductor takes their
values as they are then, folds what is computed of them alone, and packs them for its kernels::

    get_attr L__self___up_weight                placeholder L__self___up_weight
    x = linear(value, up_weight, up_bias)  ⇄    x = linear(value, up_weight, up_bias)

All passes read parameters from placeholders. So the attributes are lifted before them, and put back behind them
together with the centered weights, which become constants like all others.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from lncompile.lowering import torch_private
from lncompile.passes.graph.copying import copy_graph_module


@dataclass(frozen=True)
class Lifted:
    """A graph whose constant tensors are placeholders, behind its own.

    Attributes:
        graph_module: the graph, a copy.
        tensors: the value of each of the new placeholders, by the name it has as an attribute.
    """

    graph_module: fx.GraphModule
    tensors: dict[str, Tensor]

    def put_back(self, graph_module: fx.GraphModule, centered: Sequence[Tensor]) -> None:
        """Make the weights of a rewritten graph its attributes again.

        Args:
            graph_module: what the passes made of the lifted graph; it is changed in place.
            centered: the values of the placeholders that they added.
        """
        graph = graph_module.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        added = placeholders[len(placeholders) - len(centered) :]
        names = {node.target: node for node in placeholders[: len(placeholders) - len(centered)]}
        weights = [(names[name], name, tensor) for name, tensor in self.tensors.items()]
        for placeholder, value in zip(added, centered, strict=True):
            parameter = nn.Parameter(value, requires_grad=False) if value.is_floating_point() else value
            weights.append((placeholder, _free_name(graph_module, str(placeholder.target)), parameter))
        first = next(node for node in graph.nodes if node.op != "placeholder")
        for placeholder, name, tensor in weights:
            if placeholder.users:
                _hold(graph_module, name, tensor)
                torch_private.give_source_to_attribute(graph_module, name, placeholder)
                with graph.inserting_before(first):
                    attribute = graph.get_attr(name)
                attribute.meta = dict(placeholder.meta)
                placeholder.replace_all_uses_with(attribute)
            graph.erase_node(placeholder)
        graph.lint()
        graph_module.recompile()


def lift_weights(graph_module: fx.GraphModule) -> Lifted:
    """Turn the tensors that a graph has as attributes into placeholders.

    Args:
        graph_module: as Dynamo hands it to a backend. Not changed.

    Returns:
        A copy of the graph, and the tensors. A pair of names for one tensor is one placeholder.

    Example:
        >>> lifted = lift_weights(graph_module)
        >>> lifted.graph_module(*example_inputs, *lifted.tensors.values())
    """
    copy = copy_graph_module(graph_module)
    graph = copy.graph
    values = {
        node: value
        for node in graph.nodes
        # Others are the graphs of higher-order operators.
        if node.op == "get_attr" and isinstance(value := operator.attrgetter(str(node.target))(graph_module), Tensor)
    }
    tensors: dict[str, Tensor] = {}
    placeholders: dict[int, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node, value in values.items():
        if id(value) not in placeholders:
            with graph.inserting_before(first):
                placeholder = graph.placeholder(str(node.target).replace(".", "_"))
            placeholder.meta = dict(node.meta)
            torch_private.mark_static_input(placeholder)
            torch_private.take_source_of_attribute(placeholder, graph_module, str(node.target))
            tensors[str(placeholder.target)] = value
            placeholders[id(value)] = placeholder
    for node, value in values.items():
        node.replace_all_uses_with(placeholders[id(value)])
        graph.erase_node(node)
    graph.lint()
    copy.recompile()
    return Lifted(copy, tensors)


def _hold(graph_module: fx.GraphModule, name: str, tensor: Tensor) -> None:
    """Make a tensor an attribute that AOTAutograd lifts as one of the module's own."""
    if isinstance(tensor, nn.Parameter):
        graph_module.register_parameter(name, tensor)
    else:
        graph_module.register_buffer(name, tensor)


def _free_name(graph_module: torch.nn.Module, name: str) -> str:
    while hasattr(graph_module, name):
        name += "_"
    return name
