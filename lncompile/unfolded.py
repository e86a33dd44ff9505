"""Back to the graph as it came, while the model runs: for weights that do not stay what they are for long enough.

Centered weights are computed once and used at many calls. Where weights change or move at nearly every call
(offloading, storage that is exchanged), they would be computed at each, which costs more than folding saves. Then the
fold is given up: stock Inductor compiles the graph as Dynamo captured it, and that runs from then on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from lncompile.passes.copying import copy_graph_module
from lncompile.passes.decisions import Reason
from lncompile.report import FoldReport

_DETAIL = (
    "its weights changed or moved at nearly every call (offloading, an exchange of their storage), and centering them "
    "anew takes longer than folding saves"
)


class Unfolded:
    """The graph that Dynamo captured, compiled by stock Inductor when it is first called.

    Args:
        graph_module: as Dynamo handed it out. A copy is kept, without its values.
        config: Inductor's configuration.
    """

    def __init__(self, graph_module: fx.GraphModule, config: Mapping[str, Any]) -> None:
        self._graph_module = copy_graph_module(graph_module)
        for node in self._graph_module.graph.nodes:
            node.meta.clear()
        self._config = dict(config)
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Call it like the graph."""
        if self._compiled is None:
            # By way of Dynamo once more: it sees to sizes that differ from call to call.
            self._compiled = torch.compile(self._graph_module, backend="inductor", options=self._config or None)
        # Whatever the user allows of his own functions ("fail_on_recompile"): for him this one is compiled already.
        with torch.compiler.set_stance("default"):
            return self._compiled(*arguments)


def given_up(report: FoldReport) -> FoldReport:
    """Return the report of a graph in which nothing folds any more, because its weights do not stay what they are."""
    sites = tuple(
        dataclasses.replace(
            site,
            folded=False,
            lowering="layer_norm",
            reason=Reason.MOVING_WEIGHTS,
            detail=_DETAIL,
            centered_by=(),
            centered_after=(),
            affine_absorbed_by=(),
            affine="",
            deferral="",
        )
        if site.folded
        else site
        for site in report.sites
    )
    return dataclasses.replace(report, sites=sites, weights=(), centerings=())
