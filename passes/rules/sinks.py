"""Operations that do not notice a shift along A, and results whose mean along A is zero already."""

from __future__ import annotations

from lncompile.passes.axes import Axes
from lncompile.passes.canonical import Key, Operation
from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.rules.base import dimension_of, invariant, shape, zero_mean


@invariant("layer_norm", "native_layer_norm")
def layer_norm(operation: Operation, key: Key, axes: Axes) -> None:
    """``LN(Cx) = LN(x)`` when it normalises over exactly A, folded or not."""
    if key != ("input", None):
        raise Blocked(Reason.VISIBLE, "a layer norm uses it as its weight or bias")
    if axes != Axes.trailing(shape(operation["input"]), len(operation["normalized_shape"])):
        raise Blocked(Reason.DIFFERENT_AXES, f"a layer norm normalises other axes than {axes}")
    if operation.name == "native_layer_norm" and any(
        user.args[1] == 1 for user in operation.node.users if len(user.args) > 1
    ):
        raise Blocked(Reason.VISIBLE, "the mean that native_layer_norm returns is used")


@invariant("softmax", "log_softmax")
def softmax(operation: Operation, key: Key, axes: Axes) -> None:
    """``softmax(x + c) = softmax(x)`` for c constant along exactly the softmax's axis."""
    rank = len(shape(operation["input"]))
    if key != ("input", None) or operation["dim"] is None:
        raise Blocked(Reason.VISIBLE, f"{operation.name} reads it")
    if not axes.whole or axes.normalised_dimensions != (dimension_of(operation["dim"], rank),):
        raise Blocked(Reason.DIFFERENT_AXES, f"{operation.name} runs over another axis than {axes}")


@invariant("metadata")
def metadata(operation: Operation, key: Key, axes: Axes) -> None:
    """Reads of shape, dtype or device see no values at all."""


@zero_mean("layer_norm")
def plain_layer_norm(operation: Operation) -> Axes | None:
    """A LayerNorm without weight and bias puts out zero mean over its axes: ``C LN(x) = LN(x)``."""
    if operation["weight"] is None and operation["bias"] is None:
        return Axes.trailing(shape(operation["input"]), len(operation["normalized_shape"]))
    return None
