"""The variables of placement: a tensor with a set of axes, what computing it centered needs, and who would notice."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from lncompile.passes.decisions import Blocker
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.placement.costs import NOTHING, Bytes
from lncompile.passes.rules.composed_sources import ComposedSource
from lncompile.passes.rules.writes import Write

VariableKey = tuple[fx.Node, Axes]


@dataclass
class Variable:
    """A tensor ``v`` with a set of axes ``A``: may ``Cv`` be computed in its place, and at what cost beside it?

    Attributes:
        source_blocker: why ``Cv`` cannot be computed in the place of ``v`` (rule 1 of the theory), or None.
        reader_blocker: who would notice that ``v`` is shifted (rule 2), the first of them; or None.
        reader_blockers: all who would.
        needs: what must be available centered: its operands, and what is written into it.
        operands: those of them that are operands of the operation that makes it.
        zeros: operands that ``C`` takes to zero, by their place in the operation.
        successors: consumers that are shifted with it.
        centering_cost: what it costs to center ``v`` explicitly (nothing for a parameter that is centered once and not
            per call); None where that cannot be done.
        making_cost: what it costs to make ``Cv`` in its place, beside what its operands cost.
        is_parameter: whether ``v`` is a parameter expression.
        parameter: the parameter expression whose values ``v`` has: itself, or what it is a cast of.
        is_zero_mean: whether ``v`` has zero mean along ``A`` as it is.
        is_recomputed: whether ``Cv`` is had for nothing by doing the (view of a parameter) once more, centered.
        composed_source: set where ``v`` is a product whose channels parameters scale and shift, which compose first.
        writes: assignments into ``v`` after it was made, whose values must be centered as well.
    """

    node: fx.Node
    axes: Axes
    source_blocker: Blocker | None = None
    reader_blocker: Blocker | None = None
    reader_blockers: tuple[Blocker, ...] = ()
    operation: Operation | None = None
    needs: dict[fx.Node, Axes] = field(default_factory=dict)
    operands: Mapping[fx.Node, Axes] = field(default_factory=dict)
    zeros: tuple[Key, ...] = ()
    successors: list[VariableKey] = field(default_factory=list)
    centering_cost: Bytes | None = None
    making_cost: Bytes = NOTHING
    parameter: fx.Node | None = None
    is_zero_mean: bool = False
    is_recomputed: bool = False
    composed_source: ComposedSource | None = None
    writes: tuple[Write, ...] = ()

    @property
    def key(self) -> VariableKey:
        """What identifies the variable."""
        return (self.node, self.axes)

    @property
    def is_parameter(self) -> bool:
        """Whether its values are those of a parameter expression."""
        return self.parameter is not None

    @property
    def centered_at_run_time(self) -> bool:
        """Whether centering it explicitly is work of every call, on a tensor that is not a parameter."""
        return not (self.is_parameter or self.is_zero_mean or self.is_recomputed)

    @property
    def blocker(self) -> Blocker | None:
        """Why it cannot become a stream: the producer's reason first, it is the one to mend first."""
        return self.source_blocker or self.reader_blocker


def first_blocker(start: VariableKey, variables: Mapping[VariableKey, Variable]) -> Blocker | None:
    """Return the nearest blocker that keeps ``start`` from being centered for free, breadth first."""
    queue: deque[tuple[VariableKey, bool]] = deque([(start, True)])
    seen = {(start, True)}
    while queue:
        key, is_centered = queue.popleft()
        variable = variables[key]
        if is_centered and not variable.centered_at_run_time:
            continue
        blocker = variable.blocker if is_centered else variable.reader_blocker
        if blocker is not None:
            return blocker
        needs = [(need, True) for need in variable.needs.items()] if is_centered else []
        for following in (*needs, *((successor, False) for successor in variable.successors)):
            if following not in seen:
                seen.add(following)
                queue.append(following)
    return None


def describe_blocker(blocker: Blocker) -> str:
    """Return a blocker in words: what, at which operation, where it stands."""
    if blocker.node is None:
        return blocker.sentence
    return f"{blocker.sentence}: {provenance.describe(blocker.node)}"
