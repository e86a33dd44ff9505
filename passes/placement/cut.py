"""Where to center: an exact optimum, by one minimum cut.

For each tensor v three booleans, ``s`` (the program computes ``Cv`` in v's place), ``f`` (v may be shifted: nothing
that reads it minds) and ``a`` (a centered v is available)::

    benefit of site ℓ    is lost unless a(u)            source ──b(ℓ)──▶ a(u)
    a(v) without s(v)    costs an explicit centering     a(v) ──κ(v)──▶ s(v)
    s(v) needs           its operands available          s(v) ──∞──▶ a(u)
    s(v) gives           a(v)                            s(v) ──∞──▶ a(v)
    s(v) forbidden       where it cannot be computed     s(v) ──∞──▶ sink
    s(v) costs           where weights compose per call  s(v) ──μ(v)──▶ sink
    copies               within a budget of memory       a(v) or s(v) ──∞──▶ copy ──λ·bytes──▶ sink
    s(v) shifts          v                               s(v) ──∞──▶ f(v)
    f(v) spreads         to its linear consumers         f(v) ──∞──▶ f(w)
    f(v) forbidden       where somebody notices          f(v) ──∞──▶ sink

This is project selection: the nodes left on the source's side of a minimum cut are true. Among the minimum cuts the
one nearest the source is taken, the smallest set of true nodes, so that what merely breaks even is left alone.
"""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import networkx
from networkx.algorithms.flow import boykov_kolmogorov

from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import NOTHING, Bytes, CostModel
from lncompile.passes.placement.variables import Variable, VariableKey

_SOURCE, _SINK = "source", "sink"


@dataclass(frozen=True)
class Placement:
    """The decision: which tensors are computed centered, which are centered explicitly, which sites fold.

    Attributes:
        streams: variables whose tensor is computed centered in place.
        centered: variables of which a centered version is available, streams included.
        folded: the sites whose input is available centered, and those that were folded before.
        saved: memory traffic of one call that is saved, net of the centerings of that call.
    """

    streams: frozenset[VariableKey]
    centered: frozenset[VariableKey]
    folded: tuple[NormSite, ...]
    saved: Bytes

    @property
    def centered_for(self) -> tuple[NormSite, ...]:
        """The sites that something is centered for: those that fold, but were not folded before."""
        return tuple(site for site in self.folded if not site.folded_before)


@dataclass(frozen=True)
class Price:
    """What copies of weights cost beside traffic, where memory is limited (:mod:`lncompile.passes.placement.budget`).

    Attributes:
        explicit: the copy that centering a variable explicitly makes, by its number. Variables may share one.
        made: the copy that computing a variable centered in its place makes.
        amounts: how much of what is limited each copy takes; None for one that may not be made.
        rate: the bytes of traffic that one unit of that is worth.
    """

    explicit: Mapping[VariableKey, int]
    made: Mapping[VariableKey, int]
    amounts: Sequence[int | None]
    rate: Fraction


def benefit(site: NormSite, costs: CostModel) -> Bytes:
    """What folding a site saves; nothing more where it was folded before."""
    tensor = tensor_of(site.input)
    return NOTHING if tensor is None or site.folded_before else costs.norm(tensor)


def place(
    sites: Sequence[NormSite],
    variables: Mapping[VariableKey, Variable],
    assist: bool = True,
    costs: CostModel | None = None,
    price: Price | None = None,
) -> Placement:
    """Choose the streams and explicit centerings that save the most.

    Args:
        sites: the LayerNorm sites.
        variables: the streams of the graph.
        assist: whether activations may be centered at run time where that pays.
        costs: what folding saves, the model that the streams were priced with; by default that of inference.
        price: what copies cost; by default nothing.

    Returns:
        The optimum; ties go to doing less. ``saved`` is without the price of copies.
    """
    forbidden: set[VariableKey] = set()
    while True:
        placement = _cut(sites, variables, assist, costs or CostModel(), forbidden, price)
        conflict = find_conflict(placement.streams)
        if conflict is None:
            return placement
        # One tensor cannot be centered in place along two sets of axes that meet. No model needs that; give one up.
        forbidden.add(conflict)


