"""From Dynamo's graph to a decision on every site, without touching a weight or the graph handed in.

The passes that decide (:data:`lncompile.passes.pipeline.order.DECIDE`) run on a copy in which opaque operators are
written out. An operator in which nothing folds goes to Inductor as it was; leaving it closed may change the rest, so
they run again until the operators that are written out are those in which something folds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import fx

from lncompile.options import Options
from lncompile.passes.decisions import PartKind, Reason, Stream, StreamPart, Verdict
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.norms.expand import EXPANDED_FROM, closed_norms, find_opaque_layers, layers_kept_closed
from lncompile.passes.norms.regions import find_regions
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.norms.subgraphs import norms_in_subgraphs
from lncompile.passes.pipeline.analysis import Analysis as Analysis  # who analyses gets one
from lncompile.passes.pipeline.context import Known
from lncompile.passes.pipeline.deciding import sites_without_gradients
from lncompile.passes.pipeline.order import DECIDE
from lncompile.passes.pipeline.runner import Runner
from lncompile.passes.placement.cut import Placement
from lncompile.passes.verdicts.judge import describe_lookalikes, left_alone
from lncompile.passes.verdicts.stream_map import map_streams


def analyse(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
    runner: Runner | None = None,
) -> Analysis:
    """Decide for every LayerNorm site of a graph.

    Args:
        graph_module: the graph as Dynamo hands it to a backend, parameters as placeholders. Not changed.
        example_inputs: the value of each placeholder, real Parameters among them.
        options: our options.
        inductor: what differs from Inductor's own configuration.
        runner: what runs the passes, where somebody looks at them.

    Returns:
        The decisions, on a copy of the graph.
    """
    runner = runner or Runner(options.switched_off)
    off = runner.off
    regions = set() if "regions" in off else {node.name for node in find_regions(graph_module.graph)}
    kept_closed = layers_kept_closed(graph_module.graph, "expand" in off)
    layers = {node.name for node in find_opaque_layers(graph_module.graph)}.difference(kept_closed)
    opened = regions | layers
    verdicts = {**closed_norms(graph_module.graph, kept_closed), **norms_in_subgraphs(graph_module, regions)}
    first: Analysis | None = None
    while True:
        known = Known(copy_graph_module(graph_module), example_inputs, options, inductor, opened, off)
        runner.begin(known.graph_module)
        runner.run(DECIDE, known)
        analysis = _analysis_of(known)
        first = first or analysis
        analysis = _with_budget_of(first, analysis)
        needed = _needed(analysis.placement, regions) & opened
        for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True):
            if _origin(site.node) in opened - needed:
                verdicts.setdefault(_origin(site.node), []).append(verdict)
        if needed == opened:
            return _in_order(_with_reasons_of(first, analysis) if regions else analysis, verdicts)
        opened = needed


def _analysis_of(known: Known) -> Analysis:
    """What the passes decided."""
    placed, differences = known.placed, describe_lookalikes(known.chains.lookalikes)
    without = sites_without_gradients(known)
    if placed is None:
        return Analysis(
            known.graph_module,
            known.sites,
            known.verdicts,
            {},
            None,
            differences=differences,
            folded_without_gradients=without,
        )
    return Analysis(
        known.graph_module,
        known.sites,
        known.verdicts,
        known.variables,
        placed.placement if placed.placement.folded else None,
        known.costs,
        frozenset(known.facts.trained),
        placed.budgeted,
        absorptions=known.absorbed.absorptions,
        deferrals=known.deferred.deferrals,
        matrix_vectors=known.matrix_vectors,
        differences=differences,
        folded_without_gradients=without,
    )


def _needed(placement: Placement | None, regions: set[str]) -> set[str]:
    """The opaque layers in which something folds, and the regions through which a stream goes, by their names."""
    if placement is None:
        return set()
    streams = [node for node, _ in placement.streams]
    through = {_origin(node) for stream in streams for node in (stream, *stream.users)}
    # What was folded before is folded in a closed layer too, and a region is there to be compiled once.
    return {_origin(site.node) for site in placement.folded if not site.folded_before} | (through & regions)


def _with_budget_of(first: Analysis, analysis: Analysis) -> Analysis:
    """An analysis that says what the memory budget kept from folding in an earlier one, with more layers written out.

    A layer that stays closed because of the memory limit asks for no weights, and stands in the way of norms behind it.
    """
    if first is analysis or first.budgeted is None or analysis.budgeted is None:
        return analysis
    starved = {site.node.name: first.budgeted.left.get(site.node) for site in first.sites}
    verdicts = tuple(
        verdict
        if verdict.folded or (why := starved.get(site.node.name)) is None
        else left_alone([site], Reason.MEMORY_BUDGET, why)[0]
        for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True)
    )
    budgeted = dataclasses.replace(analysis.budgeted, budget=first.budgeted.budget)
    return dataclasses.replace(analysis, verdicts=verdicts, budgeted=budgeted)


def _with_reasons_of(first: Analysis, analysis: Analysis) -> Analysis:
    """An analysis that says of each norm that stays why it stayed with all regions written out, where it did."""
    reasons = {site.node.name: v for site, v in zip(first.sites, first.verdicts, strict=True) if not v.folded}
    verdicts = tuple(
        verdict if verdict.folded else reasons.get(site.node.name, verdict)
        for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True)
    )
    return dataclasses.replace(analysis, verdicts=verdicts)


def _origin(node: fx.Node) -> str:
    """Name of the opaque operator that a node was written out of, or ``""``."""
    return str(node.meta.get(EXPANDED_FROM, ""))


def _in_order(analysis: Analysis, closed: dict[str, list[Verdict]]) -> Analysis:
    """With the streams, and with the norms inside operators that stay closed, in the order of the graph."""
    sites = {site.node: (site, verdict) for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True)}
    ordered: list[Verdict] = []
    found: dict[int, NormSite] = {}
    inside: list[Stream] = []
    for node in analysis.graph_module.graph.nodes:
        for verdict in closed.get(node.name, []):
            part = StreamPart(PartKind.NORM, verdict.name, verdict.location, False, "", (), len(ordered))
            inside.append(Stream((part,)))
            ordered.append(verdict)
        if node in sites:
            found[len(ordered)], verdict = sites[node]
            ordered.append(verdict)
    streams = map_streams(analysis.graph_module.graph, found, analysis.placement, analysis.variables)
    return dataclasses.replace(analysis, verdicts=tuple(ordered), streams=(*streams, *inside))
