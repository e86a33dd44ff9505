"""LayerNorms in graphs inside of the graph: what a higher-order operator runs (gradient checkpointing, ``cond``).

Such a graph is entered with the stream as an argument and left with it as a result, so nothing in it can be centered
without its caller. They are not followed, but for regions that are written out (``regions``); their norms are listed,
so that a report does not pass over them in silence.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from lncompile.lowering import torch_private
from lncompile.passes.decisions import Reason, Verdict
from lncompile.passes.graph.bodies import body_at
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.norms.folded_before import gather_folded_norms, verdict_of_folded
from lncompile.passes.norms.sites import list_norms


def norms_in_subgraphs(graph_module: fx.GraphModule, followed: Collection[str] = ()) -> dict[str, list[Verdict]]:
    """Return verdicts on the norms in the graphs that operators run, by the operator's node name.

    Args:
        graph_module: the graph around them.
        followed: names of operators that are followed, and left out.
    """
    verdicts: dict[str, list[Verdict]] = {}
    for node in graph_module.graph.nodes:
        if not isinstance(node.target, torch_private.HigherOrderOperator) or node.name in followed:
            continue
        for inner in (body for source in node.all_input_nodes if (body := body_at(source)) is not None):
            operator = str(getattr(node.target, "__name__", node.target))
            detail = f"it stands in a graph of its own that {operator} runs, and that is not followed"
            graph = copy_graph_module(inner).graph
            gather_folded_norms(graph)
            verdicts.setdefault(node.name, []).extend(
                verdict_of_folded(site)
                if site.folded_before
                else Verdict(site.name, site.location, False, "layer_norm", Reason.UNKNOWN_OPERATION, detail, ())
                for site in list_norms(graph)
            )
            for deeper in norms_in_subgraphs(inner).values():
                verdicts[node.name] += deeper
    return verdicts
