"""Back to the graph as it came, while the model runs: for weights that do not stay what they are for long enough.

Centered weights are computed once and used at many calls. Where weights change or move at nearly every call
(offloading, storage that is exchanged), they would be computed at each, which costs more than folding saves. Then the
fold is given up: stock Inductor compiles the graph as Dynamo captured it, and that runs from then on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from lncompile.lowering import torch_private_inductor
from lncompile.passes.decisions import Reason
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.reporting.report import FoldReport, unfolded

_DETAIL = (
    "its weights changed or moved at nearly every call (offloading, an exchange of their storage), and centering them "
    "anew takes longer than folding saves"
)


class Unfolded:
    """The graph that Dynamo captured, compiled by stock Inductor when it is first called.

    Args:
        graph_module: as Dynamo handed it out. A copy is kept, with fake values in place of the tensors.
        config: Inductor's configuration.
    """

    def __init__(self, graph_module: fx.GraphModule, config: Mapping[str, Any]) -> None:
        self._graph_module = copy_graph_module(graph_module)
        self._config = dict(config)
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        """Call it like the graph."""
        compiled = self._compiled
        if compiled is None:
            with self._lock:
                compiled = self._compiled = self._compiled or self._compile()
        return compiled(*arguments)

    def _compile(self) -> Callable[..., Any]:
        compiled = torch_private_inductor.inductor_compile_later(self._graph_module, self._config)
        if compiled is not None:
            return compiled
        # By way of Dynamo once more, which guards what has to be assumed of sizes.
        again: Callable[..., Any] = torch.compile(self._graph_module, backend="inductor", options=self._config or None)
        return again


def given_up(report: FoldReport) -> FoldReport:
    """Return the report of a graph in which nothing folds any more, because its weights do not stay what they are."""
    return unfolded(report, Reason.MOVING_WEIGHTS, _DETAIL)
