"""From Dynamo's graph to a decision on every site, without touching a weight or the graph handed in."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from torch import fx, nn

from lncompile.lowering import torch_private_inductor
from lncompile.options import Options
from lncompile.passes.decisions import PartKind, Reason, Stream, StreamPart, UnrecognisedDifference, Verdict
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.graph.facts import GraphFacts, is_in_evaluation, trained_parameter, turns_gradients_on
from lncompile.passes.norms.expand import EXPANDED_FROM, closed_norms, expand_opaque_layers, find_opaque_layers
from lncompile.passes.norms.handwritten import find_handwritten_norms
from lncompile.passes.norms.regions import find_regions, write_out_regions
from lncompile.passes.norms.sites import NormSite, find_sites
from lncompile.passes.norms.subgraphs import norms_in_subgraphs
from lncompile.passes.placement.budget import Budgeted, limit_in_bytes, place_within
from lncompile.passes.placement.costs import CostModel
from lncompile.passes.placement.cut import Placement, place
from lncompile.passes.placement.streams import build_streams
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.affine import Absorption, parameters_centered_for, plan_absorptions
from lncompile.passes.rewrites.deferral import Deferral, plan_deferrals
from lncompile.passes.rewrites.matrix_vector import MatrixVectors, plan_matrix_vectors
from lncompile.passes.rules.writes import can_be_read
from lncompile.passes.verdicts.judge import describe_lookalikes, judge, left_alone, say_lowering
from lncompile.passes.verdicts.obstacles import name_obstacles
from lncompile.passes.verdicts.stream_map import map_streams


@dataclass(frozen=True)
class Analysis:
    """A copy of the graph with the decisions made for it.

    Attributes:
        graph_module: the copy.
        sites: its LayerNorms.
        verdicts: what became of each, those inside of operators that stay closed included.
        variables: its streams.
        placement: what is centered where; None where the graph is to stay untouched.
        costs: what was weighed.
        trained: parameter expressions whose gradient is wanted: they are centered in the graph, at every step.
        budgeted: the placement within a budget of memory, where there is one.
        streams: the streams as people draw them.
        absorptions: norms whose γ and β go into the linear layers that read them.
        deferrals: norms whose scale goes behind these layers.
        matrix_vectors: products of one row that become sums, and norms that go into them.
        differences: differences from a mean that are not recognised as norms.
        folded_without_gradients: how many sites would fold if no gradients were recorded, where some stay because they
            are, though the model is in evaluation mode; else None.
    """

    graph_module: fx.GraphModule
    sites: tuple[NormSite, ...]
    verdicts: tuple[Verdict, ...]
    variables: dict[VariableKey, Variable]
    placement: Placement | None
    costs: CostModel = field(default_factory=CostModel)
    trained: frozenset[fx.Node] = frozenset()
    budgeted: Budgeted | None = None
    streams: tuple[Stream, ...] = ()
    absorptions: tuple[Absorption, ...] = ()
    deferrals: tuple[Deferral, ...] = ()
    matrix_vectors: MatrixVectors = field(default_factory=MatrixVectors)
    differences: tuple[UnrecognisedDifference, ...] = ()
    folded_without_gradients: int | None = None


def analyse(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
) -> Analysis:
    """Decide for every LayerNorm site of a graph.

    Args:
        graph_module: the graph as Dynamo hands it to a backend, parameters as placeholders. Not changed.
        example_inputs: the value of each placeholder, real Parameters among them.
        options: our options.
        inductor: what differs from Inductor's own configuration.

    Returns:
        The decisions, on a copy of the graph.
    """
    regions = {node.name for node in find_regions(graph_module.graph)}
    opaque = regions | {node.name for node in find_opaque_layers(graph_module.graph)}
    verdicts: dict[str, list[Verdict]] = {
        **closed_norms(graph_module.graph),
        **norms_in_subgraphs(graph_module, regions),
    }
    first: Analysis | None = None
    while True:
        analysis = _analyse_expanded(graph_module, example_inputs, options, inductor, opaque)
        first = first or analysis
        analysis = _with_budget_of(first, analysis)
        needed = _needed(analysis.placement, regions) & opaque
        for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True):
            if _origin(site.node) in opaque - needed:
                verdicts.setdefault(_origin(site.node), []).append(verdict)
        if needed == opaque:
            return _in_order(_with_reasons_of(first, analysis) if regions else analysis, verdicts)
        # An opaque layer in which nothing folds goes to Inductor as it was; leaving it closed may change the rest.
        opaque = needed


def _needed(placement: Placement | None, regions: set[str]) -> set[str]:
    """The opaque layers in which something folds, and the regions through which a stream goes, by their names."""
    if placement is None:
        return set()
    streams = [node for node, _ in placement.streams]
    through = {_origin(node) for stream in streams for node in (stream, *stream.users)}
    return {_origin(site.node) for site in placement.folded} | (through & regions)


def _with_budget_of(first: Analysis, analysis: Analysis) -> Analysis:
    """An analysis that says what the memory budget kept from folding in an earlier one, with more layers written out.

    A layer that stays closed for want of memory asks for no weights, and stands in the way of norms behind it.
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


