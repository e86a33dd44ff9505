"""Operations that mix along other axes with fixed coefficients: pooling, interpolation, padding, running sums.

Each is a matrix on the axes it runs over, the same for every element of A, so it commutes with ``C`` as long as those
axes are free: ``C(Mx) = M(Cx)``. Maximum pooling is none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.graph.operands import dimension_of, other_operands, result_shape, shape
from lncompile.passes.graph.sizes import same_size
from lncompile.passes.rules.base import AxisMap, Linear, aligned, linear_rule, require_free

_SPATIAL_AXES = {"average_pool_1d": 1, "average_pool_2d": 2, "average_pool_3d": 3}


def _over(operation: Operation, dimensions: Sequence[int]) -> AxisMap:
    """A mixes nothing: the operation runs over these dimensions, which must be free and may change their sizes."""
    operand, result = shape(operation["input"]), result_shape(operation)

    def move(axes: Axes, sizes: Sequence[object]) -> Axes:
        for dimension in dimensions:
            require_free(axes, dimension, operation.name)
            axes = axes.with_free(dimension, sizes[dimension])
        return axes

    return AxisMap(lambda axes: move(axes, result), lambda axes: move(axes, operand))


@linear_rule("average_pool_1d", "average_pool_2d", "average_pool_3d")
def average_pooling(operation: Operation) -> Sequence[Linear]:
    """``C pool(x) = pool(Cx)``: averages over windows of other axes, zero padding included."""
    rank = len(shape(operation["input"]))
    dimensions = range(rank - _SPATIAL_AXES[operation.name], rank)
    return [Linear({("input", None): _over(operation, dimensions)}, metadata=other_operands(operation, "input"))]


@linear_rule("interpolate")
def interpolation(operation: Operation) -> Sequence[Linear]:
    """``C interpolate(x) = interpolate(Cx)``: nearest, linear, cubic and area are linear in x over the spatial axes."""
    dimensions = range(2, len(shape(operation["input"])))
    return [Linear({("input", None): _over(operation, dimensions)}, metadata=other_operands(operation, "input"))]


@linear_rule("pad")
def padding(operation: Operation) -> Sequence[Linear]:
    """``C pad(x) = pad(Cx)`` off A; a constant that is filled in is constant along A, so it becomes zero."""
    rank = len(shape(operation["input"]))
    amounts = operation["pad"]
    if not isinstance(amounts, tuple | list):
        raise Blocked(Reason.UNKNOWN_OPERATION, "pad by amounts that are not written out")
    dimensions = [
        rank - 1 - pair for pair in range(len(amounts) // 2) if any(a != 0 for a in amounts[2 * pair : 2 * pair + 2])
    ]
    carriers: dict[Key, AxisMap] = {("input", None): _over(operation, dimensions)}
    value = operation["value"]
    if operation["mode"] == "constant" and value is not None:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise Blocked(Reason.NON_COMMUTING, "pad fills with a value that is not a finite number")
        carriers["value", None] = aligned((), result_shape(operation))
    return [Linear(carriers)]


@linear_rule("cumsum")
def running_sum(operation: Operation) -> Sequence[Linear]:
    """``C cumsum(x) = cumsum(Cx)`` along another axis."""
    dimension = dimension_of(operation["dim"], len(shape(operation["input"])))
    return [Linear({("input", None): _over(operation, [dimension])})]


@linear_rule("repeat_interleave")
def repeat_interleave(operation: Operation) -> Sequence[Linear]:
    """``C repeat_interleave(x) = repeat_interleave(Cx)`` of rows along another axis."""
    if operation["dim"] is None:
        raise Blocked(Reason.DIFFERENT_AXES, "repeat_interleave of the flattened tensor")
    dimension = dimension_of(operation["dim"], len(shape(operation["input"])))
    return [Linear({("input", None): _over(operation, [dimension])})]


@linear_rule("index_add")
def index_add(operation: Operation) -> Sequence[Linear]:
    """``C(x.index_add(i, y)) = Cx.index_add(i, Cy)`` of rows along another axis: how experts are combined."""
    operand, source = shape(operation["input"]), shape(operation["source"])
    dimension = dimension_of(operation["dim"], len(operand))
    if len(source) != len(operand):
        raise Blocked(Reason.UNKNOWN_OPERATION, "index_add of tensors of different rank")

    def to_rows(axes: Axes) -> Axes:
        require_free(axes, dimension, "index_add")
        return axes.with_free(dimension, source[dimension])

    def to_result(axes: Axes) -> Axes:
        require_free(axes, dimension, "index_add")
        return axes.with_free(dimension, operand[dimension])

    return [Linear({("input", None): _over(operation, [dimension]), ("source", None): AxisMap(to_result, to_rows)})]


@linear_rule("gather")
def gather(operation: Operation) -> Sequence[Linear]:
    """``C gather(x, i) = gather(Cx, i)`` along another axis, for an index that is the same for all of A."""
    operand, index = shape(operation["input"]), shape(operation["index"])
    dimension = dimension_of(operation["dim"], len(operand))

    def to_operand(axes: Axes) -> Axes:
        require_free(axes, dimension, "gather")
        for other, size in enumerate(operand):
            if axes.is_free(other):
                axes = axes.with_free(other, size)
            elif other != dimension and not same_size(size, index[other]):
                raise Blocked(Reason.DIFFERENT_AXES, "gather takes a part of the normalised axis")
        return axes

    def to_result(axes: Axes) -> Axes:
        require_free(axes, dimension, "gather")
        for other, size in enumerate(index):
            if axes.is_free(other):
                axes = axes.with_free(other, size)
            elif size != operand[other]:
                raise Blocked(Reason.DIFFERENT_AXES, "gather takes a part of the normalised axis")
        return axes

    return [
        Linear(
            {("input", None): AxisMap(to_result, to_operand)},
            {("index", None): aligned(index, result_shape(operation))},
        )
    ]
