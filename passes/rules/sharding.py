"""Tensors of several processes: where one of a single process becomes a sharded one and back, and sums over processes.

Between the borders operations on sharded tensors mean the whole tensor, and have the rules that they have on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph import sharding
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, tensor_of
from lncompile.passes.graph.factors import Dimension, Factor
from lncompile.passes.graph.operands import other_operands, shape
from lncompile.passes.graph.sizes import Size, shape_of
from lncompile.passes.rules.base import SAME, AxisMap, Linear, linear_rule


@linear_rule("all_reduce")
def all_reduce(operation: Operation) -> Sequence[Linear]:
    """``C (x_1 + x_2) = C x_1 + C x_2``: each process centers the addend it has. A maximum is none."""
    if str(operation["reduce_op"]).lower() not in ("sum", "avg"):
        raise Blocked(Reason.NON_COMMUTING, f"an all_reduce by '{operation['reduce_op']}' over processes")
    return [Linear({("input", None): SAME})]


@linear_rule("wait_tensor")
def wait_tensor(operation: Operation) -> Sequence[Linear]:
    """``C x = C x``: it waits for a collective."""
    return [Linear({("input", None): SAME})]


@linear_rule("redistribute")
def redistribute(operation: Operation) -> Sequence[Linear]:
    """``C x = C x``: the whole tensor stays what it is, only its pieces move (a sum of partial ones included)."""
    return [Linear({("input", None): SAME}, metadata=other_operands(operation, "input"))]


@linear_rule("from_local")
def from_local(operation: Operation) -> Sequence[Linear]:
    """``C [x_1 | x_2] = [C x_1 | C x_2]`` and ``C (x_1 + x_2) = C x_1 + C x_2``: each process centers its own piece."""
    if any(operation[name] is not None for name in ("shape", "stride")):
        raise Blocked(Reason.UNKNOWN_OPERATION, "a sharded tensor made with a shape of its own")
    if operation["run_check"] is not False:
        raise Blocked(Reason.UNKNOWN_OPERATION, "a sharded tensor for which processes compare their pieces (run_check)")
    whole = tensor_of(operation.node)
    return [Linear({("input", None): _pieces(whole, shape(operation["input"]), "from_local")})]


@linear_rule("to_local")
def to_local(operation: Operation) -> Sequence[Linear]:
    """The piece of ``Cx`` is the ``C`` of the piece, where no cut goes through A."""
    whole = tensor_of(operation["input"])
    pieces = _pieces(whole, shape(operation.node), "to_local")
    if whole is not None and sharding.is_partial(whole):
        # That the sum is centered says nothing of one addend.
        raise Blocked(Reason.UNKNOWN_OPERATION, "one addend of a sum over processes is read by itself")
    return [Linear({("input", None): AxisMap(pieces.backward, pieces.forward)})]


def _pieces(whole: Tensor | None, local: Sequence[Size], what: str) -> AxisMap:
    """From a local tensor to the whole one, and back."""
    if whole is None or not sharding.is_sharded(whole):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"'{what}' of a tensor that is not sharded")
    sizes = shape_of(whole)
    if not sharding.is_understood(whole) or len(sizes) != len(local):
        raise Blocked(Reason.UNKNOWN_OPERATION, f"'{what}' of a tensor whose shards are not understood")

    def move(axes: Axes, target: Sequence[Size], factors: Callable[[int], Dimension | None]) -> Axes:
        dimensions: list[Dimension] = []
        for dimension, size in enumerate(target):
            if axes.is_free(dimension):
                dimensions.append(Axes.of((size,), ()).dimensions[0])
                continue
            along = factors(dimension)
            moved = None if along is None else Axes((along,)).reshape((size,))
            if moved is None:
                sentence = f"'{what}' of a tensor that is sharded along the normalised axes {axes}"
                raise Blocked(Reason.DIFFERENT_AXES, sentence)
            dimensions.append(moved.dimensions[0])
        return Axes(tuple(dimensions))

    def forward(axes: Axes) -> Axes:
        def of_the_whole(dimension: int) -> Dimension:
            return (Factor(sharding.shards_along(whole, dimension), False), *axes.dimensions[dimension])

        return move(axes, sizes, of_the_whole)

    def backward(axes: Axes) -> Axes:
        return move(axes, local, lambda dimension: sharding.local_factors(whole, dimension, axes))

    return AxisMap(forward, backward)
