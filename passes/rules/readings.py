"""Reading one operation by one of its rules: what it needs to put out a centered tensor, what a shift does to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation
from lncompile.passes.graph.operands import is_constant_along
from lncompile.passes.rules.base import Linear


@dataclass(frozen=True)
class Resolved:
    """One operation read as linear at given axes of its result."""

    needs: Mapping[fx.Node, Axes]
    zeros: tuple[Key, ...]


def resolve_reading(operation: Operation, reading: Linear, axes: Axes) -> Resolved:
    """Return what one reading of an operation needs so that its result is centered along ``axes``. Raises Blocked."""
    _require_constants(operation, reading, axes)
    needs: dict[fx.Node, Axes] = {}
    zeros: list[Key] = []
    for key, map_ in reading.carriers.items():
        operand = _argument(operation, key)
        if operand is None:
            continue
        operand_axes = map_.backward(axes)
        if operand_axes is None:
            if axes.partial:
                sentence = f"'{operation.name}' adds to all of a tensor of which a part is centered"
                raise Blocked(Reason.DIFFERENT_AXES, sentence)
            zeros.append(key)
        elif needs.setdefault(operand, operand_axes) != operand_axes:
            raise Blocked(Reason.DIFFERENT_AXES, "one tensor stands in two places with different axes")
    for key, operand in operation.operands():
        # A carrier that is also read raw in another place (x * x, linear(w, w)) is not linear in it.
        if operand in needs and key not in reading.carriers and key not in reading.metadata:
            raise Blocked(Reason.NON_COMMUTING, f"'{operation.name}' reads one tensor twice, which is not linear")
        if operand in needs and key in zeros:
            raise Blocked(Reason.NON_COMMUTING, f"'{operation.name}' reads one tensor in two ways")
    return Resolved(needs, tuple(zeros))


def follow_reading(operation: Operation, reading: Linear, keys: Sequence[Key], axes: Axes) -> Axes | None:
    """Return along what the result is shifted if the operands at ``keys`` are; None if it is not. Raises Blocked."""
    if all(key in reading.metadata for key in keys):
        return None
    if any(key not in reading.carriers for key in keys if key not in reading.metadata):
        # A carrier that is also read raw in another place (x * x, linear(w, w)): the operation is not linear in it.
        raise Blocked(Reason.NON_COMMUTING, f"'{operation.name}' reads one tensor twice, which is not linear")
    results = {reading.carriers[key].forward(axes) for key in keys if key in reading.carriers}
    if len(results) > 1:
        raise Blocked(Reason.DIFFERENT_AXES, "one tensor stands in two places with different axes")
    result = results.pop()
    if result is not None:
        _require_constants(operation, reading, result)
    return result


def follow_readings(
    operation: Operation, readings: Iterable[Linear], keys: Sequence[Key], axes: Axes
) -> Iterator[Axes | None]:
    """Yield what :func:`follow_reading` returns, for each reading that is not blocked.

    Raises:
        Blocked: at the end, as the first blocked reading was, if there was one.
    """
    problem: Blocked | None = None
    for reading in readings:
        try:
            result = follow_reading(operation, reading, keys, axes)
        except Blocked as blocked:
            problem = problem or blocked
            continue
        yield result
    if problem is not None:
        raise problem


def _require_constants(operation: Operation, reading: Linear, axes: Axes) -> None:
    for key, map_ in reading.constants.items():
        constant = _argument(operation, key)
        if not isinstance(constant, fx.Node):
            continue
        varying = map_.backward(axes)
        if varying is not None and not is_constant_along(constant, varying):
            raise Blocked(Reason.VARYING_SCALE, f"'{operation.name}' by a tensor that varies along the normalised axes")


def _argument(operation: Operation, key: Key) -> Any:
    name, index = key
    return operation[name] if index is None else operation[name][index]
