"""Pointwise operations: sums, scalings, casts, masks. ``C`` is linear, and these are too, element by element."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.graph.operands import other_operands, result_shape, shape
from lncompile.passes.rules.base import SAME, AxisMap, Linear, aligned, linear_rule


def _broadcast(operation: Operation, parameter: str) -> AxisMap:
    return aligned(shape(operation[parameter]), result_shape(operation))


@linear_rule("add", "sub", "rsub")
def addition(operation: Operation) -> Sequence[Linear]:
    """``C(x ± αy) = Cx ± αCy``. An operand that broadcasts along A, a scalar too, centers to zero."""
    return [Linear({(name, None): _broadcast(operation, name) for name in ("input", "other")})]


@linear_rule("neg", "identity")
def negation(operation: Operation) -> Sequence[Linear]:
    """``C(-x) = -Cx``."""
    return [Linear({("input", None): SAME})]


@linear_rule("mul")
def multiplication(operation: Operation) -> Sequence[Linear]:
    """``C(s ⊙ x) = s ⊙ Cx`` for s constant along A: scalars, per-token gates, masks, routing weights."""
    maps = {name: _broadcast(operation, name) for name in ("input", "other")}
    return [
        Linear({(carrier, None): maps[carrier]}, {(constant, None): maps[constant]})
        for carrier, constant in (("input", "other"), ("other", "input"))
        if shape(operation[carrier])
    ]


@linear_rule("div")
def division(operation: Operation) -> Sequence[Linear]:
    """``C(x / s) = Cx / s`` for s constant along A. Rounding division is not linear."""
    if operation["rounding_mode"] is not None:
        raise Blocked(Reason.NON_COMMUTING, "a division that rounds is not linear")
    dividend, divisor = _broadcast(operation, "input"), _broadcast(operation, "other")
    return [Linear({("input", None): dividend}, {("other", None): divisor})]


@linear_rule("cast", "to", "type_as")
def cast(operation: Operation) -> Sequence[Linear]:
    """``C(cast(x)) = cast(Cx)``, up to the rounding that the cast makes anyway. Copies and detach are casts to self."""
    return [Linear({("input", None): SAME}, metadata=other_operands(operation, "input"))]


@linear_rule("dropout")
def dropout(operation: Operation) -> Sequence[Linear]:
    """In evaluation dropout is the identity. In training it zeroes element by element along A: it does not commute."""
    if operation["training"] is not False and operation["probability"] != 0:
        raise Blocked(Reason.NON_COMMUTING, "dropout in training mode drops single features")
    return [Linear({("input", None): SAME})]


@linear_rule("where")
def where(operation: Operation) -> Sequence[Linear]:
    """``C where(m, x, y) = where(m, Cx, Cy)`` for a mask m that is constant along A."""
    return [
        Linear(
            {(name, None): _broadcast(operation, name) for name in ("input", "other")},
            {("condition", None): _broadcast(operation, "condition")},
        )
    ]


@linear_rule("lerp")
def interpolation_between(operation: Operation) -> Sequence[Linear]:
    """``C(x + w(y - x)) = Cx + w(Cy - Cx)`` for a weight w that is constant along A."""
    return [
        Linear(
            {(name, None): _broadcast(operation, name) for name in ("input", "end")},
            {("weight", None): _broadcast(operation, "weight")},
        )
    ]


@linear_rule("masked_fill")
def masked_fill(operation: Operation) -> Sequence[Linear]:
    """``C fill(x, m, c) = fill(Cx, m, 0)`` for a mask constant along A and a finite c: C takes a constant to zero."""
    value = operation["value"]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise Blocked(Reason.NON_COMMUTING, "masked_fill fills with a value that is not a finite number")
    return [
        Linear(
            {("input", None): _broadcast(operation, "input"), ("value", None): aligned((), result_shape(operation))},
            {("mask", None): _broadcast(operation, "mask")},
        )
    ]


def _row_of_channels(axes: Axes) -> None:
    """A row of channels is constant along an A that does not touch the channels, dimension 1."""
    if not axes.is_free(1):
        raise Blocked(Reason.VARYING_SCALE, "a batch norm scales each channel of the normalised axes by its own number")


def _no_stream(axes: Axes) -> Axes:
    raise Blocked(Reason.VISIBLE, "a batch norm uses it as a statistic or parameter")


@linear_rule("batch_norm")
def batch_norm(operation: Operation) -> Sequence[Linear]:
    """``C(s ⊙ x + t) = s ⊙ Cx``: in evaluation a batch norm is a scale and a shift of channels, here constant along A.

    With ``s = γ / sqrt(var + ε)`` and ``t = β - s ⊙ mean``, both of which center to zero off the channels. Over the
    channels themselves it may be composed into what makes them, see ``composed_sources``.
    """
    if operation["training"] is not False:
        raise Blocked(Reason.NON_COMMUTING, "a batch norm in training mode takes its statistics from the batch")
    row = AxisMap(_no_stream, _row_of_channels)
    shifts: dict[Key, AxisMap] = {(name, None): row for name in ("running_mean", "bias")}
    scales: dict[Key, AxisMap] = {(name, None): row for name in ("weight", "running_var")}
    return [Linear({("input", None): SAME, **shifts}, scales)]
