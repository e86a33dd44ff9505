"""Operations that move elements without mixing them: views, permutations, joins, cuts, and reductions off A.

``C`` acts on the elements of A wherever they lie, so each rule only says where A goes. Joining or cutting *along* A is
the classic trap: the mean of a part is not the mean of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation
from lncompile.passes.graph.operands import dimension_of, dimensions_of, other_operands, result_shape, shape
from lncompile.passes.graph.sizes import same_size
from lncompile.passes.rules.base import (
    AxisMap,
    Linear,
    aligned,
    along,
    inserted,
    linear_rule,
    permuted,
    require_free,
    reshaped,
)


@linear_rule("view", "reshape", "view_as", "flatten", "unflatten", "squeeze", "unsqueeze")
def views(operation: Operation) -> Sequence[Linear]:
    """``view(Cx) = C'view(x)``: the same elements under other dimensions; A may split, merge, or become a part."""
    map_ = reshaped(shape(operation["input"]), result_shape(operation))
    return [Linear({("input", None): map_}, metadata=other_operands(operation, "input"))]


def _permutation(operation: Operation) -> list[int]:
    rank = len(shape(operation["input"]))
    order = list(range(rank))
    if operation.name == "permute":
        return list(dimensions_of(operation["dim"], rank))
    if operation.name in ("t", "mT"):
        if rank >= 2:
            order[-2], order[-1] = order[-1], order[-2]
        if operation.name == "t" and rank > 2:
            raise Blocked(Reason.UNKNOWN_OPERATION, "a transpose of more than two dimensions without their names")
        return order
    if operation.name == "transpose":
        first, second = dimension_of(operation["dim0"], rank), dimension_of(operation["dim1"], rank)
        order[first], order[second] = order[second], order[first]
        return order
    # movedim: let torch do it on a tensor whose sizes are the dimensions' numbers.
    marked = torch.empty(list(range(rank)), device="meta")
    return list(torch.movedim(marked, operation["source"], operation["destination"]).shape)


@linear_rule("permute", "transpose", "t", "mT", "movedim")
def permutations(operation: Operation) -> Sequence[Linear]:
    """``permute(Cx) = C'permute(x)``: A moves with its dimensions."""
    return [Linear({("input", None): permuted(_permutation(operation))})]


@linear_rule("expand", "expand_as")
def expand(operation: Operation) -> Sequence[Linear]:
    """``expand(Cx) = C expand(x)`` along free dimensions; what is expanded along A is constant there."""
    map_ = aligned(shape(operation["input"]), result_shape(operation))
    return [Linear({("input", None): map_}, metadata=other_operands(operation, "input"))]


@linear_rule("repeat")
def repeat(operation: Operation) -> Sequence[Linear]:
    """``repeat(Cx) = C repeat(x)`` where the repeated dimensions are free."""
    operand, result = shape(operation["input"]), result_shape(operation)
    new = len(result) - len(operand)
    changed = [i for i, size in enumerate(operand) if not same_size(size, result[new + i])]

    def forward(axes: Axes) -> Axes:
        for index in changed:
            require_free(axes, index, "repeat")
            axes = axes.with_free(index, result[new + index])
        for index in range(new):
            axes = axes.insert_free(index, result[index])
        return axes

    def backward(axes: Axes) -> Axes:
        for index in range(new):
            require_free(axes, index, "repeat")
        axes = Axes(axes.dimensions[new:])
        for index in changed:
            require_free(axes, index, "repeat")
            axes = axes.with_free(index, operand[index])
        return axes

    return [Linear({("input", None): AxisMap(forward, backward)}, metadata=other_operands(operation, "input"))]


@linear_rule("cat")
def cat(operation: Operation) -> Sequence[Linear]:
    """``cat(Cx, Cy) = C cat(x, y)`` along a free dimension. Along A it is a trap: blockwise means are not the mean."""
    result = result_shape(operation)
    dimension = dimension_of(operation["dim"], len(result))
    carriers = {}
    for key, node in operation.operands():
        operand = shape(node)
        if len(operand) != len(result):
            raise Blocked(Reason.UNKNOWN_OPERATION, "cat of tensors of different rank")
        carriers[key] = along(dimension, operand[dimension], result[dimension], "cat")
    return [Linear(carriers)]


@linear_rule("stack")
def stack(operation: Operation) -> Sequence[Linear]:
    """``stack(Cx, Cy) = C stack(x, y)``: the new dimension is free."""
    result = result_shape(operation)
    dimension = dimension_of(operation["dim"], len(result))
    return [Linear({key: inserted(dimension, result[dimension], "stack") for key, _ in operation.operands()})]


@linear_rule("roll", "flip")
def rotations(operation: Operation) -> Sequence[Linear]:
    """``roll(Cx) = C roll(x)`` along free dimensions."""
    if operation["dim"] is None:
        raise Blocked(Reason.DIFFERENT_AXES, "roll of the flattened tensor")
    dimensions = dimensions_of(operation["dim"], len(shape(operation["input"])))

    def move(axes: Axes) -> Axes:
        for dimension in dimensions:
            require_free(axes, dimension, operation.name)
        return axes

    return [Linear({("input", None): AxisMap(move, move)})]


@linear_rule("mean", "sum")
def reductions(operation: Operation) -> Sequence[Linear]:
    """``mean_B(Cx) = C mean_B(x)`` over free dimensions B."""
    operand = shape(operation["input"])
    if operation["dim"] is None or operation["dim"] in ((), []):
        raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} over all axes")
    dimensions = sorted(dimensions_of(operation["dim"], len(operand)), reverse=True)
    keep = bool(operation["keepdim"])

    def forward(axes: Axes) -> Axes:
        for dimension in dimensions:
            require_free(axes, dimension, operation.name)
            axes = axes.with_free(dimension, 1) if keep else axes.remove(dimension)
        return axes

    def backward(axes: Axes) -> Axes:
        for dimension in reversed(dimensions):
            if keep:
                require_free(axes, dimension, operation.name)
                axes = axes.with_free(dimension, operand[dimension])
            else:
                axes = axes.insert_free(dimension, operand[dimension])
        return axes

    return [Linear({("input", None): AxisMap(forward, backward)})]
