"""Differences ``x - mean_A(x)`` as authors write them, and what else becomes of the mean.

Means are read backwards from the difference (:mod:`.totals`), their uses forwards from the reduction. A mean may serve
several differences, and ``E[x²] - E[x]²``, which does not depend on it; whatever else reads it sees the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from torch import fx

from lncompile.passes.graph.canonical import Key, Operation, canonicalise, tensor_of
from lncompile.passes.graph.operands import WRITTEN, shape
from lncompile.passes.graph.provenance import is_made_by
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.graph.uniform import Number, cancels, number, times
from lncompile.passes.norms.moments import (
    Moment,
    Subject,
    behind_views,
    passes_gradients,
    same_shape,
    settled,
    squared,
    viewed,
)
from lncompile.passes.norms.totals import Total, mean_in_any_shape, summed, total_of

#: The module that centers what it looks up, of a table that is read elsewhere as it is.
CENTERED_TABLE = "lncompile.nn.CenteredEmbedding"


@dataclass(frozen=True)
class Difference:
    """``x - mean_A(x)``, or ``mean_A(x) - x``.

    Attributes:
        operation: the addition or subtraction that it comes out of.
        moment: the mean: of what, over which axes.
        total: the sum that the mean comes from.
        source: where ``x`` stands in the operation.
        mean: where the mean does.
        is_negated: whether it is the mean minus ``x``.
    """

    operation: Operation
    moment: Moment
    total: Total
    source: Key
    mean: Key
    is_negated: bool

    @property
    def node(self) -> fx.Node:
        """The node that holds it."""
        return self.operation.node

    @property
    def subject(self) -> Subject:
        """``x`` and A."""
        return self.moment.subject


# Signs of the first and the second operand, and which of the two alpha scales.
_SIGNS = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}


def difference_of(operation: Operation) -> Difference | None:
    """Read an operation as ``x - mean_A(x)``, with the mean in the shape of ``keepdim=True``."""
    if operation.name not in _SIGNS or (operation.in_place and operation.node.meta.get(WRITTEN)):
        return None
    alpha = number(operation["alpha"])
    left, right = operation["input"], operation["other"]
    if alpha is None or not (isinstance(left, fx.Node) and isinstance(right, fx.Node)) or left is right:
        return None
    first, second = _SIGNS[operation.name]
    # alpha scales what is added or taken away: the second operand, and of rsub the first.
    scales: dict[str, Number] = {"input": Fraction(first), "other": Fraction(second)}
    scaled = "input" if operation.name == "rsub" else "other"
    scales[scaled] = times(scales[scaled], alpha)
    for source, mean in (("input", "other"), ("other", "input")):
        if scales[source] not in (1, -1) or (operation.in_place and source != "input"):
            continue
        x, is_negated = operation[source], scales[source] == -1
        held = expanded(operation[mean])
        total = total_of(held)
        total = None if total is None else total.of(x)
        if total is None or not total.broadcasts(held) or tensor_of(operation.node) is None:
            continue
        if not same_shape(shape(operation.node), shape(x)) or not passes_gradients(held, x):
            continue
        # x + c · T = x - mean(x) where c · T = -mean(x)
        weight = times(total.factor, times(scales[mean], Fraction(1 if is_negated else -1)))
        if cancels(weight, total.moment.axes.count):
            return Difference(operation, total.moment, total, (source, None), (mean, None), is_negated)
    return None


def expanded(node: fx.Node) -> fx.Node:
    """What a node repeats along dimensions of size 1, as broadcasting would; itself for anything else."""
    operation = settled(node)
    if operation is None or not has(operation, Trait.EXPANDS):
        return node
    source = operation["input"]
    return source if isinstance(source, fx.Node) else node


# --- E[x²] - E[x]² ---


def difference_of_moments(operation: Operation) -> Moment | None:
    """Read an operation as ``E[x²] - E[x]²``, which is ``var(x)``."""
    if operation.name != "sub" or operation.in_place or operation["alpha"] != 1:
        return None
    first, second = operation["input"], operation["other"]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return None
    mean_square = squared(behind_views(second))
    square_mean = None if mean_square is None else mean_in_any_shape(first)
    if square_mean is None or mean_square is None or not same_shape(shape(first), shape(second)):
        return None
    factors = squared(square_mean.source)
    if factors is None or factors[0] is not factors[1]:
        return None
    moment = Moment(factors[0], square_mean.axes, square_mean.dimensions)
    if not all(passes_gradients(node, moment.source) for node in (first, *mean_square, second)):
        return None
    means = [mean_in_any_shape(factor) for factor in mean_square]
    return moment if all(mean is not None and mean.subject == moment.subject for mean in means) else None


# --- reading forwards ---


@dataclass(frozen=True)
class MeanUses:
    """What a mean serves.

    Attributes:
        differences: the differences from it.
        other: a node that reads the mean for anything else, or the reduction itself where the values of ``x`` may have
            changed between the mean and the difference; None where there is nothing.
    """

    differences: list[Difference]
    other: fx.Node | None


def uses_of_mean(node: fx.Node) -> MeanUses | None:
    """Return what the mean that comes out of a reduction serves; None for what is not a reduction.

    Args:
        node: a mean, a sum in any spelling, or the pair of a variance and a mean.

    A square of the mean in ``E[x²] - E[x]²`` is not another use: the variance does not depend on the mean either.
    """
    operation = settled(node)
    if operation is None:
        return None
    starts, other = [node], None
    if operation.name in ("var_mean", "std_mean"):
        users = [user for user in node.users if len(user.args) != 2 or user.args[1] != 0]
        starts = [user for user in users if len(user.args) == 2 and user.args[1] == 1]
        other = next((user for user in users if user not in starts), None)
        total = total_of(starts[0]) if starts else None
        if total is None:
            return MeanUses([], other)
    else:
        total = None if operation.name == "getitem" else summed(operation)
        if total is None:
            return None
    differences: list[Difference] = []
    for start in starts:
        other = other or _collect(start, total, differences)
    # Between the mean and the difference the values of x may have changed; and the mean is that of one tensor.
    sources = {total.moment.source, *(difference.moment.source for difference in differences)}
    if any(source.meta.get(WRITTEN) for source in sources) or len({d.subject for d in differences}) > 1:
        other = other or node
    return MeanUses(differences, other)


def _collect(node: fx.Node, total: Total, differences: list[Difference]) -> fx.Node | None:
    """Add the differences that a total serves; the first node that reads it for anything else, or None."""
    for user in node.users:
        operation = canonicalise(user)
        if operation is None:
            return user
        difference = difference_of(operation)
        if difference is not None and difference.total.node is total.node:
            if operation[difference.mean[0]] is not node:
                return user
            differences.append(difference)
        elif expanded(user) is node or _is_step(user, node, total.subject):
            other = _collect(user, total, differences)
            if other is not None:
                return other
        elif squared(user) != (node, node) or not _is_subtracted(user, total.subject):
            return user
    return None


def _is_step(user: fx.Node, node: fx.Node, subject: Subject) -> bool:
    """Whether a node only carries a total on: a view of it, a cast, or a product with a number."""
    operation = canonicalise(user)
    total = None if operation is None else total_of(user)
    if operation is None or total is None or total.subject != subject:
        return False
    operands = [operand for _, operand in operation.operands() if operand is node]
    return len(operands) == 1


def _is_operand(node: fx.Node, user: fx.Node, name: str, subject: Subject) -> bool:
    """Whether ``user`` is ``E[x²] - E[x]²`` of the subject, and ``node`` its operand of this name and no other."""
    operation = canonicalise(user)
    moment = None if operation is None else difference_of_moments(operation)
    if operation is None or moment is None or moment.subject != subject:
        return False
    return [key for key, operand in operation.operands() if operand is node] == [(name, None)]


def _is_subtracted(square: fx.Node, subject: Subject) -> bool:
    """Whether ``mean_A(x)²`` serves nothing but ``E[x²] - E[x]²``."""
    return all(
        _is_operand(square, user, "other", subject) or (viewed(user) is square and _is_subtracted(user, subject))
        for user in square.users
    )


def serves_only_the_variance(node: fx.Node, subject: Subject) -> bool:
    """Whether ``x²``, ``node``, serves nothing but ``E[x²] - E[x]²`` of the subject ``(x, A)``."""
    source, axes = subject
    return squared(node) == (source, source) and _carries_only(node, (node, axes), subject)


def _carries_only(node: fx.Node, square: Subject, subject: Subject) -> bool:
    for user in node.users:
        if _is_operand(node, user, "input", subject):
            continue
        total = total_of(user)
        if total is None or total.subject != square or not _carries_only(user, square, subject):
            return False
    return True


def differences_in(graph: fx.Graph) -> Iterator[Difference]:
    """Yield every difference from a mean in a graph, in order.

    Not those of a :data:`CENTERED_TABLE`: that mean is taken out for norms that are folded already.
    """
    for node in graph.nodes:
        operation = None if is_made_by(node, CENTERED_TABLE) else canonicalise(node)
        difference = None if operation is None else difference_of(operation)
        if difference is not None:
            yield difference
