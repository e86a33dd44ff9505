"""Operations that take a part of a tensor: pieces, index expressions and selections.

``C`` acts on the elements of A wherever they lie, so each rule only says where A goes. Cutting *along* A is the classic
trap: the mean of a part is not the mean of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, canonicalise, tensor_of, value_of
from lncompile.passes.graph.operands import dimension_of, other_operands, result_shape, shape
from lncompile.passes.graph.sizes import Size, same_size, shape_of
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.rules.base import (
    SAME,
    AxisMap,
    Linear,
    along,
    chained,
    cut,
    linear_rule,
    removed,
    require_free,
)


@linear_rule("split", "chunk", "unbind")
def pieces(operation: Operation) -> Sequence[Linear]:
    """``split(Cx) = C split(x)``.

    The result is a tuple: A is carried on it as it stands on the input, and ``getitem`` takes it to each piece.
    """
    return [Linear({("input", None): SAME}, metadata=other_operands(operation, "input"))]


@linear_rule("getitem")
def getitem(operation: Operation) -> Sequence[Linear]:
    """``(Cx)[i] = C(x[i])`` where the indexed dimensions are free: slices, numbers, new axes, index tensors.

    Where a dimension is cut, ``x[i]`` is centered by centering just that part of x (the rows of a joint projection) if
    x comes out of parameters, else by centering all of x.
    """
    source = operation["input"]
    if not isinstance(source, fx.Node):
        raise Blocked(Reason.UNKNOWN_OPERATION, "an index into something that is not a tensor")
    if tensor_of(source) is None:
        return _piece(operation, source)
    index = read_index(operation["index"], shape(source), result_shape(operation))
    return _whole_or_part(index.part, index.map)


@linear_rule("index")
def index(operation: Operation) -> Sequence[Linear]:
    """``(Cx)[i, :, j] = C(x[i, :, j])``: ATen's own index, in which None stands for a whole dimension."""
    items = [slice(None) if item is None else item for item in operation["indices"]]
    taken = read_index(items, shape(operation["input"]), result_shape(operation))
    return [Linear({("input", None): taken.map})]


def _whole_or_part(part: AxisMap | None, whole: AxisMap) -> Sequence[Linear]:
    readings = [Linear({("input", None): whole})]
    return readings if part is None else [Linear({("input", None): part}, selective=True), *readings]


def _piece(operation: Operation, source: fx.Node) -> Sequence[Linear]:
    origin = canonicalise(source)
    if origin is not None and origin.name == "multi_head_attention" and operation["index"] == 0:
        return [Linear({("input", None): SAME})]
    if origin is None or not has(origin, Trait.SPLITS):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"one of several results of {source.name}")
    whole, index = shape(origin["input"]), operation["index"]
    dimension = dimension_of(origin["dim"], len(whole))
    size = whole[dimension]
    if origin.name == "unbind":
        return _whole_or_part(_selected(dimension, size, index, "unbind"), removed(dimension, size, "unbind"))
    length = result_shape(operation)[dimension]
    kept = _range_of_piece(origin, index, dimension)
    part = None if kept is None or not isinstance(size, int) else cut(dimension, size, kept, origin.name)
    return _whole_or_part(part, along(dimension, size, length, origin.name))


def _selected(dimension: int, size: object, index: object, what: str) -> AxisMap | None:
    """One index of a dimension, which disappears; None where the index is not known."""
    if not isinstance(size, int) or not isinstance(index, int) or not -size <= index < size:
        return None
    first = index % size
    return chained(cut(dimension, size, range(first, first + 1), what), removed(dimension, 1, what))


def _range_of_piece(origin: Operation, index: object, dimension: int) -> range | None:
    """Which indices of the dimension a piece of a split holds; None where that is not known."""
    values = value_of(origin.node)
    if not isinstance(index, int) or not isinstance(values, tuple | list):
        return None
    sizes = [shape_of(value)[dimension] for value in values]
    index = index % len(sizes)
    if not all(isinstance(size, int) for size in sizes[: index + 1]):
        return None
    start = sum(sizes[:index])
    return range(start, start + sizes[index])


