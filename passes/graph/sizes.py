"""Sizes of dimensions: numbers, or formulas where a dimension is dynamic, compared without adding a guard."""

from __future__ import annotations

from typing import Any

import sympy

from lncompile.lowering import torch_private

# An int, or a sympy expression where a dimension is dynamic. (sympy is untyped.)
Size = Any


def size_of(dimension: Any) -> Size:
    """Return a tensor dimension (int or SymInt) as an int or a sympy expression, without adding a guard."""
    if isinstance(dimension, int):
        return dimension
    expression = torch_private.symbolic_expression(dimension)
    return int(expression) if expression.is_Integer else expression


def shape_of(value: Any) -> tuple[Size, ...]:
    """Return the shape of a (fake) tensor as a tuple of ints and sympy expressions."""
    return tuple(size_of(dimension) for dimension in value.shape)


def same_size(left: Size, right: Size) -> bool:
    """Whether two sizes are provably equal."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    return bool(sympy.simplify(left - right) == 0)


def quotient(dividend: Size, divisor: Size) -> Size | None:
    """Return ``dividend / divisor`` if it is provably a whole number, else None."""
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor if divisor and dividend % divisor == 0 else None
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(dividend) / divisor))
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator
