"""Matrix products, convolutions and look-ups: linear in their parameters, which is where centering is free.

A linear layer ``y = Wh + b`` is linear in ``(W, b)`` jointly: ``C(Wh + b) = (CW)h + Cb``, column-based weight
centering. The same product is linear in ``h`` for an A that lies on another axis of h (token mixing), and attention's
``P @ v`` is linear in ``v``.
"""

from __future__ import annotations

from collections.abc import Sequence

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, value_of
from lncompile.passes.graph.factors import Dimension
from lncompile.passes.graph.operands import result_shape, shape
from lncompile.passes.graph.sizes import Size, shape_of
from lncompile.passes.rules.base import AxisMap, Linear, aligned, linear_rule, require_free, require_uncontracted


def _only(axes: Axes, dimension: int, what: str) -> None:
    """Raise Blocked unless ``A`` lies within one dimension of the result."""
    if any(axes.is_free(index) == (index == dimension) for index in range(axes.rank)):
        raise Blocked(Reason.DIFFERENT_AXES, f"{what}: the normalised axes {axes} are not those its weight produces")


def one_dimension(operand: Sequence[Size], dimension: int, result: Sequence[Size], target: int, what: str) -> AxisMap:
    """``A`` lies within one dimension of the operand, which becomes dimension ``target`` of the result."""

    def forward(axes: Axes) -> Axes:
        for index in range(len(operand)):
            if index != dimension:
                require_uncontracted(axes, index, what)
        dimensions = list(Axes.of(result, ()).dimensions)
        dimensions[target] = axes.dimensions[dimension]
        return Axes(tuple(dimensions))

    def backward(axes: Axes) -> Axes:
        _only(axes, target, what)
        dimensions = list(Axes.of(operand, ()).dimensions)
        dimensions[dimension] = axes.dimensions[target]
        return Axes(tuple(dimensions))

    return AxisMap(forward, backward)


def _other_axes(operand: Sequence[Size], result: Sequence[Size], what: str) -> AxisMap:
    """``A`` lies on dimensions before the last, which a product along the last one leaves alone."""
    last = len(operand) - 1

    def forward(axes: Axes) -> Axes:
        require_uncontracted(axes, last, what)
        return axes.with_free(last, result[-1])

    def backward(axes: Axes) -> Axes:
        require_free(axes, last, f"{what} mixes")
        return axes.with_free(last, operand[-1])

    return AxisMap(forward, backward)


@linear_rule("linear")
def linear(operation: Operation) -> Sequence[Linear]:
    """``C(Wh + b) = (CW)h + Cb`` over output features; ``C(hWᵀ + b) = (Ch)Wᵀ + 0`` over any other axis of h."""
    result = result_shape(operation)
    weight, bias, input_ = operation["weight"], operation["bias"], operation["input"]
    if len(shape(weight)) != 2:
        raise Blocked(Reason.UNKNOWN_OPERATION, "a linear layer whose weight is not a matrix")
    biases: dict[Key, AxisMap] = {("bias", None): aligned(shape(bias), result)} if bias is not None else {}
    last = len(result) - 1
    return [
        Linear({("weight", None): one_dimension(shape(weight), 0, result, last, "linear"), **biases}),
        Linear({("input", None): _other_axes(shape(input_), result, "linear"), **biases}),
    ]


@linear_rule("addmm", "baddbmm")
def addmm(operation: Operation) -> Sequence[Linear]:
    """``C(βM + αAB) = βCM + αA(CB)`` over B's columns, ``βCM + α(CA)B`` over A's rows. M may be an activation."""
    result = result_shape(operation)
    first, second = shape(operation["mat1"]), shape(operation["mat2"])
    rank = len(result)
    addend: dict[Key, AxisMap] = {("input", None): aligned(shape(operation["input"]), result)}
    return [
        Linear({("mat2", None): one_dimension(second, rank - 1, result, rank - 1, "addmm"), **addend}),
        Linear({("mat1", None): one_dimension(first, rank - 2, result, rank - 2, "addmm"), **addend}),
    ]


