"""The streams of a graph: every tensor that could be computed centered, what that would need, and who would notice.

Starting from the inputs of the LayerNorm sites, the rules are followed up to the operands that would have to be
centered, and down to the consumers that would have to be streams too. The result is a set of variables ``(v, A)`` with
implications between them, which placement turns into a minimum cut. Nothing is decided and nothing changed here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes import provenance
from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.composed_sources import ComposedSource, find_composed_source
from lncompile.passes.decisions import Blocked, Blocker, Reason
from lncompile.passes.graph_facts import GraphFacts
from lncompile.passes.operands import is_constant_along
from lncompile.passes.rules import INVARIANCES, RULES, ZERO_MEANS, Linear, blockers
from lncompile.passes.sites import NormSite

VariableKey = tuple[fx.Node, Axes]

# Stands in for a dynamic size that nothing is known of; the same number Inductor uses.
UNKNOWN_SIZE_HINT = 8192


@dataclass
class Variable:
    """A tensor ``v`` with a set of axes ``A``: may ``Cv`` be computed in its place, and at what cost beside it?

    Attributes:
        blocker: why ``v`` itself cannot become a stream (rule 1 or 2 of the theory), or None.
        needs: operands that must be available centered.
        zeros: operands that ``C`` takes to zero, by their place in the operation.
        successors: consumers that become streams with it.
        centering_cost: what it costs to center ``v`` explicitly, in elements reduced (0 for a parameter, which is
            centered once and not per call); None where that cannot be done.
        is_parameter: whether ``v`` is a parameter expression.
        is_zero_mean: whether ``v`` has zero mean along ``A`` as it is.
        is_recomputed: whether ``Cv`` is had for nothing by doing the (view of a parameter) once more, centered.
        composed_source: set where ``v`` is a product whose channels parameters scale and shift, which compose first.
    """

    node: fx.Node
    axes: Axes
    blocker: Blocker | None = None
    operation: Operation | None = None
    needs: dict[fx.Node, Axes] = field(default_factory=dict)
    zeros: tuple[Key, ...] = ()
    successors: list[VariableKey] = field(default_factory=list)
    centering_cost: int | None = None
    is_parameter: bool = False
    is_zero_mean: bool = False
    is_recomputed: bool = False
    composed_source: ComposedSource | None = None

    @property
    def key(self) -> VariableKey:
        """What identifies the variable."""
        return (self.node, self.axes)


@dataclass(frozen=True)
class Resolved:
    """One operation read as linear at given axes of its result."""

    needs: Mapping[fx.Node, Axes]
    zeros: tuple[Key, ...]


def element_count(tensor: Tensor) -> int:
    """Number of elements, dynamic sizes by the values they had when the graph was traced."""
    count = 1
    for size in tensor.shape:
        count *= torch_private.size_hint(size, UNKNOWN_SIZE_HINT)
    return count


def build_streams(sites: Sequence[NormSite], facts: GraphFacts) -> dict[VariableKey, Variable]:
    """Explore everything reachable from the sites' inputs.

    Args:
        sites: the LayerNorm sites of the graph.
        facts: the facts of the graph.

    Returns:
        The variables by key; every key that appears in ``needs`` or ``successors`` of an unblocked variable is there.
    """
    variables: dict[VariableKey, Variable] = {}
    queue: deque[VariableKey] = deque((site.input, site.axes) for site in sites)
    while queue:
        key = queue.popleft()
        if key in variables:
            continue
        variable = _explore(*key, facts)
        variables[key] = variable
        if variable.blocker is None or variable.is_recomputed:
            queue.extend(variable.needs.items())
        if variable.blocker is None:
            queue.extend(variable.successors)
    return variables


def _explore(node: fx.Node, axes: Axes, facts: GraphFacts) -> Variable:
    variable = Variable(node, axes)
    if node in facts.parametric and node.op == "placeholder":
        # Parameters are never streams themselves: their raw value stays; a centered one costs nothing per call.
        variable.is_parameter, variable.centering_cost = True, 0
        variable.blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, "a parameter", node)
        return variable
    tensor = tensor_of(node)
    if node in facts.unsupported:
        variable.blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, facts.unsupported[node], node)
        return variable
    if node in facts.written:
        variable.blocker = Blocker(Reason.MUTATION, facts.written[node], node)
        return variable
    operation = variable.operation = canonicalise(node)
    if operation is not None and operation.name in ZERO_MEANS and ZERO_MEANS[operation.name](operation, axes):
        variable.is_zero_mean, variable.centering_cost = True, 0
        variable.blocker = Blocker(Reason.NORM_OUTPUT, "its mean is zero already", node)
        return variable
    if tensor is not None and not tensor.is_floating_point():
        variable.blocker = Blocker(Reason.UNKNOWN_OPERATION, f"a tensor of dtype {tensor.dtype} on the path", node)
        return variable
    _explore_producer(variable, facts)
    # The needs are those of its view only if the view let the centering through.
    can_be_redone = variable.blocker is None and bool(variable.needs) and not variable.zeros
    raw_is_read = _explore_consumers(variable)
    if tensor is not None:
        variable.is_parameter = node in facts.parametric
        # A centered copy next to a raw value that others still read is written to memory as well as reduced. A
        # parameter expression is centered once; the mark of 1 prefers to center the parameters it is made of.
        variable.is_recomputed = can_be_redone and not variable.is_parameter and is_view_of_parameter(node, facts)
        cheap = variable.is_parameter or variable.is_recomputed
        variable.centering_cost = 1 if cheap else element_count(tensor) * (2 if raw_is_read else 1)
    return variable


# Views that are no parameter expressions, because the result is larger than the parameter or depends on the call.
_VIEWS = frozenset(
    "expand expand_as repeat view reshape view_as flatten unflatten squeeze unsqueeze permute transpose t mT movedim "
    "cast to type_as".split()
)


def is_view_of_parameter(node: fx.Node, facts: GraphFacts) -> bool:
    """Whether a tensor is a parameter in another shape (``token.expand(batch, -1, -1)``), however it is used."""
    source: Any = node
    while source not in facts.parametric:
        operation = canonicalise(source) if isinstance(source, fx.Node) else None
        if operation is None or operation.name not in _VIEWS or operation.in_place or source in facts.written:
            return False
        source = operation["input"]
    return True


def _explore_producer(variable: Variable, facts: GraphFacts) -> None:
    node, operation = variable.node, variable.operation
    if operation is None or operation.name not in RULES:
        variable.blocker = Blocker(*blockers.explain_producer(node), node)
        return
    try:
        resolved = resolve(operation, variable.axes)
    except Blocked as blocked:
        variable.composed_source = find_composed_source(operation, variable.axes, facts)
        if variable.composed_source is None:
            variable.blocker = Blocker(blocked.reason, blocked.sentence, node)
        return
    variable.needs, variable.zeros = dict(resolved.needs), resolved.zeros


def _explore_consumers(variable: Variable) -> bool:
    """Find the consumers that become streams; block the variable at one that would notice. True if one would.

    Where the producer is blocked too, its reason stands: it is the one to mend first.
    """
    for user in variable.node.users:
        try:
            successor = follow(variable.node, variable.axes, user)
        except Blocked as blocked:
            variable.blocker = variable.blocker or Blocker(blocked.reason, blocked.sentence, user)
            return True
        if successor is not None:
            variable.successors.append(successor)
    return False


def follow(node: fx.Node, axes: Axes, user: fx.Node) -> VariableKey | None:
    """Return what ``user`` becomes if ``node`` is a stream along ``axes``; None if it does not notice.

    Raises:
        Blocked: if the user would notice.
    """
    if user.op == "output":
        raise Blocked(Reason.GRAPH_OUTPUT, "the stream is also returned by the graph")
    operation = canonicalise(user)
    if operation is None:
        raise Blocked(*blockers.explain_consumer(user))
    keys = [key for key, operand in operation.operands() if operand is node]
    if not keys:
        raise Blocked(*blockers.explain_consumer(user))
    if operation.name in INVARIANCES:
        # A list, not a generator: each place may raise.
        ignored = [INVARIANCES[operation.name](operation, key, axes) for key in keys]
        if all(ignored):
            return None
    rule = RULES.get(operation.name)
    if rule is None:
        raise Blocked(*blockers.explain_consumer(user))
    problem: Blocked | None = None
    for reading in rule(operation):
        if all(key in reading.metadata for key in keys):
            return None
        if keys[0] not in reading.carriers:
            continue
        try:
            result = reading.carriers[keys[0]].forward(axes)
            if resolve(operation, result).needs.get(node) == axes:
                return (user, result)
        except Blocked as blocked:
            problem = problem or blocked
    raise problem or Blocked(*blockers.explain_consumer(user))


def resolve(operation: Operation, axes: Axes) -> Resolved:
    """Read an operation as linear so that its result is centered along ``axes``.

    Raises:
        Blocked: if there is no such reading.
    """
    problem: Blocked | None = None
    for reading in RULES[operation.name](operation):
        try:
            return _resolve_reading(operation, reading, axes)
        except Blocked as blocked:
            problem = problem or blocked
    raise problem or Blocked(Reason.UNKNOWN_OPERATION, f"'{operation.name}' of numbers")


def _resolve_reading(operation: Operation, reading: Linear, axes: Axes) -> Resolved:
    for key, map_ in reading.constants.items():
        constant = _argument(operation, key)
        if not isinstance(constant, fx.Node):
            continue
        varying = map_.backward(axes)
        if varying is not None and not is_constant_along(constant, varying):
            raise Blocked(Reason.VARYING_SCALE, f"'{operation.name}' by a tensor that varies along the normalised axes")
    needs: dict[fx.Node, Axes] = {}
    zeros: list[Key] = []
    for key, map_ in reading.carriers.items():
        operand = _argument(operation, key)
        if operand is None:
            continue
        operand_axes = map_.backward(axes)
        if operand_axes is None:
            zeros.append(key)
        elif needs.setdefault(operand, operand_axes) != operand_axes:
            raise Blocked(Reason.DIFFERENT_AXES, "one tensor stands in two places with different axes")
    for key, operand in operation.operands():
        # A carrier that is also read raw in another place (x * x, linear(w, w)) is not linear in it.
        if operand in needs and key not in reading.carriers and key not in reading.metadata:
            raise Blocked(Reason.NON_COMMUTING, f"'{operation.name}' reads one tensor twice, which is not linear")
        if operand in needs and key in zeros:
            raise Blocked(Reason.NON_COMMUTING, f"'{operation.name}' reads one tensor in two ways")
    return Resolved(needs, tuple(zeros))


def _argument(operation: Operation, key: Key) -> Any:
    name, index = key
    return operation[name] if index is None else operation[name][index]


def first_blocker(start: VariableKey, variables: Mapping[VariableKey, Variable]) -> Blocker | None:
    """Return the nearest blocker that keeps ``start`` from being centered for free, breadth first."""
    queue, seen = deque([start]), {start}
    while queue:
        variable = variables[queue.popleft()]
        if variable.is_parameter or variable.is_zero_mean or variable.is_recomputed:
            continue
        if variable.blocker is not None:
            return variable.blocker
        for key in (*variable.needs.items(), *variable.successors):
            if key not in seen:
                seen.add(key)
                queue.append(key)
    return None


def describe_blocker(blocker: Blocker) -> str:
    """Return a blocker in words: what, at which operation, where it stands."""
    if blocker.node is None or blocker.node.op == "output":
        return blocker.sentence
    return f"{blocker.sentence}: {provenance.describe(blocker.node)}"
