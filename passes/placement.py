"""Where to center: an exact optimum, by one minimum cut.

For each tensor v two booleans, ``s`` (the program computes ``Cv`` in v's place) and ``a`` (a centered v is available)::

    benefit of site ℓ    is lost unless a(u)            source ──b(ℓ)──▶ a(u)
    a(v) without s(v)    costs an explicit centering     a(v) ──κ(v)──▶ s(v)
    s(v) needs           its operands available          s(v) ──∞──▶ a(u)
    s(v) spreads         to its commuting consumers      s(v) ──∞──▶ s(w)
    s(v) gives           a(v)                            s(v) ──∞──▶ a(v)
    s(v) forbidden       at a blocker                    s(v) ──∞──▶ sink

This is project selection: the nodes left on the source's side of a minimum cut are true. Among the minimum cuts the
one nearest the source is taken, the smallest set of true nodes, so that what merely breaks even is left alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx
from networkx.algorithms.flow import boykov_kolmogorov

from lncompile.passes.canonical import tensor_of
from lncompile.passes.sites import NormSite
from lncompile.passes.streams import Variable, VariableKey, element_count

_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Placement:
    """The decision: which tensors are computed centered, which are centered explicitly, which sites fold.

    Attributes:
        streams: variables whose tensor is computed centered in place.
        centered: variables of which a centered version is available, streams included.
        folded: the sites whose input is available centered.
        saved: elements whose mean no longer has to be reduced, net of the explicit centerings.
    """

    streams: frozenset[VariableKey]
    centered: frozenset[VariableKey]
    folded: tuple[NormSite, ...]
    saved: int


def benefit(site: NormSite) -> int:
    """What folding a site saves: the reduction of its input's mean, in elements. The unit of ``centering_cost``."""
    tensor = tensor_of(site.input)
    return 0 if tensor is None else element_count(tensor)


def place(sites: Sequence[NormSite], variables: Mapping[VariableKey, Variable], assist: bool = True) -> Placement:
    """Choose the streams and explicit centerings that save the most.

    Args:
        sites: the LayerNorm sites.
        variables: the streams of the graph.
        assist: whether activations may be centered at run time where that pays.

    Returns:
        The optimum; ties go to doing less.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from([_SOURCE, _SINK])
    for key, variable in variables.items():
        _add_variable(graph, key, variable, assist)
    for site in sites:
        _add_capacity(graph, _SOURCE, ("a", (site.input, site.axes)), benefit(site))
    residual = boykov_kolmogorov(graph, _SOURCE, _SINK, capacity="capacity")
    true = _reachable(residual)
    centered = frozenset(key for key in variables if ("a", key) in true)
    streams = frozenset(key for key in variables if ("s", key) in true)
    folded = tuple(site for site in sites if (site.input, site.axes) in centered)
    total = sum(benefit(site) for site in sites)
    return Placement(streams, centered, folded, total - int(residual.graph["flow_value"]))


def _add_variable(graph: networkx.DiGraph, key: VariableKey, variable: Variable, assist: bool) -> None:
    stream, available = ("s", key), ("a", key)
    graph.add_edge(stream, available)  # an edge without a capacity is infinite
    at_run_time = not (variable.is_parameter or variable.is_zero_mean or variable.is_recomputed)
    if variable.centering_cost is None or (at_run_time and not assist):
        graph.add_edge(available, stream)
    else:
        graph.add_edge(available, stream, capacity=variable.centering_cost)
    if variable.is_recomputed:
        for need in variable.needs.items():
            graph.add_edge(available, ("a", need))
    if variable.blocker is not None:
        graph.add_edge(stream, _SINK)
        return
    for need in variable.needs.items():
        graph.add_edge(stream, ("a", need))
    for successor in variable.successors:
        graph.add_edge(stream, ("s", successor))


def _add_capacity(graph: networkx.DiGraph, start: object, end: object, capacity: int) -> None:
    known = graph.edges[start, end]["capacity"] if graph.has_edge(start, end) else 0
    graph.add_edge(start, end, capacity=known + capacity)


def _reachable(residual: networkx.DiGraph) -> set[object]:
    """Nodes that the source still reaches in the residual network: the smallest source side of all minimum cuts."""
    seen: set[object] = {_SOURCE}
    queue: deque[object] = deque([_SOURCE])
    while queue:
        for node, edge in residual[queue.popleft()].items():
            if node not in seen and edge["flow"] < edge["capacity"]:
                seen.add(node)
                queue.append(node)
    return seen
