"""Rows written into other rows: scatter, index_copy, index_put and their kin, along axes that A does not touch.

``C(x with y written to the rows i) = Cx with Cy written to the rows i``: linear in (x, y) jointly, as long as each
element of A is written from the same rows to the same rows. Where one row is written twice and not added up, torch
leaves open which of them stays, and so do these rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, tensor_of
from lncompile.passes.graph.factors import Dimension
from lncompile.passes.graph.operands import dimension_of, result_shape, shape
from lncompile.passes.graph.sizes import Size, same_size
from lncompile.passes.rules.base import AxisMap, Linear, aligned, along, linear_rule, require_free


def _untouched(dimension: int, what: str) -> AxisMap:
    """The operand whose rows are replaced: A stays where it is, off one dimension."""

    def move(axes: Axes) -> Axes:
        require_free(axes, dimension, what)
        return axes

    return AxisMap(move, move)


def _resized(operand: Sequence[Size], result: Sequence[Size], dimension: int, what: str) -> AxisMap:
    """Free dimensions may differ in size between operand and result; those that A touches may not."""

    def move(axes: Axes, sizes: Sequence[Size], own: Sequence[Size]) -> Axes:
        require_free(axes, dimension, what)
        for index in range(len(sizes)):
            if axes.is_free(index):
                axes = axes.with_free(index, sizes[index])
            elif not same_size(sizes[index], own[index]):
                raise Blocked(Reason.DIFFERENT_AXES, f"{what} of a part of the normalised axis")
        return axes

    return AxisMap(lambda axes: move(axes, result, operand), lambda axes: move(axes, operand, result))


def _finite(value: object, what: str) -> None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Blocked(Reason.NON_COMMUTING, f"{what} with a value that is not a finite number")


@linear_rule("scatter", "scatter_add")
def scatter(operation: Operation) -> Sequence[Linear]:
    """``C x.scatter(i, y) = Cx.scatter(i, Cy)`` for an index that is the same for all of A; a number becomes zero."""
    name, operand, index = operation.name, shape(operation["input"]), shape(operation["index"])
    dimension = dimension_of(operation["dim"], len(operand))
    if operation.arguments.get("reduce") is not None:
        raise Blocked(Reason.NON_COMMUTING, "a scatter that multiplies or takes a maximum")
    to_index = _resized(index, operand, dimension, name)
    carriers: dict[Key, AxisMap] = {("input", None): _untouched(dimension, name)}
    source = operation["source"]
    if isinstance(source, fx.Node) and tensor_of(source) is not None:
        carriers["source", None] = _resized(shape(source), operand, dimension, name)
    else:
        _finite(source, name)
        carriers["source", None] = aligned((), operand)
    return [Linear(carriers, {("index", None): to_index})]


@linear_rule("scatter_reduce")
def scatter_reduce(operation: Operation) -> Sequence[Linear]:
    """``C x.scatter_reduce(i, y, "sum") = Cx.scatter_reduce(i, Cy, "sum")``, and with ``"mean"``."""
    operand, index = shape(operation["input"]), shape(operation["index"])
    dimension = dimension_of(operation["dim"], len(operand))
    if operation["reduce"] not in ("sum", "mean"):
        raise Blocked(Reason.NON_COMMUTING, f"a scatter that takes '{operation['reduce']}'")
    carriers: dict[Key, AxisMap] = {
        ("input", None): _untouched(dimension, "scatter_reduce"),
        ("source", None): _resized(shape(operation["source"]), operand, dimension, "scatter_reduce"),
    }
    return [Linear(carriers, {("index", None): _resized(index, operand, dimension, "scatter_reduce")})]


@linear_rule("index_copy")
def index_copy(operation: Operation) -> Sequence[Linear]:
    """``C x.index_copy(i, y) = Cx.index_copy(i, Cy)`` of rows along another axis."""
    operand, source = shape(operation["input"]), shape(operation["source"])
    dimension = dimension_of(operation["dim"], len(operand))
    if len(source) != len(operand):
        raise Blocked(Reason.UNKNOWN_OPERATION, "index_copy of tensors of different rank")
    to_source = along(dimension, source[dimension], operand[dimension], "index_copy")
    return [Linear({("input", None): _untouched(dimension, "index_copy"), ("source", None): to_source})]


@linear_rule("index_fill")
def index_fill(operation: Operation) -> Sequence[Linear]:
    """``C x.index_fill(i, c) = Cx.index_fill(i, 0)`` of rows along another axis, for a finite c."""
    operand = shape(operation["input"])
    _finite(operation["value"], "index_fill")
    input_ = _untouched(dimension_of(operation["dim"], len(operand)), "index_fill")
    return [Linear({("input", None): input_, ("value", None): aligned((), operand)})]


def _is_mask(index: fx.Node) -> bool:
    tensor = tensor_of(index)
    return tensor is not None and tensor.dtype in (torch.bool, torch.uint8)


@linear_rule("index_put")
def index_put(operation: Operation) -> Sequence[Linear]:
    """``C x.index_put(i, y) = Cx.index_put(i, Cy)`` of rows along leading axes, added up or not."""
    operand, values = shape(operation["input"]), shape(operation["values"])
    indices = operation["indices"]
    if not isinstance(indices, list | tuple) or not all(isinstance(index, fx.Node) for index in indices):
        raise Blocked(Reason.UNKNOWN_OPERATION, "index_put with indices that are not tensors side by side")
    masks = [_is_mask(index) for index in indices]
    # A mask takes as many dimensions as it has and is one dimension of what it picks.
    taken = sum(len(shape(index)) if mask else 1 for index, mask in zip(indices, masks, strict=True))
    ranks = [1 if mask else len(shape(index)) for index, mask in zip(indices, masks, strict=True)]
    picked_rank = max(ranks, default=0) + len(operand) - taken

    def check(axes: Axes) -> None:
        for dimension in range(taken):
            require_free(axes, dimension, "index_put")

    def to_result(axes: Axes) -> Axes:
        dimensions: list[Dimension] = list(Axes.of(operand, ()).dimensions)
        for index in range(len(values)):
            if not axes.is_free(index):
                place = len(operand) - len(values) + index
                if place < taken or not same_size(values[index], operand[place]):
                    raise Blocked(Reason.DIFFERENT_AXES, "index_put along the normalised axis")
                dimensions[place] = axes.dimensions[index]
        return Axes(tuple(dimensions))

    def to_values(axes: Axes) -> Axes | None:
        check(axes)
        if len(values) > picked_rank:
            raise Blocked(Reason.UNKNOWN_OPERATION, "index_put of more dimensions than it picks")
        kept = Axes(axes.dimensions[taken:])
        trailing = values[max(0, len(values) - kept.rank) :]
        moved = aligned(trailing, operand[taken:]).backward(kept)
        if moved is None:
            return None
        leading = Axes.of(values[: len(values) - len(trailing)], ()).dimensions
        return Axes((*leading, *moved.dimensions))

    def stay(axes: Axes) -> Axes:
        check(axes)
        return axes

    return [Linear({("input", None): AxisMap(stay, stay), ("values", None): AxisMap(to_result, to_values)})]


@linear_rule("slice_scatter")
def slice_scatter(operation: Operation) -> Sequence[Linear]:
    """``C`` of rows with other rows written over a slice of them, along another axis."""
    operand, source = shape(operation["input"]), shape(operation["source"])
    dimension = dimension_of(operation["dim"], len(operand))
    to_source = along(dimension, source[dimension], operand[dimension], "slice_scatter")
    return [Linear({("input", None): _untouched(dimension, "slice_scatter"), ("source", None): to_source})]


@linear_rule("select_scatter")
def select_scatter(operation: Operation) -> Sequence[Linear]:
    """``C`` of rows with one of them written over, along another axis."""
    operand = shape(operation["input"])
    dimension = dimension_of(operation["dim"], len(operand))

    def to_source(axes: Axes) -> Axes:
        require_free(axes, dimension, "select_scatter")
        return axes.remove(dimension)

    to_result = AxisMap(lambda axes: axes.insert_free(dimension, operand[dimension]), to_source)
    return [Linear({("input", None): _untouched(dimension, "select_scatter"), ("source", None): to_result})]


@linear_rule("masked_scatter")
def masked_scatter(operation: Operation) -> Sequence[Linear]:
    """``C x.masked_scatter(m, y) = Cx.masked_scatter(m, Cy)``: image features among the embeddings of a text.

    The elements of y are taken in their flat order, wherever m is true. So A must be whole trailing dimensions, m
    constant along A, and then y is read as rows of A: ``y.view(-1, d)``.
    """
    operand, result, source = shape(operation["input"]), result_shape(operation), shape(operation["source"])

    def to_source(axes: Axes) -> Axes:
        touched = axes.normalised_dimensions
        if not axes.whole or touched != tuple(range(len(result) - len(touched), len(result))):
            raise Blocked(Reason.DIFFERENT_AXES, "masked_scatter across the normalised axes")
        rows = _rows_of(source, axes.count)
        if rows is None:
            raise Blocked(Reason.DIFFERENT_AXES, f"masked_scatter of {source}, which is not cut into rows of {axes}")
        return rows

    def to_result(axes: Axes) -> Axes:
        for count in range(1, len(result) + 1):
            answer = Axes.trailing(result, count)
            if same_size(answer.count, axes.count) and _rows_of(source, axes.count) == axes:
                return answer
        raise Blocked(Reason.DIFFERENT_AXES, "masked_scatter of other rows than the normalised ones")

    carriers: dict[Key, AxisMap] = {
        ("input", None): aligned(operand, result),
        ("source", None): AxisMap(to_result, to_source),
    }
    return [Linear(carriers, {("mask", None): aligned(shape(operation["mask"]), result)})]


def _rows_of(sizes: Sequence[Size], count: Size) -> Axes | None:
    """A on a tensor that is read in flat order, in rows of ``count`` elements; None if that cannot be told."""
    elements: Size = 1
    for trailing, size in enumerate(reversed(sizes), start=1):
        elements = elements * size
        if same_size(elements, count):
            return Axes.trailing(sizes, trailing)
    if isinstance(elements, int) and isinstance(count, int) and elements % count == 0:
        return Axes.of((elements // count, count), [1]).reshape(sizes)
    return None


@linear_rule("take_along_dim")
def take_along_dim(operation: Operation) -> Sequence[Linear]:
    """``C take_along_dim(x, i) = take_along_dim(Cx, i)`` along another axis, by an index constant along A."""
    operand, index, result = shape(operation["input"]), shape(operation["indices"]), result_shape(operation)
    if operation["dim"] is None or len(operand) != len(index):
        raise Blocked(Reason.DIFFERENT_AXES, "take_along_dim of the flattened tensor")
    dimension = dimension_of(operation["dim"], len(operand))
    to_operand = _resized(operand, result, dimension, "take_along_dim")
    return [Linear({("input", None): to_operand}, {("indices", None): aligned(index, result)})]