@dataclass(frozen=True)
class Index:
    """An index expression, read dimension by dimension.

    Attributes:
        map: how A moves if all of the source is centered.
        part: how A moves if only what is taken is centered; None where that is not known.
    """

    map: AxisMap
    part: AxisMap | None


def read_index(index: object, source: Sequence[Size], result: Sequence[Size]) -> Index:
    """Read an index expression: which dimensions of the source survive, and where.

    Args:
        index: as Python hands it to ``__getitem__``; nodes stand for tensors and numbers.
        source: shape of what is indexed.
        result: shape of what is taken.

    Raises:
        Blocked: for an expression without a rule (lists, index tensors without dimensions beside others).
    """
    items = list(index) if isinstance(index, tuple | list) else [index]
    if any(isinstance(item, list | tuple) for item in items):
        raise Blocked(Reason.UNKNOWN_OPERATION, "an index that is a list")
    if Ellipsis not in [item for item in items if not isinstance(item, fx.Node)]:
        items.append(Ellipsis)
    consumed = sum(_consumed(item) for item in items)
    expanded: list[object] = []
    for item in items:
        expanded += [slice(None)] * (len(source) - consumed) if item is Ellipsis else [item]
    first, rank = _advanced(expanded)
    # What becomes of each dimension: kept as result dimension j (perhaps with another size), or taken away.
    kept: list[tuple[int, int]] = []
    taken: list[int] = []
    chosen: dict[int, range | None] = {}
    position, target = 0, rank if first is None else 0
    placed = first is None
    for item in expanded:
        if item is None:
            target += 1
        elif isinstance(item, slice):
            chosen[position] = _range_of_slice(item, source[position])
            kept.append((position, target))
            position, target = position + 1, target + 1
        else:
            chosen[position] = _range_of_number(item, source[position])
            taken += range(position, position + _consumed(item))
            position += _consumed(item)
            if item is first and not placed:
                target, placed = target + rank, True
    if target != len(result):
        raise Blocked(Reason.UNKNOWN_OPERATION, "an index expression without a rule")
    changed = [(old, new) for old, new in kept if not same_size(source[old], result[new])]
    survives = _surviving(source, result, kept, changed)
    changes = [*taken, *(old for old, _ in changed)]
    parts = {dimension: part for dimension in changes if (part := chosen.get(dimension)) is not None}
    known = bool(parts) and len(parts) == len(changes)
    return Index(survives, _surviving_cut(source, result, kept, parts) if known else None)


def _range_of_slice(item: slice, size: Size) -> range | None:
    bounds = (item.start, item.stop, item.step)
    if not isinstance(size, int) or not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    return range(size)[item]


def _range_of_number(item: object, size: Size) -> range | None:
    if not isinstance(item, int) or isinstance(item, bool) or not isinstance(size, int) or not -size <= item < size:
        return None
    return range(item % size, item % size + 1)


def _surviving_cut(
    source: Sequence[Size], result: Sequence[Size], kept: Sequence[tuple[int, int]], parts: Mapping[int, range]
) -> AxisMap:
    """The map of an index that keeps these parts of some dimensions, of a single index or more."""
    sizes = list(source)
    steps: AxisMap | None = None
    for dimension, part in parts.items():
        step = cut(dimension, sizes[dimension], part, "an index")
        sizes[dimension] = len(part)
        steps = step if steps is None else chained(steps, step)
    assert steps is not None  # there is at least one part
    # What is left is the same index with full slices, and single indices of dimensions of size 1.
    return chained(steps, _surviving(sizes, result, kept, []))


