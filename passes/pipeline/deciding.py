"""The passes that decide: from a copy of the graph to a verdict on every LayerNorm. They look at no weight's values.

Each function is a pass (:mod:`.interface`): what it reads was made by passes before it, what it returns is read by
those behind it. The first three change the copy, so that norms inside of opaque operators, and those folded before, can
be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from torch import fx, nn

from lncompile.lowering import is_faster_as_sum, torch_private_inductor
from lncompile.passes.decisions import Reason, Verdict
from lncompile.passes.graph.effects import Writes, examples_of, find_writes
from lncompile.passes.graph.facts import GraphFacts, is_in_evaluation, trained_parameter, turns_gradients_on
from lncompile.passes.norms.expand import expand_opaque_layers, find_opaque_layers
from lncompile.passes.norms.folded_before import gather_folded_norms
from lncompile.passes.norms.handwritten import Chains, find_handwritten_norms
from lncompile.passes.norms.regions import find_regions, write_out_regions
from lncompile.passes.norms.sites import NormSite, find_sites
from lncompile.passes.pipeline import wording
from lncompile.passes.pipeline.context import AffineAbsorbed, Deferred, Gradients, Known, OneRow, Placed
from lncompile.passes.pipeline.interface import decides, rewrites
from lncompile.passes.placement.budget import Budgeted, limit_in_bytes, place_within
from lncompile.passes.placement.cut import place as place_for_free
from lncompile.passes.placement.streams import build_streams
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rewrites.affine import parameters_centered_for, plan_absorptions
from lncompile.passes.rewrites.deferral import plan_deferrals
from lncompile.passes.rewrites.matrix_vector import MatrixVectors, plan_matrix_vectors
from lncompile.passes.rules.writes import can_be_read
from lncompile.passes.verdicts.judge import judge, left_alone, say_lowering
from lncompile.passes.verdicts.obstacles import Named, name_obstacles


def _no_names(known: Known) -> Collection[str]:
    return ()


@rewrites(Known.written_out, instead=_no_names)
def regions(known: Known) -> Collection[str]:
    """Calls of compiled regions are written out, so that streams can be followed through them."""
    names = {node.name for node in find_regions(known.graph)}.intersection(known.opened)
    write_out_regions(known.graph, names)
    return names


@rewrites(Known.expanded, instead=_no_names)
def expand(known: Known) -> Collection[str]:
    """Opaque encoder layers are written out as the operations they stand for, norms among them."""
    names = {node.name for node in find_opaque_layers(known.graph)}.intersection(known.opened)
    expand_opaque_layers(known.graph, names)
    return names


def _none_gathered(known: Known) -> int:
    return 0


@rewrites(Known.gathered, instead=_none_gathered)
def gather(known: Known) -> int:
    """Norms that were folded before, by a fold of the model, become one operation each."""
    return gather_folded_norms(known.graph)


@decides(Known.writes, text=wording.writes)
def writes(known: Known) -> Writes:
    """What is written to in place: what is read there must not be read as a chain, nor be centered."""
    return find_writes(known.graph, examples_of(known.graph, known.example_inputs), can_be_read)


@decides(Known.gradients)
def gradients(known: Known) -> Gradients:
    """Whether gradients of parameters are wanted, and whether the graph has to stay as it is because of them."""
    parameter = trained_parameter(known.graph, known.example_inputs)
    if turns_gradients_on(known.graph):
        return Gradients(
            parameter,
            "the model is called without gradients and turns them on inside; turn them on around the call",
        )
    if parameter is not None and known.options.training == "off":
        return Gradients(
            parameter,
            f"gradients are enabled and '{parameter}' requires one, and lnfold.training is 'off'; call the model under "
            "torch.no_grad() or torch.inference_mode() to fold its norms",
        )
    return Gradients(parameter)


@decides(Known.facts, text=wording.facts)
def facts(known: Known) -> GraphFacts:
    """Whose values are functions of parameters alone, and can be computed once; which of them are trained."""
    return GraphFacts(known.graph, known.example_inputs, known.writes, training=known.gradients.are_wanted)


def _no_chains(known: Known) -> Chains:
    return Chains((), ())


@decides(Known.chains, instead=_no_chains, text=wording.chains)
def chains(known: Known) -> Chains:
    """The norms written by hand: a mean that is subtracted, and what scales the difference."""
    return find_handwritten_norms(known.graph, known.writes)


@decides(Known.sites, text=wording.sites)
def sites(known: Known) -> tuple[NormSite, ...]:
    """The LayerNorms of the graph: calls, and chains."""
    return tuple(find_sites(known.graph, known.chains))


@decides(Known.variables, text=wording.streams)
def streams(known: Known) -> dict[VariableKey, Variable]:
    """What could be computed centered, what that needs, and who would notice: rules followed from the sites."""
    return {} if known.gradients.refusal else build_streams(known.sites, known.facts, known.costs)


def _nothing_placed(known: Known) -> Placed | None:
    return None


@decides(Known.placed, instead=_nothing_placed, text=wording.placement)
def place(known: Known) -> Placed | None:
    """Where to center: the minimum cut, within a budget of memory where there is one."""
    options, variables, costs = known.options, known.variables, known.costs
    if known.gradients.refusal:
        return None
    budgeted: Budgeted | None = None
    if options.memory_budget is None:
        placement = place_for_free(known.sites, variables, options.assist != "off", costs)
    else:
        parameters = (value for value in known.example_inputs if isinstance(value, nn.Parameter))
        limit = limit_in_bytes(options.memory_budget, parameters)
        budgeted = place_within(limit, known.sites, variables, options.assist != "off", costs, known.facts.trained)
        placement = budgeted.placement
    return Placed(placement, budgeted, parameters_centered_for(placement, variables))


def _centered_for(known: Known) -> Mapping[fx.Node, Collection[fx.Node]]:
    return {} if known.placed is None else known.placed.centered


def _may_copy(known: Known) -> bool:
    """Whether a further copy of a weight may be made unasked: memory is not short."""
    return known.options.memory_budget is None


def _no_sums(known: Known) -> OneRow:
    return OneRow(MatrixVectors())


@decides(Known.one_row, instead=_no_sums)
def one_row(known: Known) -> OneRow:
    """Which products of one row become sums, and which folded norms go into them."""
    products, inside = plan_matrix_vectors(
        "off" if known.placed is None else known.options.matrix_vector,
        _may_copy(known),
        known.graph,
        known.folded,
        _centered_for(known),
        known.facts,
        known.costs,
        functools.partial(is_faster_as_sum, config_patches=known.inductor),
    )
    return OneRow(products, inside)


def _not_in_sums(known: Known) -> tuple[NormSite, ...]:
    return tuple(site for site in known.folded if site.node not in known.one_row.inside)


def _nothing_deferred(known: Known) -> Deferred:
    return Deferred()


@decides(Known.deferred, instead=_nothing_deferred, text=wording.deferrals)
def deferrals(known: Known) -> Deferred:
    """Which folded norms hand their rows to the products behind them unscaled."""
    options = known.options
    planned, words = plan_deferrals(
        options.defer if _may_copy(known) or options.defer != "auto" else "off",
        "off" if "absorb" in known.off else options.absorb_affine,
        _not_in_sums(known),
        _centered_for(known),
        known.facts,
        known.costs,
        functools.partial(torch_private_inductor.generates_products, known.inductor),
    )
    return Deferred(planned, words)


def _nothing_absorbed(known: Known) -> AffineAbsorbed:
    return AffineAbsorbed()


@decides(Known.absorbed, instead=_nothing_absorbed, text=wording.absorptions)
def absorptions(known: Known) -> AffineAbsorbed:
    """Which folded norms hand γ and β to the products behind them; those of deferred norms are decided already."""
    options, deferred = known.options, known.deferred.absorptions
    mode = options.absorb_affine if _may_copy(known) or options.absorb_affine != "auto" else "off"
    planned, words = plan_absorptions(
        mode, _not_in_sums(known), _centered_for(known), known.facts, known.costs, deferred
    )
    words.update((node, absorption.in_words()) for node, absorption in deferred.items() if absorption.names())
    return AffineAbsorbed((*planned, *deferred.values()), words)


def _no_obstacles(known: Known) -> Mapping[fx.Node, Named]:
    return {}


@decides(Known.obstacles, instead=_no_obstacles)
def obstacles(known: Known) -> Mapping[fx.Node, Named]:
    """What has to go so that a site that stays folds, for the report."""
    if known.placed is None:
        return {}
    budgeted = known.placed.budgeted
    unlimited = known.placed.placement if budgeted is None else budgeted.unlimited
    return name_obstacles(known.sites, unlimited, known.facts, known.options.assist != "off", known.costs)


@decides(Known.verdicts, text=wording.verdicts)
def verdicts(known: Known) -> tuple[Verdict, ...]:
    """The decision on every site, in words: folded and how, or left and why."""
    if known.gradients.refusal:
        return left_alone(known.sites, Reason.TRAINING, known.gradients.refusal)
    if known.placed is None:
        return left_alone(known.sites, Reason.SWITCHED_OFF, "pass 'center' is switched off")
    budgeted = known.placed.budgeted
    over_budget = None if budgeted is None else budgeted.left
    judged = judge(known.sites, known.placed.placement, known.variables, known.costs, over_budget, known.obstacles)
    deferred, inside = known.deferred, known.one_row.inside
    return say_lowering(
        judged,
        known.sites,
        known.absorbed.absorptions,
        {*deferred.absorptions, *inside},
        known.absorbed.words,
        {**deferred.words, **inside},
        lowers="lower" not in known.off,
    )


def sites_without_gradients(known: Known) -> int | None:
    """Return how many sites would fold if no gradients were recorded.

    None where none stays because they are, and where the model may be meant to be trained.
    """
    if not known.gradients.are_wanted or all(verdict.reason is not Reason.TRAINING for verdict in known.verdicts):
        return None
    if not is_in_evaluation(known.graph):
        return None
    untrained = GraphFacts(known.graph, known.example_inputs, known.writes)
    variables = build_streams(known.sites, untrained)
    return len(place_for_free(known.sites, variables, known.options.assist != "off").folded)
