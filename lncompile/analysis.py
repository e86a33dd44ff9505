"""From Dynamo's graph to a decision on every site, without touching a weight or the graph handed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from lncompile.options import Options
from lncompile.passes.affine import Absorption, parameters_centered_for, plan_absorptions
from lncompile.passes.copying import copy_graph_module
from lncompile.passes.costs import CostModel
from lncompile.passes.decisions import Reason, Site
from lncompile.passes.deferral import Deferral, plan_deferrals
from lncompile.passes.expand import EXPANDED_FROM, closed_norms, expand_opaque_layers, find_opaque_layers
from lncompile.passes.graph_facts import GraphFacts, trained_parameter, turns_gradients_on
from lncompile.passes.placement import Placement, place
from lncompile.passes.sites import NormSite, find_sites
from lncompile.passes.streams import Variable, VariableKey, build_streams
from lncompile.passes.subgraphs import norms_in_subgraphs
from lncompile.passes.verdicts import judge, left_alone, say_lowering


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
        absorptions: norms whose γ and β go into the linear layers that read them.
        deferrals: norms whose scale goes behind these layers.
    """

    graph_module: fx.GraphModule
    sites: tuple[NormSite, ...]
    verdicts: tuple[Site, ...]
    variables: dict[VariableKey, Variable]
    placement: Placement | None
    costs: CostModel = field(default_factory=CostModel)
    trained: frozenset[fx.Node] = frozenset()
    absorptions: tuple[Absorption, ...] = ()
    deferrals: tuple[Deferral, ...] = ()


def analyse(graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Analysis:
    """Decide for every LayerNorm site of a graph.

    Args:
        graph_module: the graph as Dynamo hands it to a backend, parameters as placeholders. Not changed.
        example_inputs: the value of each placeholder, real Parameters among them.
        options: our options.

    Returns:
        The decisions, on a copy of the graph.
    """
    opaque = {node.name for node in find_opaque_layers(graph_module.graph)}
    verdicts: dict[str, list[Site]] = {**closed_norms(graph_module.graph), **norms_in_subgraphs(graph_module)}
    while True:
        analysis = _analyse_expanded(graph_module, example_inputs, options, opaque)
        needed = {_layer(site) for site in (analysis.placement.folded if analysis.placement else ())} & opaque
        for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True):
            if _layer(site) in opaque - needed:
                verdicts.setdefault(_layer(site), []).append(verdict)
        if needed == opaque:
            return dataclasses.replace(analysis, verdicts=_in_order(analysis, verdicts))
        # An opaque layer in which nothing folds goes to Inductor as it was; leaving it closed may change the rest.
        opaque = needed


def _layer(site: NormSite) -> str:
    """Name of the opaque operator that a site was written out of, or ``""``."""
    return str(site.node.meta.get(EXPANDED_FROM, ""))


def _in_order(analysis: Analysis, closed: dict[str, list[Site]]) -> tuple[Site, ...]:
    """The verdicts in the order of the graph, with those of the norms inside operators that stay closed."""
    verdicts = {site.node: verdict for site, verdict in zip(analysis.sites, analysis.verdicts, strict=True)}
    ordered: list[Site] = []
    for node in analysis.graph_module.graph.nodes:
        ordered += closed.get(node.name, [])
        ordered += [verdicts[node]] if node in verdicts else []
    return tuple(ordered)


def _analyse_expanded(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], options: Options, opaque: set[str]
) -> Analysis:
    copy = copy_graph_module(graph_module)
    expand_opaque_layers(copy.graph, opaque)
    trained = trained_parameter(copy.graph, example_inputs)
    # Facts before sites: what is written to in place decides what is read as a chain.
    facts = GraphFacts(copy.graph, example_inputs, training=trained is not None)
    sites = tuple(find_sites(copy.graph))
    detail = ""
    if turns_gradients_on(copy.graph):
        detail = "the model is called without gradients and turns them on inside; turn them on around the call"
    elif trained is not None and options.training == "off":
        detail = (
            f"gradients are enabled and '{trained}' requires one, and lnfold.training is 'off'; call the model under "
            "torch.no_grad() or torch.inference_mode() to fold its norms"
        )
    if detail:
        return Analysis(copy, sites, left_alone(sites, Reason.TRAINING, detail), {}, None)
    costs = CostModel(training=trained is not None, weighs_weights=options.training == "auto")
    variables = build_streams(sites, facts, costs)
    placement = place(sites, variables, options.assist, costs)
    folded, centered = placement.folded, parameters_centered_for(placement, variables)
    deferrals, scales = plan_deferrals(options.defer, options.absorb_affine, folded, centered, facts, costs)
    deferred = {deferral.site.node: deferral.absorption for deferral in deferrals}
    absorptions, affine = plan_absorptions(options.absorb_affine, folded, centered, facts, costs, deferred)
    absorptions = (*absorptions, *deferred.values())
    affine.update((node, absorption.in_words()) for node, absorption in deferred.items() if absorption.names())
    verdicts = say_lowering(judge(sites, placement, variables, costs), sites, absorptions, deferred, affine, scales)
    decided = placement if placement.folded else None
    return Analysis(copy, sites, verdicts, variables, decided, costs, frozenset(facts.trained), absorptions, deferrals)
