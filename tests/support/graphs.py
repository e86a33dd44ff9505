"""Capturing a function as the backend sees it, for tests of single passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.analysis import Analysis, analyse
from lncompile.lowering import FOLDED_STATISTIC, persistent_norms, torch_private_inductor
from lncompile.options import Options


@dataclass
class Captured:
    """A graph as Dynamo hands it to a backend, with its inputs, and what it returned when it was called last."""

    graph_module: fx.GraphModule
    example_inputs: list[Any]
    outputs: Sequence[Any] = ()

    def analyse(self, options: Options | None = None, inductor: Mapping[str, Any] | None = None) -> Analysis:
        return analyse(self.graph_module, self.example_inputs, options or Options(), inductor or {})


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    """Return the one graph Dynamo makes of a function."""
    captured: list[Captured] = []

    def backend(graph_module: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append(Captured(graph_module, list(example_inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*args, **kwargs)
    assert len(captured) == 1
    return captured[0]


@dataclass(frozen=True)
class CapturedCall:
    """A call of a compiled model.

    Attributes:
        graphs: every graph that Dynamo made of it (several where it breaks).
        is_whole: whether it is one graph, with nothing between.
        compiled: the compiled model.
        inputs: the keyword arguments it was called with.
        result: what it returned.
    """

    graphs: list[Captured]
    is_whole: bool
    compiled: Callable[..., Any]
    inputs: Mapping[str, Any]
    result: Any


def capture_all(
    function: Callable[..., Any], backend: Callable[..., Callable[..., Any]] | None = None, **inputs: Any
) -> CapturedCall:
    """Compile a model, call it, and keep every graph that Dynamo makes.

    Args:
        function: the model.
        backend: what compiles each graph; the graph itself where none is given.
        inputs: keyword arguments of the model.
    """
    graphs: list[Captured] = []

    def recording(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = Captured(graph_module, list(example_inputs))
        graphs.append(graph)
        compiled = graph_module.forward if backend is None else backend(graph_module, example_inputs)

        def run(*arguments: Any) -> Any:
            graph.outputs = compiled(*arguments)
            return graph.outputs

        return run

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(function, backend=recording)
    result = compiled(**inputs)
    # A frame that Dynamo gives up is no break: those it calls are then compiled.
    frames = (counters["frames"]["total"], counters["frames"]["ok"])
    is_whole = len(graphs) == 1 and frames == (1, 1) and not counters["graph_break"]
    return CapturedCall(graphs, is_whole, compiled, inputs, result)


def run_as_it_is(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config: dict[str, Any]
) -> Callable[..., Any]:
    """What tests put in Inductor's place: exactness is the graph's property, and Inductor takes seconds."""
    graph_module.graph.lint()

    def run(*arguments: Any) -> Any:
        return graph_module(*arguments)

    return run


def compile_as_folded(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that hands a graph to Inductor as ours does, with every mean in it a folded norm's statistic."""
    for node in graph_module.graph.nodes:
        if node.target is torch.mean:
            node.meta["custom"] = dict(FOLDED_STATISTIC)
    with persistent_norms(graph_module, {}):
        return torch_private_inductor.inductor_compile(graph_module, example_inputs, {})