def _surviving(
    source: Sequence[Size], result: Sequence[Size], kept: Sequence[tuple[int, int]], changed: Sequence[tuple[int, int]]
) -> AxisMap:
    """Dimensions move from ``old`` to ``new``; those that disappear, appear or change their size must be free."""
    stay = {old for old, _ in kept}

    def forward(axes: Axes) -> Axes:
        for dimension in (*(d for d in range(len(source)) if d not in stay), *(old for old, _ in changed)):
            require_free(axes, dimension, "an index")
        dimensions = list(Axes.of(tuple(result), ()).dimensions)
        for old, new in kept:
            if (old, new) not in changed:
                dimensions[new] = axes.dimensions[old]
        return Axes(tuple(dimensions))

    def backward(axes: Axes) -> Axes:
        moved = {new for _, new in kept}
        for dimension in range(len(result)):
            if dimension not in moved:
                require_free(axes, dimension, "an index")
        dimensions = list(Axes.of(tuple(source), ()).dimensions)
        for old, new in kept:
            if (old, new) not in changed:
                dimensions[old] = axes.dimensions[new]
            else:
                require_free(axes, new, "a slice")
        return Axes(tuple(dimensions))

    return AxisMap(forward, backward)


def _consumed(item: object) -> int:
    """How many dimensions of the source an item of an index expression stands for."""
    if item is None or item is Ellipsis:
        return 0
    if isinstance(item, fx.Node) and (tensor := tensor_of(item)) is not None and _is_mask(tensor):
        return tensor.dim()
    return 1


def _is_mask(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bool, torch.uint8)


def _advanced(items: Sequence[object]) -> tuple[object, int]:
    """Where the dimensions that index tensors make together come in the result, and how many they are.

    Side by side they come in the place of the first one, which is returned; apart from each other they come first of
    all, for which None is returned. A number takes its dimension away before, a mask is a list of positions.
    """
    items = [item for item in items if not isinstance(item, int) or isinstance(item, bool)]
    items = [item for item in items if not isinstance(item, fx.Node) or tensor_of(item) is not None]
    tensors = [tensor for item in items if isinstance(item, fx.Node) and (tensor := tensor_of(item)) is not None]
    if not tensors:
        return None, 0
    if len(tensors) > 1 and any(tensor.dim() == 0 for tensor in tensors):
        # Is it a number or a tensor? It matters where others do not stand beside it.
        raise Blocked(Reason.UNKNOWN_OPERATION, "index tensors without dimensions beside others")
    rank = max(1 if _is_mask(tensor) else tensor.dim() for tensor in tensors)
    places = [place for place, item in enumerate(items) if isinstance(item, fx.Node)]
    side_by_side = places == list(range(places[0], places[0] + len(places)))
    return (items[places[0]] if side_by_side else None), rank


@linear_rule("narrow", "slice", "index_select")
def selections(operation: Operation) -> Sequence[Linear]:
    """``select(Cx) = C select(x)`` of rows along a free dimension; a part of A itself as in ``getitem``."""
    operand, result = shape(operation["input"]), result_shape(operation)
    dimension = dimension_of(operation["dim"], len(operand))
    size, length = operand[dimension], result[dimension]
    kept = _range_of_selection(operation, size)
    part = None if kept is None or kept == range(size) else cut(dimension, size, kept, operation.name)
    return _whole_or_part(part, along(dimension, size, length, operation.name))


def _range_of_selection(operation: Operation, size: Size) -> range | None:
    if operation.name == "index_select":
        return None
    if operation.name == "slice":
        return _range_of_slice(slice(operation["start"], operation["end"], operation["step"]), size)
    start, length = operation["start"], operation["length"]
    if not isinstance(start, int) or not isinstance(length, int) or not isinstance(size, int):
        return None
    return range(start % size, start % size + length) if size else None


@linear_rule("select")
def select(operation: Operation) -> Sequence[Linear]:
    """``(Cx).select(i) = C(x.select(i))`` along a free dimension, which disappears; see ``getitem``."""
    operand = shape(operation["input"])
    dimension = dimension_of(operation["dim"], len(operand))
    size = operand[dimension]
    return _whole_or_part(_selected(dimension, size, operation["index"], "select"), removed(dimension, size, "select"))
