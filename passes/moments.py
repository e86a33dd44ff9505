"""Means and variances as authors write them: ``x.mean``, ``x.sum / d``, ``var_mean``, ``E[x²] - E[x]²``, ...

What a node computes is read backwards from it, what becomes of it forwards. A mean is of interest here only as
something to subtract, so it counts as one where it has the shape that ``keepdim=True`` gives, which broadcasts against
``x``; views on the way there (``unsqueeze``, ``[..., None]``) are looked through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from lncompile.passes.axes import Axes, Size, same_size, size_of
from lncompile.passes.canonical import Operation, canonicalise, tensor_of, value_of
from lncompile.passes.decisions import Blocked
from lncompile.passes.operands import WRITTEN, dimensions_of, shape

Subject = tuple[fx.Node, Axes]


@dataclass(frozen=True)
class Moment:
    """A mean or a variance of ``source`` over ``axes``, which the author listed as ``dimensions``."""

    source: fx.Node
    axes: Axes
    dimensions: tuple[int, ...]

    @property
    def subject(self) -> Subject:
        """What it is a moment of, however it is spelled."""
        return self.source, self.axes

    @property
    def kept_shape(self) -> tuple[Size, ...]:
        """Its shape under ``keepdim=True``."""
        return tuple(1 if i in self.dimensions else size for i, size in enumerate(shape(self.source)))

    def is_kept(self, node: fx.Node) -> bool:
        """Whether a node that holds it has the shape of ``keepdim=True``, so that it broadcasts against the source."""
        return _same_shape(shape(node), self.kept_shape)


def _same_shape(left: tuple[Size, ...], right: tuple[Size, ...]) -> bool:
    return len(left) == len(right) and all(same_size(a, b) for a, b in zip(left, right, strict=True))


# --- reading backwards ---

_VIEWS = frozenset("view reshape unsqueeze squeeze flatten unflatten cast to".split())


def behind_views(node: fx.Node) -> fx.Node:
    """Return what a node is a view of: the same elements in the same order and dtype, under other dimensions."""
    while (source := _viewed(node)) is not None:
        node = source
    return node


def _viewed(node: fx.Node) -> fx.Node | None:
    operation = canonicalise(node)
    if operation is None or operation.in_place:
        return None
    source = operation.arguments.get("input")
    if not isinstance(source, fx.Node):
        return None
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:
        return None
    if operation.name in _VIEWS:
        return source
    if operation.name != "getitem":
        return None
    index = operation["index"] if isinstance(operation["index"], tuple | list) else (operation["index"],)
    whole = all(item is None or item is Ellipsis or item == slice(None) for item in index if not _is_node(item))
    return source if whole and not any(_is_node(item) for item in index) else None


def _is_node(item: object) -> bool:
    return isinstance(item, fx.Node)


def reduction(operation: Operation) -> Moment | None:
    """What a reduction over listed dimensions reduces."""
    source = operation["input"]
    if operation["dim"] is None or not isinstance(source, fx.Node):
        return None
    try:
        sizes = shape(source)
        dimensions = dimensions_of(operation["dim"], len(sizes))
    except Blocked:
        return None
    # No dimensions listed means all of them, to torch.
    return Moment(source, Axes.of(sizes, dimensions), dimensions) if dimensions else None


def _settled(node: fx.Node) -> Operation | None:
    """The operation of a node whose value stays what the operation made it."""
    return None if node.meta.get(WRITTEN) else canonicalise(node)


def _is_count(number: Any, count: Size) -> bool:
    """Whether a divisor is the number of elements that were summed."""
    value = value_of(number) if isinstance(number, fx.Node) else number
    if isinstance(value, float):
        return bool(value == count)
    return isinstance(value, int | torch.SymInt) and same_size(size_of(value), count)


def _summed(node: fx.Node) -> Moment | None:
    operation = _settled(behind_views(node))
    return reduction(operation) if operation is not None and operation.name == "sum" else None


def mean_in_any_shape(node: fx.Node) -> Moment | None:
    """Read a node as ``mean_A(x)``, in whatever shape."""
    operation = _settled(behind_views(node))
    if operation is None or operation.in_place:
        return None
    if operation.name == "mean":
        return reduction(operation)
    if operation.name == "getitem" and operation["index"] == 1:
        both = canonicalise(operation["input"])
        return reduction(both) if both is not None and both.name in ("var_mean", "std_mean") else None
    if operation.name in ("div", "mul") and isinstance(operation["input"], fx.Node):
        total = _summed(operation["input"])
        if total is None:
            return None
        if operation.name == "div":
            divides = operation["rounding_mode"] is None and _is_count(operation["other"], total.axes.count)
            return total if divides else None
        count = total.axes.count
        return total if isinstance(count, int) and operation["other"] == 1 / count else None
    return None


def mean_of(node: fx.Node) -> Moment | None:
    """Read a node as ``mean_A(x)`` that broadcasts against ``x``."""
    moment = mean_in_any_shape(node)
    return moment if moment is not None and moment.is_kept(node) else None


def difference_from_mean(operation: Operation) -> Moment | None:
    """Read an operation as ``x - mean_A(x)``."""
    if operation.name != "sub" or operation["alpha"] != 1 or not isinstance(operation["other"], fx.Node):
        return None
    if operation.in_place and operation.node.meta.get(WRITTEN):
        return None
    moment = mean_of(operation["other"])
    return moment if moment is not None and moment.source is operation["input"] else None


def squared(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Read a node as ``a · a`` (one node twice) or ``a · b``: its two factors."""
    operation = _settled(node)
    if operation is None or operation.in_place or not isinstance(operation.arguments.get("input"), fx.Node):
        return None
    factor = operation["input"]
    if operation.name == "square" or (operation.name == "pow" and operation["exponent"] == 2):
        return factor, factor
    if operation.name == "mul" and isinstance(operation["other"], fx.Node):
        return factor, operation["other"]
    return None


