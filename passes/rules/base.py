"""What a rule is, and the table of them.

A rule says of one operation how the centering operator ``C`` passes through it. Nearly every rule of the theory is
one sentence: *the operation is linear in these operands (the carriers), it treats every element of A alike, and A
moves between carrier and result like this*. So a rule is a function from an operation to :class:`Linear`, which names
the carriers, each with an :class:`AxisMap` that takes ``A`` from the carrier to the result and back. "Sources" need no
rule of their own: ``linear`` is linear in its weight, and a weight is centered at no cost.

Three kinds of facts complete the table: operations that do not notice a shift along ``A`` (``invariant``), those whose
result has zero mean already (``zero_mean``), and words for the operations that block (:mod:`.blockers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes, PartlyConstant, Uncuttable
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.graph.sizes import Size


@dataclass(frozen=True)
class AxisMap:
    """How ``A`` moves through one operand of an operation.

    ``forward`` takes ``A`` on the operand to ``A`` on the result: a shift of the operand that is constant along the
    one is a shift of the result that is constant along the other; None where the result does not see it.
    ``backward`` goes the other way; None where the operand is constant along ``A``: ``C`` takes it to zero. Both raise
    :class:`Blocked`.
    """

    forward: Callable[[Axes], Axes | None]
    backward: Callable[[Axes], Axes | None]


@dataclass(frozen=True)
class Linear:
    """One way to read an operation as linear: ``op(C'a, C''b, ...) = C op(a, b, ...)`` over the carriers ``a, b, ...``.

    Attributes:
        carriers: the operands it is jointly linear in; they must all be centered.
        constants: operands it multiplies or selects with; they must be constant along ``A`` (a mask, a gate).
        metadata: operands of which only shape, dtype or device is read.
        selective: whether it centers just the part of the operand that the result is cut from, the rows of a joint
            projection. Only parameters can be centered in part, so this reading holds where the way up ends in them.

    Any other operand (the activations of a linear layer, token ids) is left as it is.
    """

    carriers: Mapping[Key, AxisMap]
    constants: Mapping[Key, AxisMap] = field(default_factory=dict)
    metadata: frozenset[Key] = frozenset()
    selective: bool = False


Rule = Callable[[Operation], Sequence[Linear]]
Invariance = Callable[[Operation, Key, Axes], bool]
ZeroMean = Callable[[Operation, Axes], bool]

RULES: dict[str, Rule] = {}
INVARIANCES: dict[str, Invariance] = {}
ZERO_MEANS: dict[str, ZeroMean] = {}


def linear_rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of the operations named. It returns the ways to read it, tried in order."""

    def register(rule: Rule) -> Rule:
        for name in names:
            RULES[name] = rule
        return rule

    return register


def invariant(*names: str) -> Callable[[Invariance], Invariance]:
    """Register a check whether the operation ignores a shift along ``A`` of an operand.

    The check returns True if it does, False if its rule is to be asked, and raises Blocked if it does not.
    """

    def register(check: Invariance) -> Invariance:
        for name in names:
            INVARIANCES[name] = check
        return check

    return register


def zero_mean(*names: str) -> Callable[[ZeroMean], ZeroMean]:
    """Register a function that says whether an operation's result has zero mean over given axes as it is."""

    def register(fact: ZeroMean) -> ZeroMean:
        for name in names:
            ZERO_MEANS[name] = fact
        return fact

    return register


# --- axis maps ---


def _same(axes: Axes) -> Axes:
    return axes


SAME = AxisMap(_same, _same)


def aligned(operand: Sequence[Size], result: Sequence[Size]) -> AxisMap:
    """Broadcasting: dimensions line up from the right; an operand of size 1 along ``A`` is constant along it."""

    def forward(axes: Axes) -> Axes:
        spread = axes
        for index, size in enumerate(operand):
            if size == 1:
                spread = spread.with_free(index, result[len(result) - len(operand) + index])
        for index in range(len(result) - len(operand)):
            spread = spread.insert_free(index, result[index])
        return spread

    def backward(axes: Axes) -> Axes | None:
        try:
            return axes.broadcast_operand(operand)
        except PartlyConstant:
            raise Blocked(
                Reason.DIFFERENT_AXES, f"an operand of shape {tuple(operand)} broadcasts along a part of {axes} only"
            ) from None

    return AxisMap(forward, backward)


def reshaped(operand: Sequence[Size], result: Sequence[Size]) -> AxisMap:
    """A view: the same elements in the same order under other dimensions."""

    def move(axes: Axes, shape: Sequence[Size]) -> Axes:
        moved = axes.reshape(shape)
        if moved is None:
            raise Blocked(Reason.DIFFERENT_AXES, f"a view to {tuple(shape)} cuts across the normalised axes {axes}")
        return moved

    return AxisMap(lambda axes: move(axes, result), lambda axes: move(axes, operand))


def permuted(order: Sequence[int]) -> AxisMap:
    """``result = operand.permute(order)``."""
    return AxisMap(lambda axes: axes.permute(order), lambda axes: axes.inverse_permute(order))


def require_free(axes: Axes, dimension: int, what: str) -> None:
    """Raise Blocked if ``A`` touches the dimension."""
    if not axes.is_free(dimension):
        raise Blocked(Reason.DIFFERENT_AXES, f"{what} along the normalised axis")


def require_uncontracted(axes: Axes, dimension: int, what: str) -> None:
    """Raise Blocked if the operation sums over a dimension that ``A`` touches: it would see that the mean is gone."""
    if not axes.is_free(dimension):
        raise Blocked(Reason.VISIBLE, f"the stream is also read by '{what}', which would see that its mean is gone")


def along(dimension: int, operand: Size, result: Size, what: str) -> AxisMap:
    """The operation works along one dimension, which must be free, and may change its size."""

    def move(axes: Axes, size: Size) -> Axes:
        require_free(axes, dimension, what)
        return axes.with_free(dimension, size)

    return AxisMap(lambda axes: move(axes, result), lambda axes: move(axes, operand))


def cut(dimension: int, size: int, kept: range, what: str) -> AxisMap:
    """The operation keeps some indices of one dimension; only they are centered on the operand."""

    def uncuttable(axes: Axes) -> Blocked:
        return Blocked(Reason.DIFFERENT_AXES, f"{what} cuts across the normalised axes {axes}")

    def forward(axes: Axes) -> Axes | None:
        try:
            return axes.cut(dimension, kept)
        except Uncuttable:
            raise uncuttable(axes) from None

    def backward(axes: Axes) -> Axes:
        try:
            return axes.placed(dimension, size, kept)
        except Uncuttable:
            raise uncuttable(axes) from None

    return AxisMap(forward, backward)


def chained(first: AxisMap, second: AxisMap) -> AxisMap:
    """Two maps one after the other: ``first`` from the operand to something between, ``second`` to the result."""

    def forward(axes: Axes) -> Axes | None:
        between = first.forward(axes)
        return None if between is None else second.forward(between)

    def backward(axes: Axes) -> Axes | None:
        between = second.backward(axes)
        return None if between is None else first.backward(between)

    return AxisMap(forward, backward)


def removed(dimension: int, size: Size, what: str) -> AxisMap:
    """The operation takes one (free) dimension of this size away."""

    def forward(axes: Axes) -> Axes:
        require_free(axes, dimension, what)
        return axes.remove(dimension)

    return AxisMap(forward, lambda axes: axes.insert_free(dimension, size))


def inserted(dimension: int, size: Size, what: str) -> AxisMap:
    """The operation puts in one free dimension of this size."""

    def backward(axes: Axes) -> Axes:
        require_free(axes, dimension, what)
        return axes.remove(dimension)

    return AxisMap(lambda axes: axes.insert_free(dimension, size), backward)
