"""What the passes that decide say of their decisions, for people who look at the pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from lncompile.passes.graph.provenance import describe, parameter_names
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.pipeline.context import Known
from lncompile.passes.pipeline.cut_text import cut_in_words


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines)


def _named(site: NormSite) -> str:
    place = f" ({site.location})" if site.location else ""
    return f"{site.name}{place}"


def writes(known: Known) -> str:
    """Say what is written to, and why it is not rewritten."""
    found = known.writes
    read = [f"{describe(node)}: assigned to, read as a part of its making" for node in found.assigned]
    return _lines([*read, *(f"{describe(node)}: {why}" for node, why in found.written.items())])


def facts(known: Known) -> str:
    """Say which inputs are parameters, which of them cannot be rewritten, and what is computed of them."""
    found = known.facts
    lines = [f"{problem}" for problem in found.unsupported.values()]
    computed = [node for node in known.graph.nodes if node in found.parametric and node.op != "placeholder"]
    inputs = sum(node.op == "placeholder" for node in found.parametric)
    lines.append(f"{inputs} parameters can be centered")
    lines += [f"{describe(node)} is computed of {', '.join(parameter_names(node))} alone" for node in computed]
    return _lines(lines)


def chains(known: Known) -> str:
    """Say which norms are written by hand, and which differences from a mean are not norms."""
    norms = [f"{describe(norm.mean)}: the mean of a norm by hand" for norm in known.chains.norms]
    return _lines([*norms, *(f"{describe(found.node)}: {found.why}" for found in known.chains.lookalikes)])


def sites(known: Known) -> str:
    """Name the sites."""
    return _lines(f"{_named(site)} normalises {describe(site.input)} along {site.axes}" for site in known.sites)


def streams(known: Known) -> str:
    """Say how much was explored."""
    blocked = sum(variable.source_blocker is not None for variable in known.variables.values())
    return (
        f"{len(known.variables)} tensors could be centered or shifted; {blocked} of them cannot be computed centered "
        "in their place. What is known of each stands in the text of 'place'."
    )


def placement(known: Known) -> str:
    """Say of every site what would have to be centered for it, at what price, and on which side of the cut it is."""
    if known.placed is None:
        return f"nothing is placed: {known.gradients.refusal}"
    return cut_in_words(
        known.sites, known.variables, known.placed.placement, known.costs, known.options.assist != "off"
    )


def _by_site(known: Known, words: Mapping[fx.Node, str]) -> str:
    return _lines(f"{_named(site)}: {words[site.node]}" for site in known.sites if words.get(site.node))


def deferrals(known: Known) -> str:
    """Say of every folded norm whether its scale is deferred, and why."""
    return _by_site(known, known.deferred.words)


def absorptions(known: Known) -> str:
    """Say of every folded norm what became of γ and β, and why."""
    return _by_site(known, known.absorbed.words)


def verdicts(known: Known) -> str:
    """Say what became of every site."""
    return _lines(
        f"{verdict.name}: {verdict.lowering if verdict.folded else 'stays'}, {verdict.detail}"
        for verdict in known.verdicts
    )
