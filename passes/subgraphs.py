"""LayerNorms in graphs inside of the graph: what a higher-order operator runs (gradient checkpointing, ``cond``).

Such a graph is entered with the stream as an argument and left with it as a result, so nothing in it can be centered
without its caller. They are not followed; their norms are listed, so that a report does not pass over them in silence.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from lncompile.lowering import torch_private
from lncompile.passes.decisions import Reason, Site
from lncompile.passes.sites import find_sites


def norms_in_subgraphs(graph_module: fx.GraphModule) -> dict[str, list[Site]]:
    """Return verdicts on the norms in the graphs that operators run, by the operator's node name."""
    verdicts: dict[str, list[Site]] = {}
    for node in graph_module.graph.nodes:
        for inner in _graphs_of(node, graph_module):
            operator = str(getattr(node.target, "__name__", node.target))
            detail = f"it stands in a graph of its own that {operator} runs, and that is not followed"
            verdicts.setdefault(node.name, []).extend(
                Site(site.name, site.location, False, "layer_norm", Reason.UNKNOWN_OPERATION, detail, ())
                for site in find_sites(inner.graph)
            )
            for deeper in norms_in_subgraphs(inner).values():
                verdicts[node.name] += deeper
    return verdicts


def _graphs_of(node: fx.Node, graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    if not isinstance(node.target, torch_private.HigherOrderOperator):
        return
    for source in node.all_input_nodes:
        if source.op != "get_attr":
            continue
        inner = getattr(graph_module, str(source.target), None)
        if isinstance(inner, fx.GraphModule):
            yield inner
