"""The streams of a graph: every tensor that could be computed centered, what that would need, and who would notice.

Of each tensor ``v`` and set of axes ``A`` three things can be true:

* ``v`` is *computed centered*: ``Cv`` in its place. Its operands must be there centered.
* ``v`` is *shifted*: it may be off by anything constant along ``A``. So is all that is computed linearly from it, and
  nothing that reads it may notice. What is computed centered is shifted; what is joined from a centered tensor and one
  that is not is shifted without being centered.
* a centered version of ``v`` is *available*: ``v`` itself, or a copy centered explicitly.

Starting from the inputs of the LayerNorm sites, the rules are followed up to the operands that would have to be
centered, and down to the consumers that would be shifted. The result is a set of variables ``(v, A)`` with implications
between them, which placement turns into a minimum cut. Nothing is decided and nothing changed here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from lncompile.passes.decisions import Blocked, Blocker, Reason
from lncompile.passes.graph import provenance
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN
from lncompile.passes.graph.sharding import centering_obstacle
from lncompile.passes.graph.traits import VIEWS, has
from lncompile.passes.graph.uniform import uniform_value
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import A_MARK, NOTHING, Bytes, CostModel
from lncompile.passes.placement.variables import Variable, VariableKey
from lncompile.passes.rules import INVARIANCES, RULES, ZERO_MEANS, blockers
from lncompile.passes.rules.composed_sources import find_composed_source
from lncompile.passes.rules.precision import is_widened_later, tensor_dtype, widened_cast, widened_parameter
from lncompile.passes.rules.readings import Resolved, follow_readings, resolve_reading
from lncompile.passes.rules.writes import follow_write, read_write


def build_streams(
    sites: Sequence[NormSite], facts: GraphFacts, costs: CostModel | None = None, beyond_readers: bool = False
) -> dict[VariableKey, Variable]:
    """Explore everything reachable from the sites' inputs.

    Args:
        sites: the LayerNorm sites of the graph.
        facts: the facts of the graph.
        costs: what centering costs; by default that of inference.
        beyond_readers: whether to go on behind a tensor that somebody would notice the shift of. Placement has no use
            for what lies there; who asks what would be without that reader does.

    Returns:
        The variables by key. Every key in ``needs`` of a variable without a source blocker is there, and every key in
        ``successors`` of one that can be shifted.
    """
    differences = {
        difference.node: site.axes
        for site in sites
        if site.handwritten is not None
        for difference in site.handwritten.differences
    }
    explorer = _Explorer(facts, costs or CostModel(), differences, beyond_readers)
    explorer.explore((site.input, site.axes) for site in sites if not site.folded_before)
    return explorer.variables


class _Explorer:
    def __init__(
        self, facts: GraphFacts, costs: CostModel, differences: Mapping[fx.Node, Axes], beyond_readers: bool
    ) -> None:
        self.facts, self.costs, self.differences, self.beyond_readers = facts, costs, differences, beyond_readers
        self.variables: dict[VariableKey, Variable] = {}
        self._reach_parameters: dict[VariableKey, bool] = {}

    def explore(self, starts: Iterable[VariableKey]) -> None:
        queue: deque[tuple[VariableKey, bool]] = deque((key, False) for key in starts)
        followed: set[VariableKey] = set()
        while queue:
            key, is_shifted = queue.popleft()
            variable = self.variables.get(key)
            if variable is None:
                variable = self.variables[key] = self._explore(*key)
                if variable.source_blocker is None or variable.is_recomputed:
                    queue.extend((need, False) for need in variable.needs.items())
            # Who reads it matters only if it can be shifted: because it is computed centered, or out of a shifted one.
            if key not in followed and (is_shifted or variable.source_blocker is None):
                followed.add(key)
                if variable.reader_blocker is None or self.beyond_readers:
                    queue.extend((successor, True) for successor in variable.successors)

    def _explore(self, node: fx.Node, axes: Axes) -> Variable:
        facts = self.facts
        variable = Variable(node, axes)
        tensor = tensor_of(node)
        obstacle = centering_obstacle(tensor, axes)
        if node in facts.parametric and obstacle is not None:
            sentence = f"parameter '{provenance.parameter_name(node)}' cannot be centered in its shards: {obstacle}"
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, sentence, node)
            variable.reader_blocker = variable.source_blocker
            return variable
        if node in facts.parametric and node.op == "placeholder":
            # Parameters are never streams themselves: their raw value stays.
            variable.parameter, variable.centering_cost = node, self._weight_cost(node)
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, "a parameter", node)
            return variable
        problem = (
            (Reason.UNSUPPORTED_WEIGHT, facts.unsupported[node])
            if node in facts.unsupported
            else (Reason.MUTATION, facts.written[node])
            if node in facts.written
            else None
        )
        if problem is not None:
            variable.source_blocker = variable.reader_blocker = Blocker(*problem, node)
            return variable
        variable.operation = canonicalise(node)
        if self._is_zero_mean(variable):
            if node not in facts.assigned:
                variable.is_zero_mean, variable.centering_cost = True, NOTHING
                variable.source_blocker = Blocker(Reason.NORM_OUTPUT, "its mean is zero already", node)
                self._follow_consumers(variable)
                return variable
        elif tensor is not None and not tensor.is_floating_point():
            sentence = f"a tensor of dtype {tensor.dtype} on the path"
            variable.source_blocker = variable.reader_blocker = Blocker(Reason.UNKNOWN_OPERATION, sentence, node)
            return variable
        else:
            self._explore_producer(variable)
        self._explore_writes(variable)
        # The needs are those of its view only if the view let the centering through.
        can_be_redone = variable.source_blocker is None and bool(variable.needs) and not variable.zeros
        self._follow_consumers(variable)
        # A copy of a tensor that is written to would be of one moment.
        if tensor is not None and not node.meta.get(WRITTEN):
            variable.parameter = variable.parameter or (node if node in facts.parametric else None)
            variable.is_recomputed = can_be_redone and not variable.is_parameter and is_view_of_parameter(node, facts)
            variable.centering_cost = self._centering_cost(variable, tensor)
        return variable

    def _is_zero_mean(self, variable: Variable) -> bool:
        operation = variable.operation
        return (
            operation is not None
            and operation.name in ZERO_MEANS
            and ZERO_MEANS[operation.name](operation, variable.axes)
        )

    def _weight_cost(self, parameter: fx.Node) -> Bytes:
        tensor = tensor_of(parameter)
        return NOTHING if tensor is None else self.costs.weight(tensor, parameter in self.facts.trained)

    def _centering_cost(self, variable: Variable, tensor: Tensor) -> Bytes | None:
        if variable.parameter is not None:
            return A_MARK + self._weight_cost(variable.parameter)
        if variable.is_recomputed:
            return A_MARK
        if centering_obstacle(tensor, variable.axes) is not None:
            return None  # communication at every call
        if variable.axes.partial or not variable.axes.can_be_unfolded:
            return None  # parts of an activation: no model needs it, and it would have to be assembled
        if is_widened_later(variable.node):
            return None  # it would be rounded once more; what it is widened to may be centered instead
        return self.costs.activation(tensor, raw_is_read=variable.reader_blocker is not None)

    # --- upwards: what would have to be centered ---

    def _explore_producer(self, variable: Variable) -> None:
        node, operation = variable.node, variable.operation
        if self.differences.get(node, variable.axes) != variable.axes:
            # Where that norm folds, its centered input takes the place of the difference.
            sentence = "the difference from the mean in a norm by hand over other axes"
            variable.source_blocker = Blocker(Reason.DIFFERENT_AXES, sentence, node)
            return
        if operation is None or operation.name not in RULES:
            variable.source_blocker = Blocker(*blockers.explain_producer(node), node)
            return
        narrow = widened_cast(operation, self.facts)
        if narrow is not None:
            # Centered in the dtype it is kept in, it would be rounded once more than it is. Center after the cast.
            variable.parameter = narrow if narrow in self.facts.parametric else None
            variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, _would_be_rounded(narrow), node)
            return
        try:
            resolved = self.resolve(operation, variable.axes)
        except Blocked as blocked:
            variable.composed_source = find_composed_source(operation, variable.axes, self.facts)
            if variable.composed_source is None:
                variable.source_blocker = Blocker(blocked.reason, blocked.sentence, node)
            else:
                for parameter in variable.composed_source.parameters():
                    variable.making_cost += self._weight_cost(parameter)
            return
        for operand in resolved.needs:
            if widened_parameter(operation, operand, self.facts) is not None:
                variable.source_blocker = Blocker(Reason.UNSUPPORTED_WEIGHT, _would_be_rounded(operand), node)
                return
        if self.facts.constants_stay and not _are_zero(operation, resolved.zeros):
            variable.source_blocker = Blocker(Reason.VISIBLE, _CONSTANT_STAYS, node)
            return
        variable.operands, variable.needs, variable.zeros = resolved.needs, dict(resolved.needs), resolved.zeros

    def _explore_writes(self, variable: Variable) -> None:
        """Add what is assigned to parts of the tensor later: it holds centered values at all times."""
        writes = []
        for writer in self.facts.assigned.get(variable.node, ()):
            try:
                write = read_write(writer, variable.node, variable.axes)
            except Blocked as blocked:
                blocker = Blocker(blocked.reason, blocked.sentence, writer)
                variable.source_blocker = variable.source_blocker or blocker
                continue
            if self.facts.constants_stay and not _are_zero(write.operation, write.zeros):
                blocker = Blocker(Reason.VISIBLE, _CONSTANT_STAYS, writer)
                variable.source_blocker = variable.source_blocker or blocker
            for value, axes in write.needs.items():
                if variable.needs.setdefault(value, axes) != axes:
                    sentence = "one tensor stands in two places with different axes"
                    blocker = Blocker(Reason.DIFFERENT_AXES, sentence, writer)
                    variable.source_blocker = variable.source_blocker or blocker
            writes.append(write)
        variable.writes = tuple(writes)

    def resolve(self, operation: Operation, axes: Axes) -> Resolved:
        """Read an operation as linear so that its result is centered along ``axes``.

        Raises:
            Blocked: if there is no such reading.
        """
        problem: Blocked | None = None
        last: Resolved | None = None
        for reading in RULES[operation.name](operation):
            try:
                resolved = resolve_reading(operation, reading, axes)
            except Blocked as blocked:
                problem = problem or blocked
                continue
            if not reading.selective:
                return resolved
            if all(node in self.facts.parametric for node in resolved.needs):
                # It is not seen how much of a parameter's copy is centered: better all of it, one copy for every cut.
                last = resolved
            elif all(self._ends_in_parameters(need) for need in resolved.needs.items()):
                return resolved
        if last is not None:
            return last
        raise problem or Blocked(Reason.UNKNOWN_OPERATION, f"'{operation.name}' of numbers")

    def _ends_in_parameters(self, start: VariableKey) -> bool:
        """Whether a tensor can be centered (in part) by centering parameters alone, whatever may notice."""
        known = self._reach_parameters.get(start)
        if known is not None:
            return known
        self._reach_parameters[start] = False  # until shown; also what a cut asks that comes back here
        queue, seen = deque([start]), {start}
        while queue:
            node, axes = queue.popleft()
            if node in self.facts.parametric:
                continue
            operation = canonicalise(node)
            if node in self.facts.written or node in self.facts.assigned or operation is None:
                return False
            if operation.name not in RULES:
                return False
            try:
                needs = self.resolve(operation, axes).needs
            except Blocked:
                return False
            if any(widened_parameter(operation, need, self.facts) is not None for need in needs):
                return False
            for need in needs.items():
                if need not in seen:
                    seen.add(need)
                    queue.append(need)
        self._reach_parameters[start] = True
        return True

    # --- downwards: who would be shifted, and who would notice ---

    def _follow_consumers(self, variable: Variable) -> None:
        for user in variable.node.users:
            try:
                successor = self.follow(variable.node, variable.axes, user)
            except Blocked as blocked:
                # The output has no place in the model's source; what is returned has.
                place = variable.node if user.op == "output" else user
                blocker = Blocker(blocked.reason, blocked.sentence, place)
                variable.reader_blocker = variable.reader_blocker or blocker
                variable.reader_blockers += (blocker,)
                continue
            if successor is not None:
                variable.successors.append(successor)

    def follow(self, node: fx.Node, axes: Axes, user: fx.Node) -> VariableKey | None:
        """Return what ``user`` becomes if ``node`` is shifted along ``axes``; None if it does not notice.

        Raises:
            Blocked: if the user would notice.
        """
        if user.op == "output":
            raise Blocked(Reason.GRAPH_OUTPUT, "the stream is also returned by the graph")
        if user in self.facts.writers:
            return follow_write(user, self.facts.writers[user], node, axes)
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
        readings = (
            reading
            for reading in rule(operation)
            if keys[0] in reading.carriers or all(key in reading.metadata for key in keys)
        )
        for result in follow_readings(operation, readings, keys, axes):
            return None if result is None else (user, result)
        raise Blocked(*blockers.explain_consumer(user))


_CONSTANT_STAYS = "something that is the same for all features is added, which only a rewrite of the graph takes out"


def _are_zero(operation: Operation, keys: Sequence[Key]) -> bool:
    """Whether the operands at some places are zero as they are."""
    values = [operation[name] if index is None else operation[name][index] for name, index in keys]
    return all(
        uniform_value(value) == 0 if isinstance(value, fx.Node) else isinstance(value, int | float) and value == 0
        for value in values
    )


def _would_be_rounded(narrow: fx.Node) -> str:
    return (
        f"a parameter kept in {tensor_dtype(narrow)} is used in a wider one: centered before that it would be rounded"
    )


def is_view_of_parameter(node: fx.Node, facts: GraphFacts) -> bool:
    """Whether a tensor is a parameter in another shape (``token.expand(batch, -1, -1)``), however it is used.

    It is not a parameter expression itself, because it is larger than the parameter or depends on the call.
    """
    source: Any = node
    while source not in facts.parametric:
        operation = canonicalise(source) if isinstance(source, fx.Node) else None
        if operation is None or not has(operation, VIEWS) or operation.in_place or source.meta.get(WRITTEN):
            return False
        source = operation["input"]
    return True