def _summed_over(dimension: int, size: Size, what: str) -> AxisMap:
    """A product with a vector takes one dimension away, off A."""

    def forward(axes: Axes) -> Axes:
        require_uncontracted(axes, dimension, what)
        return axes.remove(dimension)

    return AxisMap(forward, lambda axes: axes.insert_free(dimension, size))


@linear_rule("addmv")
def addmv(operation: Operation) -> Sequence[Linear]:
    """``C(βm + αAv) = βCm + α(CA)v`` over A's rows."""
    matrix = shape(operation["mat"])
    addend = aligned(shape(operation["input"]), result_shape(operation))
    return [Linear({("mat", None): _summed_over(1, matrix[1], "addmv"), ("input", None): addend})]


@linear_rule("matmul")
def matmul(operation: Operation) -> Sequence[Linear]:
    """``C(AB) = A(CB)`` over B's columns (attention's ``P @ v``, ``x @ W``) and ``(CA)B`` over A's rows."""
    result = result_shape(operation)
    left, right = shape(operation["input"]), shape(operation["other"])
    if not result:
        raise Blocked(Reason.DIFFERENT_AXES, "a product of two vectors")
    if len(right) == 1:
        return [Linear({("input", None): _summed_over(len(left) - 1, left[-1], "matmul")})]
    if len(left) == 1:
        return [Linear({("other", None): _summed_over(len(right) - 2, right[-2], "matmul")})]
    last = len(result) - 1
    return [
        Linear({("other", None): one_dimension(right, len(right) - 1, result, last, "matmul")}),
        Linear({("input", None): one_dimension(left, len(left) - 2, result, last - 1, "matmul")}),
    ]


@linear_rule("embedding")
def embedding(operation: Operation) -> Sequence[Linear]:
    """``C(E[ids]) = (CE)[ids]``, each row centered, the padding row too. ``max_norm`` rewrites the table: blocked."""
    if operation["max_norm"] is not None:
        raise Blocked(Reason.MUTATION, "an embedding with max_norm rescales its table at each call")
    result = result_shape(operation)
    weight = shape(operation["weight"])
    return [Linear({("weight", None): one_dimension(weight, 1, result, len(result) - 1, "embedding")})]


def _within_a_block(factors: Dimension, size: Size) -> bool:
    """Whether elements centered together always lie in one of the blocks of this size that a dimension is cut into."""
    outermost = next((i for i, factor in enumerate(factors) if factor.normalised), len(factors))
    span: Size = 1
    for factor in factors[outermost:]:
        span = span * factor.size
    return bool(size % span == 0)


def _channels_of(operation: Operation) -> tuple[tuple[Size, ...], int, int]:
    """The shape of a convolution's result, the dimension of its channels, and into how many groups they are cut."""
    result, groups = result_shape(operation), operation["groups"]
    if not isinstance(groups, int):
        raise Blocked(Reason.UNKNOWN_OPERATION, "a convolution whose number of groups is not a plain number")
    return result, len(result) - (len(shape(operation["weight"])) - 2) - 1, groups


@linear_rule("convolution")
def convolution(operation: Operation) -> Sequence[Linear]:
    """``C(W * x + b) = (CW) * x + Cb`` over output channels, weight axis 0.

    Each group of a grouped convolution reads other inputs, so only an A inside one group is legal.
    """
    result, channel, groups = _channels_of(operation)
    per_group = result[channel] // groups

    def carrier(name: str) -> AxisMap:
        map_ = one_dimension(shape(operation[name]), 0, result, channel, "convolution")

        def require_one_group(channels: Dimension) -> None:
            if groups != 1 and not _within_a_block(channels, per_group):
                raise Blocked(
                    Reason.DIFFERENT_AXES, "a grouped convolution mixes only within a group, the norm goes across them"
                )

        def forward(axes: Axes) -> Axes | None:
            require_one_group(axes.dimensions[0])
            return map_.forward(axes)

        def backward(axes: Axes) -> Axes | None:
            require_one_group(axes.dimensions[channel])
            return map_.backward(axes)

        return AxisMap(forward, backward)

    return [Linear({(name, None): carrier(name) for name in ("weight", "bias") if operation[name] is not None})]


