"""Writing a pure tensor function into an FX graph: one definition of the arithmetic, for tests and for graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from lncompile.lowering import torch_private


class _NamingTracer(GraphAppendingTracer):
    """Names what it appends ``<prefix>_<operation>``, so that a printed graph reads as a story."""

    def __init__(self, graph: fx.Graph, prefix: str) -> None:
        super().__init__(graph)
        self._prefix = prefix
        self.appended: list[fx.Node] = []

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        operation = name or (target if isinstance(target, str) else getattr(target, "__name__", "value"))
        node = super().create_node(kind, target, args, kwargs, f"{self._prefix}_{operation}", type_expr)
        self.appended.append(node)
        return node


def emit(
    graph: fx.Graph,
    prefix: str,
    function: Callable[..., Any],
    *args: Any,
    value: Any = None,
    annotation: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Append the operations that ``function`` performs at the graph's insertion point.

    Args:
        graph: the graph; the caller sets the insertion point (``graph.inserting_before(...)``).
        prefix: start of the names of the new nodes.
        function: a function of tensors, written with ``torch`` functions and tensor methods.
        args: its arguments; FX nodes stand for tensors.
        value: the fake value of the result, where the caller knows it; otherwise that of every operation is computed.
        annotation: what to note on the new nodes, in ``node.meta["custom"]``, which torch hands on to all that it
            makes of them.
        kwargs: its keyword arguments, likewise.

    Returns:
        The node of the function's result.
    """
    tracer = _NamingTracer(graph, prefix)

    def proxy(argument: Any) -> Any:
        return fx.Proxy(argument, tracer) if isinstance(argument, fx.Node) else argument

    result = function(*[proxy(a) for a in args], **{key: proxy(value) for key, value in kwargs.items()})
    for new in tracer.appended if annotation else ():
        new.meta["custom"] = dict(annotation or {})
    node: fx.Node = result.node
    if value is not None:
        node.meta["example_value"] = value
    else:
        for new in tracer.appended:
            _propagate_value(new)
    return node


def _propagate_value(node: fx.Node) -> None:
    """Give a new node the fake value that Dynamo gives its own.

    Later passes read shapes and dtypes from it, and AOTAutograd's cache refuses a graph with a tensor method on a node
    of which it cannot see that it is a tensor.
    """
    known = [source.meta.get("example_value") for source in node.all_input_nodes]
    fake_mode = torch_private.fake_mode_of(known)
    if fake_mode is None or any(value is None for value in known):
        return
    args: Any = fx.map_arg(node.args, lambda source: source.meta["example_value"])
    kwargs: Any = fx.map_arg(node.kwargs, lambda source: source.meta["example_value"])
    target: Any = node.target
    with torch.no_grad(), fake_mode:
        if node.op == "call_method":
            node.meta["example_value"] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            node.meta["example_value"] = target(*args, **kwargs)
