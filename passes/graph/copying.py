"""A graph of our own to work on: the one Dynamo handed out is read again by Dynamo and stays as it is."""

from __future__ import annotations

from torch import fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.canonical import name_overloads


def copy_graph_module(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module's graph, sharing its submodules and attributes, with all that AOTAutograd reads of it.

    Args:
        graph_module: as Dynamo handed it to the backend.

    Returns:
        A new graph module with equal node names, in which every operator's overload is named.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, copies, return_output_node=True)
    assert isinstance(output, tuple)  # what return_output_node promises
    result, original_output = output
    new_output = graph.output(result)
    new_output.meta = dict(original_output.meta)
    for old, new in copies.items():
        new.meta = dict(old.meta)
        if old.op == "placeholder":
            torch_private.forget_example(new)
            torch_private.copy_placeholder_source(old, new)
    name_overloads(graph)
    copy = fx.GraphModule(graph_module, graph)
    torch_private.copy_graph_module_attributes(graph_module, copy)
    return copy
