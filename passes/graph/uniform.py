"""Tensors made in the graph all of whose elements are one known number: ``torch.full((D, 1), 1 / D)``.

A buffer or parameter of ones is not one of them: it may be overwritten after the graph was compiled.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import fx

from lncompile.passes.graph.canonical import canonicalise, tensor_of, value_of
from lncompile.passes.graph.operands import WRITTEN
from lncompile.passes.graph.sizes import Size, same_size, size_of
from lncompile.passes.graph.spellings import aten
from lncompile.passes.graph.traits import VIEWS, Trait, has

#: A number as the author means it: exact, or a formula in the dynamic sizes of the graph.
Number = Any

# What fills a tensor, with the position of the number it is filled with; None for ones.
_FILLERS: dict[Any, int | None] = {
    torch.ones: None, torch.ones_like: None, aten.ones.default: None, aten.ones_like.default: None, "new_ones": None,
    torch.full: 1, torch.full_like: 1, aten.full.default: 1, aten.full_like.default: 1, "new_full": 2,
}  # fmt: skip
# What hands on a number that all elements have.
_MOVES = VIEWS | Trait.CUTS | Trait.PASSES


def number(argument: object) -> Number | None:
    """Read an argument as a number: a Python number, or the node of a size. None for anything else.

    A float that is the nearest one to ``1/k`` for a whole ``k`` means ``1/k``.

    Example:
        >>> number(1 / 12)
        Fraction(1, 12)
    """
    value = value_of(argument) if isinstance(argument, fx.Node) else argument
    if isinstance(value, bool):
        return None
    if isinstance(value, int | torch.SymInt):
        size = size_of(value)
        return Fraction(size) if isinstance(size, int) else size
    if not isinstance(value, float) or not math.isfinite(value):
        return None
    denominator = round(1 / value) if abs(value) > 1e-300 else 0
    return Fraction(1, denominator) if denominator and 1 / denominator == value else Fraction(value)


def times(left: Number, right: Number) -> Number:
    """The product of two numbers."""
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left * right
    return _formula(left) * _formula(right)


def inverse(value: Number) -> Number | None:
    """``1 / value``; None for zero."""
    if isinstance(value, Fraction):
        return 1 / value if value else None
    return 1 / value


def cancels(factor: Number, count: Size) -> bool:
    """Whether ``factor · count = 1``, provably."""
    if isinstance(factor, Fraction) and isinstance(count, int):
        return factor * count == 1
    return same_size(_formula(factor) * count, 1)


def _formula(value: Number) -> Any:
    return sympy.Rational(value.numerator, value.denominator) if isinstance(value, Fraction) else value


def uniform_value(node: object) -> Number | None:
    """The number that every element of a tensor is, where the graph itself makes the tensor; else None.

    Args:
        node: an operand.
    """
    factor: Number = Fraction(1)
    while isinstance(node, fx.Node) and not node.meta.get(WRITTEN):
        tensor = tensor_of(node)
        if tensor is None or not tensor.is_floating_point():
            return None
        if node.op in ("call_function", "call_method") and node.target in _FILLERS:
            filled = _filled_with(node, _FILLERS[node.target])
            return None if filled is None else times(factor, filled)
        operation = canonicalise(node)
        if operation is None or operation.in_place:
            return None
        node = operation.arguments.get("input")
        if has(operation, _MOVES):
            continue
        if operation.name not in ("mul", "div"):
            return None
        scale = number(operation["other"])
        if operation.name == "div" and scale is not None:
            scale = inverse(scale) if operation["rounding_mode"] is None else None
        if scale is None:
            return None
        factor = times(factor, scale)
    return None


def _filled_with(node: fx.Node, position: int | None) -> Number | None:
    if position is None:
        return Fraction(1)
    keywords = [node.kwargs[name] for name in ("fill_value", "value") if name in node.kwargs]
    given = node.args[position] if len(node.args) > position else next(iter(keywords), None)
    return number(given)
