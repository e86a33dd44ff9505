"""Operations that do not notice a shift along A, and results whose mean along A is zero already."""

from __future__ import annotations

from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Key, Operation, canonicalise
from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.handwritten import difference_from_mean, mean_of
from lncompile.passes.operands import WRITTEN, dimension_of, dimensions_of, shape
from lncompile.passes.rules.base import invariant, zero_mean


@invariant("layer_norm", "native_layer_norm")
def layer_norm(operation: Operation, key: Key, axes: Axes) -> bool:
    """``LN(Cx) = LN(x)`` when it normalises over exactly A, folded or not."""
    if key != ("input", None):
        raise Blocked(Reason.VISIBLE, "a layer norm uses it as its weight or bias")
    if axes != Axes.trailing(shape(operation["input"]), len(operation["normalized_shape"])):
        raise Blocked(Reason.DIFFERENT_AXES, f"a layer norm normalises other axes than {axes}")
    if operation.name == "native_layer_norm" and any(
        user.args[1] == 1 for user in operation.node.users if len(user.args) > 1
    ):
        raise Blocked(Reason.VISIBLE, "the mean that native_layer_norm returns is used")
    return True


@invariant("softmax", "log_softmax")
def softmax(operation: Operation, key: Key, axes: Axes) -> bool:
    """``softmax(x + c) = softmax(x)`` for c constant along exactly the softmax's axis."""
    rank = len(shape(operation["input"]))
    if key != ("input", None) or operation["dim"] is None:
        raise Blocked(Reason.VISIBLE, f"{operation.name} reads it")
    if not axes.whole or axes.normalised_dimensions != (dimension_of(operation["dim"], rank),):
        raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} runs over another axis than {axes}")
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


@invariant("mean")
def mean(operation: Operation, key: Key, axes: Axes) -> bool:
    """``(x + c) - mean_A(x + c) = x - mean_A(x)``: a mean over exactly A of which only that difference is taken."""
    taken = mean_of(operation.node)
    if taken is None or taken[1] != axes or taken[0].meta.get(WRITTEN):
        return False
    differences = [canonicalise(user) for user in operation.node.users]
    return all(d is not None and not d.in_place and difference_from_mean(d) == taken for d in differences)


@invariant("sub")
def difference(operation: Operation, key: Key, axes: Axes) -> bool:
    """The other half of the difference from the mean."""
    taken = difference_from_mean(operation)
    return taken is not None and taken[1] == axes and not operation.in_place


@invariant("var", "std")
def variance(operation: Operation, key: Key, axes: Axes) -> bool:
    """``var_A(x + c) = var_A(x)`` over exactly A, whatever the correction."""
    if operation["dim"] is not None:
        sizes = shape(operation["input"])
        if Axes.of(sizes, dimensions_of(operation["dim"], len(sizes))) == axes:
            return True
    raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} runs over other axes than {axes}")


@zero_mean("sub")
def centered_difference(operation: Operation, axes: Axes) -> bool:
    """``x - mean_A(x)`` has zero mean over A."""
    if any(node.meta.get(WRITTEN) for _, node in operation.operands()):
        return False  # between the mean and the difference one of them may have changed
    taken = difference_from_mean(operation)
    return taken is not None and not operation.in_place and taken[1] == axes


@zero_mean("layer_norm")
def plain_layer_norm(operation: Operation, axes: Axes) -> bool:
    """A LayerNorm without weight and bias puts out zero mean over its axes: ``C LN(x) = LN(x)``."""
    if operation["weight"] is not None or operation["bias"] is not None:
        return False
    return axes == Axes.trailing(shape(operation["input"]), len(operation["normalized_shape"]))


@zero_mean("zeros")
def zeros(operation: Operation, axes: Axes) -> bool:
    """``C 0 = 0`` over any axes: the queries of DETR start as zeros."""
    return True