def find_conflict(streams: Collection[VariableKey]) -> VariableKey | None:
    """One of two streams that center the same elements of a tensor along different axes, or None."""
    by_node: dict[object, list[VariableKey]] = defaultdict(list)
    for key in streams:
        by_node[key[0]].append(key)
    for keys in by_node.values():
        for one, other in itertools.combinations(sorted(keys, key=lambda key: repr(key[1])), 2):
            if one[1].overlaps(other[1]):
                return other
    return None


def _cut(
    sites: Sequence[NormSite],
    variables: Mapping[VariableKey, Variable],
    assist: bool,
    costs: CostModel,
    forbidden: Collection[VariableKey],
    price: Price | None,
) -> Placement:
    graph = networkx.DiGraph()
    graph.add_nodes_from([_SOURCE, _SINK])
    for key, variable in variables.items():
        _add_variable(graph, key, variable, assist, key in forbidden)
    for site in sites:
        _add_capacity(graph, _SOURCE, ("a", (site.input, site.axes)), benefit(site, costs).hint)
    if price is not None:
        _add_price(graph, price, {key for key, v in variables.items() if v.source_blocker is None} - set(forbidden))
    residual = boykov_kolmogorov(graph, _SOURCE, _SINK, capacity="capacity")
    true = _reachable(residual)
    centered = frozenset(key for key in variables if ("a", key) in true)
    streams = frozenset(key for key in variables if ("s", key) in true)
    return assemble(sites, variables, costs, streams, centered)


def assemble(
    sites: Sequence[NormSite],
    variables: Mapping[VariableKey, Variable],
    costs: CostModel,
    streams: frozenset[VariableKey],
    centered: frozenset[VariableKey],
) -> Placement:
    """Put a choice of streams and centered variables together: the sites that fold with it, and what it saves."""
    folded = tuple(site for site in sites if site.folded_before or (site.input, site.axes) in centered)
    saved = NOTHING
    for site in folded:
        saved += benefit(site, costs)
    for key in centered - streams:
        saved -= variables[key].centering_cost or NOTHING
    for key in streams:
        saved -= variables[key].making_cost
    return Placement(streams, centered, folded, saved)


def _add_variable(graph: networkx.DiGraph, key: VariableKey, variable: Variable, assist: bool, forbidden: bool) -> None:
    stream, shifted, available = ("s", key), ("f", key), ("a", key)
    graph.add_edge(stream, available)  # an edge without a capacity is infinite
    graph.add_edge(stream, shifted)
    if variable.centering_cost is None or (variable.centered_at_run_time and not assist):
        graph.add_edge(available, stream)
    else:
        graph.add_edge(available, stream, capacity=variable.centering_cost.hint)
    if variable.reader_blocker is not None:
        graph.add_edge(shifted, _SINK)
    else:
        for successor in variable.successors:
            graph.add_edge(shifted, ("f", successor))
    if variable.is_recomputed:
        for need in variable.needs.items():
            graph.add_edge(available, ("a", need))
    if variable.source_blocker is not None or forbidden:
        graph.add_edge(stream, _SINK)
        return
    if variable.making_cost.hint:
        graph.add_edge(stream, _SINK, capacity=variable.making_cost.hint)
    for need in variable.needs.items():
        graph.add_edge(stream, ("a", need))


def _add_price(graph: networkx.DiGraph, price: Price, can_be_streams: Collection[VariableKey]) -> None:
    """Let copies cost their price, in whole numbers: all other capacities times the denominator of the rate."""
    for *_, edge in graph.edges(data=True):
        if "capacity" in edge:
            edge["capacity"] *= price.rate.denominator
    prices = [None if amount is None else amount * price.rate.numerator for amount in price.amounts]
    for key, copy in price.explicit.items():
        if key not in can_be_streams:
            graph.add_edge(("a", key), ("copy", copy))
        elif (cost := prices[copy]) is not None:
            # Only a copy where it is not a stream: that cannot be shared with another variable's.
            graph.edges[("a", key), ("s", key)]["capacity"] += cost
        else:
            del graph.edges[("a", key), ("s", key)]["capacity"]
    for key, copy in price.made.items():
        graph.add_edge(("s", key), ("copy", copy))
    for copy, cost in enumerate(prices):
        graph.add_edge(("copy", copy), _SINK, **({} if cost is None else {"capacity": cost}))


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
