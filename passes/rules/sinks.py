"""Operations that do not notice a shift along A, and results whose mean along A is zero already."""

from __future__ import annotations

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise
from lncompile.passes.graph.operands import WRITTEN, dimension_of, shape
from lncompile.passes.norms.calls import mean_is_read, normalised_axes
from lncompile.passes.norms.differences import difference_of, serves_only_the_variance, uses_of_mean
from lncompile.passes.norms.moments import reduction
from lncompile.passes.norms.totals import summed
from lncompile.passes.rules.base import invariant, zero_mean


@invariant("layer_norm", "native_layer_norm", "group_norm", "native_group_norm")
def normalisation(operation: Operation, key: Key, axes: Axes) -> bool:
    """``LN(Cx) = LN(x)`` when it normalises over exactly A, folded or not; group norm likewise, pixels and all."""
    if key != ("input", None):
        raise Blocked(Reason.VISIBLE, f"a {_in_words(operation)} uses it as its weight or bias")
    if axes != normalised_axes(operation):
        raise Blocked(Reason.DIFFERENT_AXES, f"a {_in_words(operation)} normalises other axes than {axes}")
    if mean_is_read(operation):
        raise Blocked(Reason.VISIBLE, f"the mean that {operation.name} returns is used")
    return True


def _in_words(operation: Operation) -> str:
    return operation.name.removeprefix("native_").replace("_", " ")


@invariant("softmax", "log_softmax")
def softmax(operation: Operation, key: Key, axes: Axes) -> bool:
    """``softmax(x + c) = softmax(x)`` for c constant along exactly the softmax's axis."""
    rank = len(shape(operation["input"]))
    if key != ("input", None) or operation["dim"] is None:
        raise Blocked(Reason.VISIBLE, f"{operation.name} reads it")
    if not axes.whole or axes.normalised_dimensions != (dimension_of(operation["dim"], rank),):
        raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} runs over another axis than {axes}")
    return True


@invariant("cross_entropy")
def cross_entropy(operation: Operation, key: Key, axes: Axes) -> bool:
    """``log softmax(x + c) = log softmax(x)`` for c constant along exactly the classes, dimension 1 or the only."""
    if key != ("input", None):
        raise Blocked(Reason.VISIBLE, "a cross entropy reads it as its target or weight")
    classes = 1 if len(shape(operation["input"])) > 1 else 0
    if not axes.whole or axes.normalised_dimensions != (classes,):
        raise Blocked(Reason.DIFFERENT_AXES, f"a cross entropy runs over another axis than {axes}")
    return True


@invariant("metadata", "zeros")
def metadata(operation: Operation, key: Key, axes: Axes) -> bool:
    """Reads of shape, dtype or device see no values at all."""
    return True


@invariant("getitem")
def other_result(operation: Operation, key: Key, axes: Axes) -> bool:
    """Attention's second result, its weights, does not depend on the output projection that is centered."""
    origin = canonicalise(operation["input"])
    return origin is not None and origin.name == "multi_head_attention" and operation["index"] != 0


@invariant("mean", "sum", "matmul", "linear", "einsum", "average_pool_1d")
def mean(operation: Operation, key: Key, axes: Axes) -> bool:
    """``(x + c) - mean_A(x + c) = x - mean_A(x)``: a mean over exactly A of which only that difference is taken."""
    total = summed(operation)
    if total is None or total.key != key or total.moment.axes != axes:
        return False
    uses = uses_of_mean(operation.node)
    return uses is not None and uses.other is None


@invariant("sub", "add", "rsub")
def difference(operation: Operation, key: Key, axes: Axes) -> bool:
    """The other half of the difference from the mean."""
    taken = difference_of(operation)
    return taken is not None and taken.moment.axes == axes and key == taken.source


@invariant("mul", "pow", "square")
def square_for_a_variance(operation: Operation, key: Key, axes: Axes) -> bool:
    """``E[(x + c)²] - E[x + c]² = E[x²] - E[x]²`` over exactly A, where nothing else reads the square."""
    return serves_only_the_variance(operation.node, (operation[key[0]], axes))


@invariant("var", "std", "var_mean", "std_mean")
def variance(operation: Operation, key: Key, axes: Axes) -> bool:
    """``var_A(x + c) = var_A(x)`` over exactly A, whatever the correction; a mean beside it as in ``mean``."""
    moment = reduction(operation)
    if moment is None or moment.axes != axes:
        raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} runs over other axes than {axes}")
    uses = uses_of_mean(operation.node) if operation.name in ("var_mean", "std_mean") else None
    if operation.name in ("var_mean", "std_mean") and (uses is None or uses.other is not None):
        raise Blocked(Reason.VISIBLE, f"the mean that {operation.name} returns is used")
    return True


@zero_mean("sub", "add", "rsub")
def centered_difference(operation: Operation, axes: Axes) -> bool:
    """``x - mean_A(x)`` has zero mean over A."""
    if any(node.meta.get(WRITTEN) for _, node in operation.operands()):
        return False  # between the mean and the difference one of them may have changed
    taken = difference_of(operation)
    return taken is not None and taken.moment.axes == axes


@zero_mean("layer_norm", "group_norm")
def plain_normalisation(operation: Operation, axes: Axes) -> bool:
    """A norm without weight and bias puts out zero mean over its axes: ``C LN(x) = LN(x)``."""
    if operation["weight"] is not None or operation["bias"] is not None:
        return False
    try:
        return axes == normalised_axes(operation)
    except Blocked:
        return False


@zero_mean("zeros")
def zeros(operation: Operation, axes: Axes) -> bool:
    """``C 0 = 0`` over any axes: the queries of DETR start as zeros."""
    return True