@linear_rule("transposed_convolution")
def transposed_convolution(operation: Operation) -> Sequence[Linear]:
    """``C(W *ᵀ x + b) = (CW) *ᵀ x + Cb`` over output channels, weight axis 1.

    The weight of a grouped one is ``[in, out / groups, ...]``: axis 1 holds the channels of one group, and the groups
    stand along axis 0. An A inside each group is an A inside axis 1, the same one for all groups.
    """
    result, channel, groups = _channels_of(operation)
    per_group = result[channel] // groups
    to_channels = one_dimension(shape(operation["weight"]), 1, result, channel, "convolution")

    def forward(axes: Axes) -> Axes | None:
        spread = to_channels.forward(axes)
        if groups == 1 or spread is None:
            return spread
        # [groups] × [channels of one group], as one dimension again
        channels = Axes((*Axes.of((groups,), ()).dimensions, axes.dimensions[1])).reshape((result[channel],))
        if channels is None:
            raise Blocked(Reason.DIFFERENT_AXES, "the channels of a grouped convolution")
        dimensions = list(spread.dimensions)
        (dimensions[channel],) = channels.dimensions
        return Axes(tuple(dimensions))

    def backward(axes: Axes) -> Axes | None:
        _only(axes, channel, "convolution")
        if groups == 1:
            return to_channels.backward(axes)
        cut = Axes((axes.dimensions[channel],)).reshape((groups, per_group))
        if cut is None or not cut.is_free(0):
            raise Blocked(
                Reason.DIFFERENT_AXES, "a grouped convolution mixes only within a group, the norm goes across them"
            )
        dimensions = list(Axes.of(shape(operation["weight"]), ()).dimensions)
        dimensions[1] = cut.dimensions[1]
        return Axes(tuple(dimensions))

    carriers: dict[Key, AxisMap] = {("weight", None): AxisMap(forward, backward)}
    if operation["bias"] is not None:
        carriers["bias", None] = one_dimension(shape(operation["bias"]), 0, result, channel, "convolution")
    return [Linear(carriers)]


@linear_rule("any_convolution")
def any_convolution(operation: Operation) -> Sequence[Linear]:
    """A convolution or a transposed one, by its argument ``transposed``."""
    return transposed_convolution(operation) if operation["transposed"] else convolution(operation)


@linear_rule("embedding_bag")
def embedding_bag(operation: Operation) -> Sequence[Linear]:
    """``C Σ E[ids] = Σ (CE)[ids]`` for sums and means of rows; a maximum is not linear."""
    if operation["mode"] not in ("sum", "mean"):
        raise Blocked(Reason.NON_COMMUTING, "an embedding bag that takes the maximum")
    if operation["max_norm"] is not None:
        raise Blocked(Reason.MUTATION, "an embedding bag with max_norm rescales its table at each call")
    result = result_shape(operation)
    weight = shape(operation["weight"])
    return [Linear({("weight", None): one_dimension(weight, 1, result, len(result) - 1, "embedding_bag")})]


@linear_rule("multi_head_attention")
def multi_head_attention(operation: Operation) -> Sequence[Linear]:
    """``C(W_o a + b_o) = (CW_o)a + Cb_o``: the output projection is part of the operator.

    It returns (output, attention weights): A is carried on the pair as it stands on the output, see ``getitem``.
    """
    output = value_of(operation.node)[0]
    result = shape_of(output)
    carriers: dict[Key, AxisMap] = {}
    for name in ("out_proj_weight", "out_proj_bias"):
        if operation[name] is not None:
            carriers[name, None] = one_dimension(shape(operation[name]), 0, result, len(result) - 1, "attention")
    return [Linear(carriers)]