def _analyse_expanded(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any],
    opaque: set[str],
) -> Analysis:
    copy = copy_graph_module(graph_module)
    write_out_regions(copy.graph, opaque)
    expand_opaque_layers(copy.graph, opaque)
    trained = trained_parameter(copy.graph, example_inputs)
    # Facts before sites: what is written to in place decides what is read as a chain.
    facts = GraphFacts(copy.graph, example_inputs, can_be_read, training=trained is not None)
    chains = find_handwritten_norms(copy.graph)
    sites, differences = tuple(find_sites(copy.graph, chains)), describe_lookalikes(chains.lookalikes)
    detail = ""
    if turns_gradients_on(copy.graph):
        detail = "the model is called without gradients and turns them on inside; turn them on around the call"
    elif trained is not None and options.training == "off":
        detail = (
            f"gradients are enabled and '{trained}' requires one, and lnfold.training is 'off'; call the model under "
            "torch.no_grad() or torch.inference_mode() to fold its norms"
        )
    if detail:
        verdicts = left_alone(sites, Reason.TRAINING, detail)
        without = (
            _without_gradients(graph_module, copy, example_inputs, sites, verdicts, options)
            if trained is not None
            else None
        )
        return Analysis(copy, sites, verdicts, {}, None, differences=differences, folded_without_gradients=without)
    costs = CostModel(training=trained is not None, weighs_weights=options.training == "auto")
    variables = build_streams(sites, facts, costs)
    assist = options.assist != "off"
    budgeted: Budgeted | None = None
    if options.memory_budget is None:
        placement = place(sites, variables, assist, costs)
    else:
        limit = limit_in_bytes(options.memory_budget, (p for p in example_inputs if isinstance(p, nn.Parameter)))
        budgeted = place_within(limit, sites, variables, assist, costs, facts.trained)
        placement = budgeted.placement
    folded, centered = placement.folded, parameters_centered_for(placement, variables)
    # What keeps copies of further weights is done by itself only where memory is not short.
    may_copy = options.memory_budget is None
    defer = options.defer if may_copy or options.defer != "auto" else "off"
    sums = functools.partial(torch_private_inductor.writes_products_as_sums, inductor)
    one_row, inside = plan_matrix_vectors(
        options.matrix_vector, may_copy, copy.graph, folded, centered, facts, costs, sums
    )
    rest = tuple(site for site in folded if site.node not in inside)
    generated = functools.partial(torch_private_inductor.generates_products, inductor)
    deferrals, scales = plan_deferrals(defer, options.absorb_affine, rest, centered, facts, costs, generated)
    deferred = {deferral.site.node: deferral.absorption for deferral in deferrals}
    mode = options.absorb_affine if may_copy or options.absorb_affine != "auto" else "off"
    absorptions, affine = plan_absorptions(mode, rest, centered, facts, costs, deferred)
    absorptions = (*absorptions, *deferred.values())
    # One rewrite for each product.
    absorbing = {consumer.operation.node for absorption in absorptions for consumer in absorption.consumers}
    one_row = one_row.without(absorbing)
    affine.update((node, absorption.in_words()) for node, absorption in deferred.items() if absorption.names())
    unlimited = budgeted.unlimited if budgeted else placement
    obstacles = name_obstacles(sites, unlimited, facts, assist, costs)
    verdicts = judge(sites, placement, variables, costs, budgeted.left if budgeted else None, obstacles)
    without = None
    if trained is not None:
        without = _without_gradients(graph_module, copy, example_inputs, sites, verdicts, options)
    return Analysis(
        copy,
        sites,
        say_lowering(verdicts, sites, absorptions, {*deferred, *inside}, affine, {**scales, **inside}),
        variables,
        placement if placement.folded else None,
        costs,
        frozenset(facts.trained),
        budgeted,
        absorptions=absorptions,
        deferrals=deferrals,
        matrix_vectors=one_row,
        differences=differences,
        folded_without_gradients=without,
    )


def _without_gradients(
    graph_module: fx.GraphModule,
    copy: fx.GraphModule,
    example_inputs: Sequence[Any],
    sites: Sequence[NormSite],
    verdicts: Sequence[Verdict],
    options: Options,
) -> int | None:
    """How many sites would fold if no gradients were recorded.

    None where none stays because they are, and where the model may be meant to be trained.
    """
    if all(verdict.reason is not Reason.TRAINING for verdict in verdicts) or not is_in_evaluation(graph_module.graph):
        return None
    facts = GraphFacts(copy.graph, example_inputs, can_be_read)
    return len(place(sites, build_streams(sites, facts), options.assist != "off").folded)
