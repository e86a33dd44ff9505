"""How every reader of a placement gets what it needs centered: what the rewrite makes, and what a budget counts.

Placement says which tensors are computed centered and of which a centered version is available. A reader (a stream that
is computed of some operands, a site of its input) then gets each operand in one of four ways (:class:`Way`). Parts of a
parameter that one reader wants together, the queries and the keys of a joint projection say, are centered in one copy.

:func:`supplies_of` is the only place where that is decided: ``rewrites.center`` makes what it says, and
``placement.budget`` counts its bytes.
"""

from __future__ import annotations

import enum
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lncompile.passes.graph.axes import Axes
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.cut import Placement
from lncompile.passes.placement.variables import Variable, VariableKey


class Way(enum.Enum):
    """How a reader gets an operand centered."""

    #: It is computed centered, or its mean is zero as it is.
    ITSELF = "itself"
    #: A parameter expression is centered into a copy.
    COPY = "copy"
    #: A view of a parameter is done once more, of the centered one.
    REDONE = "redone"
    #: An activation is centered at each call.
    AT_RUN_TIME = "at run time"


@dataclass(frozen=True)
class Supply:
    """What a reader gets for one operand.

    Attributes:
        operand: the operand.
        way: how it is centered.
        axes: along which sets of axes; none where it is ``ITSELF``.
        sources: of what is done once more, what it is done of.
    """

    operand: fx.Node
    way: Way
    axes: tuple[Axes, ...] = ()
    sources: tuple[Supply, ...] = ()

    def everything(self) -> Iterator[Supply]:
        """What has to be made for it, what it is made of first."""
        for source in self.sources:
            yield from source.everything()
        yield self


@dataclass(frozen=True)
class Supplies:
    """What all readers get.

    Attributes:
        sites: for each site, what it gets for its input.
        streams: by a stream's node and its operand, what it gets.
        keys: the streams that are computed centered.
    """

    sites: tuple[Supply, ...]
    streams: Mapping[tuple[fx.Node, fx.Node], Supply]
    keys: tuple[VariableKey, ...]

    def made(self) -> tuple[Supply, ...]:
        """Everything that has to be made, each once, what it is made of first."""
        wanted = (*self.sites, *self.streams.values())
        every = dict.fromkeys(part for supply in wanted for part in supply.everything())
        return tuple(supply for supply in every if supply.way is not Way.ITSELF)


def supply(
    operand: fx.Node,
    sets: Sequence[Axes],
    placement: Placement,
    variables: Mapping[VariableKey, Variable],
) -> Supply:
    """Return how a reader gets an operand centered.

    Args:
        operand: the operand.
        sets: along which sets of axes.
        placement: what is centered where.
        variables: the streams that it was made from.
    """
    # What is centered in place is centered in its copies too.
    explicit = tuple(
        axes
        for axes in dict.fromkeys(sets)
        if (operand, axes) not in placement.streams and not variables[(operand, axes)].is_zero_mean
    )
    if not explicit:
        return Supply(operand, Way.ITSELF)
    parts = [variables[(operand, axes)] for axes in explicit]
    if all(part.is_recomputed for part in parts):
        along: dict[fx.Node, list[Axes]] = defaultdict(list)
        for part in parts:
            for source, axes in part.needs.items():
                along[source].append(axes)
        sources = tuple(supply(source, several, placement, variables) for source, several in along.items())
        return Supply(operand, Way.REDONE, explicit, sources)
    if parts[0].parameter is not None:
        return Supply(operand, Way.COPY, explicit)
    assert len(parts) == 1  # an activation is never centered in parts
    return Supply(operand, Way.AT_RUN_TIME, explicit)


def supplies_of(
    placement: Placement, variables: Mapping[VariableKey, Variable], sites: Sequence[NormSite] | None = None
) -> Supplies:
    """Return what every reader of a placement gets.

    Args:
        placement: what is centered where.
        variables: the streams that it was made from.
        sites: of its sites those that are asked about; by default all.
    """
    keys = placement.streams if sites is None else reached(placement, variables, sites) & placement.streams
    ordered = tuple(key for key in variables if key in keys)
    # Which sets of axes one stream's node wants of one operand: parts of a tensor are streams of one node.
    wanted: dict[tuple[fx.Node, fx.Node], list[Axes]] = defaultdict(list)
    for node, axes in ordered:
        for operand, along in variables[(node, axes)].needs.items():
            wanted[(node, operand)].append(along)
    return Supplies(
        tuple(
            supply(site.input, [site.axes], placement, variables)
            for site in (placement.centered_for if sites is None else sites)
        ),
        {(node, operand): supply(operand, sets, placement, variables) for (node, operand), sets in wanted.items()},
        ordered,
    )


def reached(
    placement: Placement, variables: Mapping[VariableKey, Variable], sites: Iterable[NormSite]
) -> set[VariableKey]:
    """Return the centered variables of a placement that some of its sites need."""
    queue = deque((site.input, site.axes) for site in sites)
    seen = set(queue)
    while queue:
        key = queue.popleft()
        variable = variables[key]
        if key in placement.streams or variable.is_recomputed:
            for need in variable.needs.items():
                if need not in seen:
                    seen.add(need)
                    queue.append(need)
    return seen
