"""Capturing a function as the backend sees it, for tests of single passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.analysis import Analysis, analyse
from lncompile.lowering import FOLDED_STATISTIC, persistent_norms, torch_private
from lncompile.options import Options


@dataclass
class Captured:
    """A graph as Dynamo hands it to a backend, with its inputs."""

    graph_module: fx.GraphModule
    example_inputs: list[Any]

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
        return torch_private.inductor_compile(graph_module, example_inputs, {})
