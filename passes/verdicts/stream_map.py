"""The streams as people draw them: what is added into each of them, and which norms read it, in order.

GPT-2's is one stream from the embeddings to the last norm::

    wte, wpe ─┬─ attn.c_proj ─┬─ mlp.c_proj ─┬─ ...
              ln_1            ln_2           ln_1

BERT's ends at each norm, whose output starts the next. Nothing is decided here: the variables that placement was made
from are walked once more, upwards from each norm, and norms that meet on the way read the same stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping

from networkx.utils import UnionFind
from torch import fx

from lncompile.passes.decisions import PartKind, Stream, StreamPart
from lncompile.passes.graph import provenance
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey, describe_blocker


def map_streams(
    graph: fx.Graph,
    sites: Mapping[int, NormSite],
    placement: Placement | None,
    variables: Mapping[VariableKey, Variable],
) -> tuple[Stream, ...]:
    """Draw the streams of a graph.

    Args:
        graph: the graph that was decided on, not rewritten yet.
        sites: its norms, by their place in the report.
        placement: what is centered; None where nothing is.
        variables: its streams; empty where the graph is left alone.

    Returns:
        The streams in the order in which they begin. Every site is part of exactly one.
    """
    order = {node: index for index, node in enumerate(graph.nodes)}
    norms = {site.node: index for index, site in sites.items()}
    groups: UnionFind[Hashable] = UnionFind()
    parts: dict[Hashable, tuple[int, StreamPart]] = {}
    seen: set[VariableKey] = set()
    for index, site in sites.items():
        start = (site.input, site.axes)
        is_folded = site.folded_before or (placement is not None and start in placement.centered)
        parts[index] = (
            order[site.node],
            StreamPart(PartKind.NORM, site.name, site.location, is_folded, "", (), index),
        )
        groups.union(index, start)
        pending = [(start, site.node)] if start in variables else []
        while pending:
            key, reader = pending.pop()
            if key in seen:
                continue
            seen.add(key)
            variable = variables[key]
            part = _contribution(variable, placement, variables, norms)
            if part is not None:
                # A parameter stands at the top of the graph, and enters where it is read.
                place = reader if variable.is_parameter or variable.is_recomputed else variable.node
                parts[key] = (order[place], part)
                continue
            for need in variable.needs.items():
                if _is_parameter(variables[need]):
                    # Two streams that read one parameter are two streams.
                    entry = (key, need)
                    groups.union(key, entry)
                    part = _contribution(variables[need], placement, variables, norms)
                    assert part is not None  # a parameter is made of nothing else
                    parts[entry] = (order[variable.node], part)
                else:
                    groups.union(key, need)
                    pending.append((need, variable.node))
    streams: dict[Hashable, list[tuple[int, StreamPart]]] = defaultdict(list)
    for name, placed in parts.items():
        streams[groups[name]].append(placed)
    ordered = [sorted(stream, key=lambda placed: placed[0]) for stream in streams.values()]
    return tuple(
        Stream(tuple(dict.fromkeys(part for _, part in stream)))
        for stream in sorted(ordered, key=lambda stream: stream[0][0])
    )


def _is_parameter(variable: Variable) -> bool:
    return variable.is_parameter or variable.is_recomputed


def _contribution(
    variable: Variable,
    placement: Placement | None,
    variables: Mapping[VariableKey, Variable],
    norms: Mapping[fx.Node, int],
) -> StreamPart | None:
    """What a tensor brings into a stream; None if it is computed from tensors that bring it."""
    node, key = variable.node, variable.key
    available = placement is not None and key in placement.centered
    in_place = placement is not None and key in placement.streams
    needs = [variables[need] for need in variable.needs.items() if need in variables]
    if _is_parameter(variable):
        sources = [variable.parameter] if variable.parameter is not None else [need.node for need in needs]
        names = tuple(dict.fromkeys(name for source in sources for name in provenance.parameter_names(source)))
        return StreamPart(PartKind.WEIGHTS, " · ".join(names), provenance.location(node), available, "", names)
    name, location = provenance.module_path(node) or node.name, provenance.location(node)
    if variable.is_zero_mean:
        return StreamPart(PartKind.ZERO_MEAN, name, location, True, "its mean is zero already", ())
    if available and not in_place:
        words = f"centered at run time: {provenance.describe(node)}"
        return StreamPart(PartKind.ACTIVATION, name, location, True, words, (), norms.get(node))
    if variable.composed_source is not None:
        parameters = variable.composed_source.parameters()
        names = tuple(dict.fromkeys(name for source in parameters for name in provenance.parameter_names(source)))
        return StreamPart(PartKind.WEIGHTS, name, location, available, "", names)
    if variable.source_blocker is not None:
        words = describe_blocker(variable.source_blocker)
        return StreamPart(PartKind.ACTIVATION, name, location, False, words, (), norms.get(node))
    if not needs:
        return StreamPart(PartKind.ZERO_MEAN, name, location, True, "the same for all features", ())
    if all(map(_is_parameter, needs)):
        names = tuple(dict.fromkeys(name for need in needs for name in provenance.parameter_names(need.node)))
        return StreamPart(PartKind.WEIGHTS, name, location, available, "", names)
    return None
