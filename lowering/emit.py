"""Writing a pure tensor function into an FX graph: one definition of the arithmetic, for tests and for graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer


class _NamingTracer(GraphAppendingTracer):
    """Names what it appends ``<prefix>_<operation>``, so that a printed graph reads as a story."""

    def __init__(self, graph: fx.Graph, prefix: str) -> None:
        super().__init__(graph)
        self._prefix = prefix

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        operation = name or (target if isinstance(target, str) else getattr(target, "__name__", "value"))
        return super().create_node(kind, target, args, kwargs, f"{self._prefix}_{operation}", type_expr)


def emit(graph: fx.Graph, prefix: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Append the operations that ``function`` performs at the graph's insertion point.

    Args:
        graph: the graph; the caller sets the insertion point (``graph.inserting_before(...)``).
        prefix: start of the names of the new nodes.
        function: a function of tensors, written with ``torch`` functions and tensor methods.
        args: its arguments; FX nodes stand for tensors.
        kwargs: its keyword arguments, likewise.

    Returns:
        The node of the function's result.
    """
    tracer = _NamingTracer(graph, prefix)

    def proxy(argument: Any) -> Any:
        return fx.Proxy(argument, tracer) if isinstance(argument, fx.Node) else argument

    result = function(*[proxy(a) for a in args], **{key: proxy(value) for key, value in kwargs.items()})
    node: fx.Node = result.node
    return node
