"""Operations that cut tensors into windows, blocks or groups and put the elements elsewhere: unfold, pixel_shuffle, ...

All but the windows are a view, a permutation and a view, so A goes through them as through those three. A norm over the
channels passes; one over a window's positions, which an unfold puts beside the channels, does not.
"""

from __future__ import annotations

from collections.abc import Sequence

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation
from lncompile.passes.graph.operands import dimension_of, result_shape, shape
from lncompile.passes.graph.sizes import Size
from lncompile.passes.rules.base import AxisMap, Linear, chained, linear_rule, permuted, require_free, reshaped


def _rearranged(operand: Sequence[Size], cut: Sequence[Size], order: Sequence[int], result: Sequence[Size]) -> AxisMap:
    """``operand.view(cut).permute(order).reshape(result)``."""
    moved = chained(reshaped(operand, cut), permuted(order))
    return chained(moved, reshaped([cut[index] for index in order], result))


def _number(operation: Operation, name: str) -> int:
    value = operation[name]
    if not isinstance(value, int):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"{operation.name} by a factor that is not a plain number")
    return value


@linear_rule("pixel_shuffle")
def pixel_shuffle(operation: Operation) -> Sequence[Linear]:
    """``C pixel_shuffle(x) = pixel_shuffle(Cx)``: ``[C·r·r, H, W] → [C, H·r, W·r]``."""
    operand, result = shape(operation["input"]), result_shape(operation)
    factor, first = _number(operation, "factor"), len(operand) - 3
    cut = (*operand[:first], result[first], factor, factor, *operand[-2:])
    order = (*range(first), first, first + 3, first + 1, first + 4, first + 2)
    return [Linear({("input", None): _rearranged(operand, cut, order, result)})]


@linear_rule("pixel_unshuffle")
def pixel_unshuffle(operation: Operation) -> Sequence[Linear]:
    """``C pixel_unshuffle(x) = pixel_unshuffle(Cx)``: ``[C, H·r, W·r] → [C·r·r, H, W]``."""
    operand, result = shape(operation["input"]), result_shape(operation)
    factor, first = _number(operation, "factor"), len(operand) - 3
    cut = (*operand[: first + 1], result[-2], factor, result[-1], factor)
    order = (*range(first), first, first + 2, first + 4, first + 1, first + 3)
    return [Linear({("input", None): _rearranged(operand, cut, order, result)})]


@linear_rule("channel_shuffle")
def channel_shuffle(operation: Operation) -> Sequence[Linear]:
    """``C channel_shuffle(x) = channel_shuffle(Cx)``: channels as ``[groups, C / groups]``, transposed."""
    operand, result = shape(operation["input"]), result_shape(operation)
    groups = _number(operation, "groups")
    if not isinstance(operand[1], int):
        raise Blocked(Reason.UNKNOWN_OPERATION, "channel_shuffle of a number of channels that is not known")
    cut = (operand[0], groups, operand[1] // groups, *operand[2:])
    order = (0, 2, 1, *range(3, len(cut)))
    return [Linear({("input", None): _rearranged(operand, cut, order, result)})]


@linear_rule("unfold")
def windows(operation: Operation) -> Sequence[Linear]:
    """``(Cx).unfold(...) = C(x.unfold(...))`` along another axis: windows, with their positions as a new last axis."""
    operand, result = shape(operation["input"]), result_shape(operation)
    dimension, last = dimension_of(operation["dim"], len(operand)), len(operand)

    def forward(axes: Axes) -> Axes:
        require_free(axes, dimension, "unfold")
        return axes.with_free(dimension, result[dimension]).insert_free(last, result[last])

    def backward(axes: Axes) -> Axes:
        for free in (dimension, last):
            require_free(axes, free, "unfold")
        return axes.remove(last).with_free(dimension, operand[dimension])

    return [Linear({("input", None): AxisMap(forward, backward)})]


def _windows_of_images(image: Sequence[Size], columns: Sequence[Size], what: str) -> AxisMap:
    """From ``[N, C, H, W]`` to ``[N, C·k, L]``: the channels stand outermost in the second dimension."""
    channel = len(image) - 3
    if not isinstance(image[channel], int) or not isinstance(columns[channel], int):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"{what} of a number of channels that is not known")
    positions = columns[channel] // image[channel]
    cut = (*image[: channel + 1], positions, columns[-1])

    def forward(axes: Axes) -> Axes | None:
        for free in (channel + 1, channel + 2):
            require_free(axes, free, what)
        windowed = Axes((*axes.dimensions[: channel + 1], *Axes.of(cut, ()).dimensions[-2:]))
        return reshaped(cut, columns).forward(windowed)

    def backward(axes: Axes) -> Axes:
        windowed = reshaped(cut, columns).backward(axes)
        if windowed is None or not windowed.is_free(channel + 1) or not windowed.is_free(channel + 2):
            raise Blocked(Reason.DIFFERENT_AXES, f"{what} puts the positions of a window among the normalised axes")
        return Axes((*windowed.dimensions[: channel + 1], *Axes.of(image, ()).dimensions[-2:]))

    return AxisMap(forward, backward)


@linear_rule("unfold_image")
def unfold_image(operation: Operation) -> Sequence[Linear]:
    """``C unfold(x) = unfold(Cx)`` (im2col) where A lies among the channels of the windows, not their positions."""
    map_ = _windows_of_images(shape(operation["input"]), result_shape(operation), "unfold")
    return [Linear({("input", None): map_})]


@linear_rule("fold_image")
def fold_image(operation: Operation) -> Sequence[Linear]:
    """``C fold(x) = fold(Cx)`` (col2im) over channels: windows are added up position by position."""
    map_ = _windows_of_images(result_shape(operation), shape(operation["input"]), "fold")

    return [Linear({("input", None): AxisMap(map_.backward, map_.forward)})]