def is_biased(operation: Operation) -> bool:
    """Whether a variance or deviation divides by the number of elements, as LayerNorm does, and not by one less."""
    if operation["correction"] is not None:
        return bool(operation["correction"] == 0)
    return operation["unbiased"] is False


def spread_of(node: fx.Node, name: str) -> Moment | None:
    """Read a node as what torch's ``var`` or ``std`` (``name``) makes of ``x``, biased, in any shape."""
    operation = _settled(behind_views(node))
    if operation is not None and operation.name == "getitem" and operation["index"] == 0:
        operation = canonicalise(operation["input"])
        name = f"{name}_mean"
    if operation is None or operation.name != name or not is_biased(operation):
        return None
    return reduction(operation)


def difference_of_moments(operation: Operation) -> Moment | None:
    """Read an operation as ``E[x²] - E[x]²``, which is ``var(x)``."""
    if operation.name != "sub" or operation.in_place or operation["alpha"] != 1:
        return None
    first, second = operation["input"], operation["other"]
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return None
    square_mean, mean_square = mean_in_any_shape(first), squared(behind_views(second))
    if square_mean is None or mean_square is None or not _same_shape(shape(first), shape(second)):
        return None
    factors = squared(square_mean.source)
    means = [mean_in_any_shape(factor) for factor in mean_square]
    if factors is None or factors[0] is not factors[1]:
        return None
    moment = Moment(factors[0], square_mean.axes, square_mean.dimensions)
    return moment if all(mean is not None and mean.subject == moment.subject for mean in means) else None


def variance_of(node: fx.Node) -> Moment | None:
    """Read a node as the biased variance of ``x``, in any spelling and shape."""
    if (moment := spread_of(node, "var")) is not None:
        return moment
    inner = behind_views(node)
    operation = _settled(inner)
    if operation is not None and (moment := difference_of_moments(operation)) is not None:
        return moment
    factors = squared(inner)
    if factors is not None and factors[0] is factors[1]:
        return spread_of(factors[0], "std")
    mean = mean_in_any_shape(inner)
    factors = None if mean is None else squared(mean.source)
    if mean is None or factors is None:
        return None
    differences = [canonicalise(factor) for factor in factors]
    moments = [None if d is None else difference_from_mean(d) for d in differences]
    first = moments[0]
    if first is None or any(m is None or m.subject != first.subject for m in moments) or first.axes != mean.axes:
        return None
    return first


# --- reading forwards ---


def uses_of_mean(node: fx.Node) -> list[fx.Node] | None:
    """Return the differences ``x - mean_A(x)`` that a reduction of ``x`` serves, or None if it serves anything else.

    Args:
        node: a mean, a sum, or the pair of a variance and a mean.

    A square of the mean in ``E[x²] - E[x]²`` is no other use: the variance does not depend on the mean either.
    """
    operation = _settled(node)
    moment = None if operation is None else reduction(operation)
    if operation is None or moment is None or moment.source.meta.get(WRITTEN):
        return None  # between the mean and the difference the values of x may have changed
    differences: list[fx.Node] = []
    if operation.name not in ("var_mean", "std_mean"):
        return differences if _collect(node, moment.subject, differences) else None
    for user in node.users:
        if len(user.args) != 2 or user.args[1] not in (0, 1):
            return None
        if user.args[1] == 1 and not _collect(user, moment.subject, differences):
            return None
    return differences


def _collect(node: fx.Node, subject: Subject, differences: list[fx.Node]) -> bool:
    for user in node.users:
        operation = canonicalise(user)
        if operation is None:
            return False
        difference = difference_from_mean(operation)
        if difference is not None:
            if difference.subject != subject or operation["other"] is not node:
                return False
            differences.append(user)
        elif _is_step(user, node, subject):
            if not _collect(user, subject, differences):
                return False
        elif squared(user) != (node, node) or not _is_subtracted(user, subject):
            return False
    return True


def _is_step(user: fx.Node, node: fx.Node, subject: Subject) -> bool:
    """Whether a node only carries a mean on: a view of it, or the division of a sum."""
    moment = mean_in_any_shape(user) or _summed(user)
    operation = canonicalise(user)
    carries = operation is not None and operation.arguments.get("input") is node
    return carries and moment is not None and moment.subject == subject


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
        _is_operand(square, user, "other", subject) or (_viewed(user) is square and _is_subtracted(user, subject))
        for user in square.users
    )


def serves_only_the_variance(node: fx.Node, subject: Subject) -> bool:
    """Whether ``x²``, ``node``, serves nothing but ``E[x²] - E[x]²`` of the subject ``(x, A)``."""
    source, axes = subject
    return squared(node) == (source, source) and _carries_only(node, (node, axes), subject)


def _carries_only(node: fx.Node, square: Subject, subject: Subject) -> bool:
    return all(
        _is_operand(node, user, "input", subject)
        or (_is_step(user, node, square) and _carries_only(user, square, subject))
        for user in node.users
    )
