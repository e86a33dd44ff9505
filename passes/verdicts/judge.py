"""Saying what was decided: a :class:`Verdict` for every LayerNorm call, folded or not."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType

from torch import fx

from lncompile.passes.decisions import Blocker, Reason, RuntimeCentering, UnrecognisedDifference, Verdict
from lncompile.passes.graph import provenance
from lncompile.passes.norms.folded_before import verdict_of_folded
from lncompile.passes.norms.handwritten import Lookalike
from lncompile.passes.norms.sites import NormSite, site_name
from lncompile.passes.placement.costs import NOTHING, CostModel
from lncompile.passes.placement.cut import Placement, benefit
from lncompile.passes.placement.variables import Variable, VariableKey, describe_blocker, first_blocker
from lncompile.passes.rewrites.affine import Absorption
from lncompile.passes.verdicts.obstacles import Named


def judge(
    sites: Sequence[NormSite],
    placement: Placement,
    variables: Mapping[VariableKey, Variable],
    costs: CostModel,
    over_budget: Mapping[fx.Node, str] | None = None,
    obstacles: Mapping[fx.Node, Named] = MappingProxyType({}),
) -> tuple[Verdict, ...]:
    """Return the verdict on each site, in order.

    Args:
        sites: the sites.
        placement: what was decided.
        variables: the streams it was decided on.
        costs: what was weighed.
        over_budget: the sites that stay because of memory alone, with why in words.
        obstacles: of sites that stay, what has to go so that they fold (:func:`.name_obstacles`).
    """
    folded = {site.node for site in placement.folded}
    return tuple(
        _folded_site(site, placement, variables)
        if site.node in folded
        else left_alone([site], Reason.MEMORY_BUDGET, over_budget[site.node])[0]
        if over_budget and site.node in over_budget
        else _left_site(site, variables, costs, obstacles.get(site.node))
        for site in sites
    )


def left_alone(sites: Sequence[NormSite], reason: Reason, detail: str) -> tuple[Verdict, ...]:
    """Return verdicts for a graph that is compiled untouched for one reason; what was folded before stays folded."""
    return tuple(
        verdict_of_folded(site)
        if site.folded_before
        else Verdict(site.name, site.location, False, "layer_norm", reason, detail, ())
        for site in sites
    )


def describe_lookalikes(lookalikes: Sequence[Lookalike]) -> tuple[UnrecognisedDifference, ...]:
    """Return what the report says of the differences from a mean that are not recognised as norms, in order."""
    return tuple(
        UnrecognisedDifference(site_name(found.node), provenance.location(found.node), Reason.UNRECOGNISED, found.why)
        for found in lookalikes
    )


def say_lowering(
    verdicts: Sequence[Verdict],
    sites: Sequence[NormSite],
    absorptions: Sequence[Absorption],
    deferred: Collection[fx.Node],
    affine: Mapping[fx.Node, str],
    deferral: Mapping[fx.Node, str],
    lowers: bool = True,
) -> tuple[Verdict, ...]:
    """Add to the verdicts what became of γ and β, and of the scale.

    Args:
        verdicts: one for each site.
        sites: the sites.
        absorptions: whose affine is absorbed.
        deferred: whose scale is deferred, by their nodes.
        affine: what became of γ and β and why, by the norm's node.
        deferral: what became of the scale and why, likewise.
        lowers: whether folded calls become RMSNorms at all.
    """
    names = {absorption.site.node: absorption.names() for absorption in absorptions}
    return tuple(
        dataclasses.replace(
            verdict,
            lowering="rms_norm_deferred"
            if site.node in deferred
            else verdict.lowering
            if lowers or site.handwritten is not None
            else "layer_norm",
            affine_absorbed_by=names.get(site.node, ()),
            affine=affine.get(site.node, ""),
            deferral=deferral.get(site.node, ""),
        )
        for verdict, site in zip(verdicts, sites, strict=True)
    )


def _folded_site(site: NormSite, placement: Placement, variables: Mapping[VariableKey, Variable]) -> Verdict:
    if site.folded_before:
        return verdict_of_folded(site)
    parameters, activations = _centered_by((site.input, site.axes), placement, variables)
    places = [f"in {len(parameters)} parameter{'s' if len(parameters) != 1 else ''}"] if parameters else []
    if activations:
        places.append(f"at run time after {', '.join(provenance.describe(node) for node in activations)}")
    words = f"centered {' and '.join(places)}" if places else "the mean of its input is zero already"
    places_of_activations = tuple(provenance.module_path(node) or node.name for node in activations)
    return Verdict(site.name, site.location, True, "rms_norm", None, words, tuple(parameters), places_of_activations)


def _centered_by(
    start: VariableKey, placement: Placement, variables: Mapping[VariableKey, Variable]
) -> tuple[list[str], list[fx.Node]]:
    """Names of the parameters and the activations that are centered for one site, nearest first."""
    parameters: dict[str, None] = {}
    activations: dict[fx.Node, None] = {}
    queue, seen = deque([start]), {start}
    while queue:
        key = queue.popleft()
        variable = variables[key]
        if key not in placement.streams:
            if variable.parameter is not None:
                parameters.update(dict.fromkeys(provenance.parameter_names(variable.parameter)))
            elif variable.is_recomputed:
                queue.extend(variable.needs.items())
            elif not variable.is_zero_mean:
                activations[variable.node] = None
            continue
        if variable.composed_source is not None:
            for parameter in variable.composed_source.parameters():
                parameters.update(dict.fromkeys(provenance.parameter_names(parameter)))
        for need in variable.needs.items():
            if need not in seen:
                seen.add(need)
                queue.append(need)
    return list(parameters), list(activations)


def _left_site(
    site: NormSite, variables: Mapping[VariableKey, Variable], costs: CostModel, named: Named | None
) -> Verdict:
    blocker = named.blocker if named is not None else first_blocker((site.input, site.axes), variables)
    if blocker is None and costs.training:
        blocker = Blocker(Reason.TRAINING, _price_of_training(site, variables, costs), site.input)
    elif blocker is None:
        blocker = Blocker(
            Reason.NOT_WORTH_IT, "centering its input at each call would cost as much as it saves", site.input
        )
    words = describe_blocker(blocker)
    returned = named.returned if named is not None else ()
    others = len({tensor.made_by for tensor in returned}) - 1
    words += f", and {others} more returned tensor{'s' if others > 1 else ''}" if others > 0 else ""
    return Verdict(site.name, site.location, False, "layer_norm", blocker.reason, words, (), returned=returned)


def _price_of_training(site: NormSite, variables: Mapping[VariableKey, Variable], costs: CostModel) -> str:
    """Why a norm that could fold does not while its weights are trained, in words."""
    weights, total = 0, NOTHING
    queue, seen = deque([(site.input, site.axes)]), {(site.input, site.axes)}
    while queue:
        variable = variables[queue.popleft()]
        if variable.parameter is not None:
            weights += 1
            total += variable.centering_cost or NOTHING
            continue
        total += variable.making_cost
        weights += len(set(variable.composed_source.parameters())) if variable.composed_source else 0
        for need in variable.needs.items():
            if need not in seen:
                seen.add(need)
                queue.append(need)
    return (
        f"in training its {weights} weight{'s' if weights != 1 else ''} would be centered at every step, for {total} "
        f"bytes of memory traffic; the norm alone saves {benefit(site, costs)}, and those that share the weights do "
        "not save the rest"
    )


def describe_centerings(
    placement: Placement,
    variables: Mapping[VariableKey, Variable],
    costs: CostModel,
    without_budget: Placement | None = None,
) -> tuple[RuntimeCentering, ...]:
    """Return the centerings that happen at each call, with the norms each serves.

    Args:
        placement: what was decided.
        variables: the streams it was decided on.
        costs: what was weighed.
        without_budget: what would have been decided without a budget of memory, where there is one.
    """
    centerings = []
    for key in placement.centered - placement.streams:
        variable = variables[key]
        if not variable.centered_at_run_time:
            continue
        served = [
            site
            for site in placement.centered_for
            if variable.node in _centered_by((site.input, site.axes), placement, variables)[1]
        ]
        saved = sum((benefit(site, costs) for site in served), NOTHING)
        norms = f"{len(served)} norm{'s' if len(served) != 1 else ''}"
        why = describe_blocker(variable.blocker) if variable.blocker else "a cheaper place than its parameters"
        if without_budget is not None and key in without_budget.streams:
            why = "copies of its weights do not fit within lnfold.memory_budget"
        cost = f"{variable.centering_cost} bytes of memory traffic a call, saves {saved}"
        centerings.append(
            RuntimeCentering(
                provenance.module_path(variable.node) or variable.node.name,
                provenance.location(variable.node),
                f"one centering lets {norms} fold: costs {cost} ({why})",
            )
        )
    return tuple(sorted(centerings, key=lambda centering: centering.after))
