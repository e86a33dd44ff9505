"""Which elements of a tensor are centered together: the set ``A`` of the theory, tracked through views.

``A`` starts as the trailing axes of a LayerNorm's input. Going up the graph it moves (permute), splits
(``[768] → [12, 64]``), merges, or becomes a part of a larger axis (per-head norms: ``[768] → 12 groups of 64``). All
of it is described by writing each dimension as a product of *factors*, outermost first, each of which is normalised
or free::

    [batch, sequence, 768], LayerNorm over 768        ((batch·F), (sequence·F), (768·N))
    [tokens, 12 * 64],      per-head norm over 64     ((tokens·F), (12·F, 64·N))
    [batch, 768, 14, 14],   channels of a ViT's stem  ((batch·F), (768·N), (14·F), (14·F))
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


def _quotient(dividend: Size, divisor: Size) -> Size | None:
    """Return ``dividend / divisor`` if it is provably a whole number, else None."""
    if isinstance(dividend, int) and isinstance(divisor, int):
        return dividend // divisor if divisor and dividend % divisor == 0 else None
    numerator, denominator = sympy.fraction(sympy.cancel(sympy.sympify(dividend) / divisor))
    if denominator != 1:
        return None
    return int(numerator) if numerator.is_Integer else numerator


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension: its size, and whether the elements along it are centered together."""

    size: Size
    normalised: bool


Dimension = tuple[Factor, ...]


def _merge(factors: Iterable[Factor]) -> Dimension:
    """Normal form: no factors of size 1, no two neighbours of one kind."""
    merged: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        if merged and merged[-1].normalised == factor.normalised:
            merged[-1] = Factor(merged[-1].size * factor.size, factor.normalised)
        else:
            merged.append(factor)
    return tuple(merged)


@dataclass(frozen=True)
class Axes:
    """The set ``A`` on one tensor: for each dimension its factors, normalised or free. Hashable, in normal form.

    Example:
        >>> axes = Axes.trailing((2, 5, 768), 1)
        >>> axes.reshape((10, 12, 64)).normalised_dimensions
        (1, 2)
    """

    dimensions: tuple[Dimension, ...]

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.dimensions)

    def __hash__(self) -> int:
        # Axes are half of the keys of everything that follows; their hash is asked for again and again.
        return self._hash

    @staticmethod
    def trailing(shape: Sequence[Size], count: int) -> Axes:
        """``A`` = the last ``count`` dimensions of a tensor of this shape."""
        first = len(shape) - count
        return Axes(tuple(_merge([Factor(size, index >= first)]) for index, size in enumerate(shape)))

    @staticmethod
    def of(shape: Sequence[Size], normalised: Iterable[int]) -> Axes:
        """``A`` = the given dimensions (non-negative) of a tensor of this shape."""
        chosen = set(normalised)
        return Axes(tuple(_merge([Factor(size, index in chosen)]) for index, size in enumerate(shape)))

    @property
    def rank(self) -> int:
        """Number of dimensions of the tensor."""
        return len(self.dimensions)

    @property
    def normalised_dimensions(self) -> tuple[int, ...]:
        """The dimensions that ``A`` touches, wholly or in part."""
        return tuple(i for i, d in enumerate(self.dimensions) if any(f.normalised for f in d))

    @property
    def count(self) -> Size:
        """Number of elements centered together: ``d`` of the theory."""
        product: Size = 1
        for dimension in self.dimensions:
            for factor in dimension:
                if factor.normalised:
                    product = product * factor.size
        return product

    @property
    def whole(self) -> bool:
        """Whether ``A`` is a set of whole dimensions (no dimension is normalised in part)."""
        return all(len(dimension) <= 1 or not any(f.normalised for f in dimension) for dimension in self.dimensions)

    def is_free(self, dimension: int) -> bool:
        """Whether ``A`` does not touch this dimension."""
        return not any(factor.normalised for factor in self.dimensions[dimension])

    def permute(self, order: Sequence[int]) -> Axes:
        """``A`` after ``tensor.permute(order)``."""
        return Axes(tuple(self.dimensions[index] for index in order))

    def inverse_permute(self, order: Sequence[int]) -> Axes:
        """``A`` before ``tensor.permute(order)``."""
        dimensions: list[Dimension] = [()] * self.rank
        for position, index in enumerate(order):
            dimensions[index] = self.dimensions[position]
        return Axes(tuple(dimensions))

    def with_free(self, dimension: int, size: Size) -> Axes:
        """``A`` with a (free) dimension of another size, as a slice, cat or gather along it makes."""
        dimensions = list(self.dimensions)
        dimensions[dimension] = _merge([Factor(size, False)])
        return Axes(tuple(dimensions))

    def insert_free(self, dimension: int, size: Size = 1) -> Axes:
        """``A`` with a new free dimension before ``dimension``."""
        new = _merge([Factor(size, False)])
        return Axes((*self.dimensions[:dimension], new, *self.dimensions[dimension:]))

    def remove(self, dimension: int) -> Axes:
        """``A`` without a dimension."""
        return Axes((*self.dimensions[:dimension], *self.dimensions[dimension + 1 :]))

    def reshape(self, shape: Sequence[Size]) -> Axes | None:
        """``A`` after ``tensor.reshape(shape)``, or None where it cannot be told or is no product of factors.

        Reads both factorisations from the right, splitting a factor where the new shape has a boundary in it.
        """
        stack = list(_merge(factor for dimension in self.dimensions for factor in dimension))
        if any(size == 0 for size in shape) or any(factor.size == 0 for factor in stack):
            return None
        reversed_dimensions: list[Dimension] = []
        for size in reversed(shape):
            if not any(factor.normalised for factor in stack):
                # Only free elements are left: however they are cut, they stay free.
                reversed_dimensions.append(_merge([Factor(size, False)]))
                continue
            factors: list[Factor] = []
            needed = size
            while needed != 1:
                if not stack:
                    return None
                top = stack.pop()
                if (rest := _quotient(top.size, needed)) is not None:
                    factors.append(Factor(needed, top.normalised))
                    if rest != 1:
                        stack.append(Factor(rest, top.normalised))
                    needed = 1
                elif (rest := _quotient(needed, top.size)) is not None:
                    factors.append(top)
                    needed = rest
                else:
                    return None
            reversed_dimensions.append(_merge(reversed(factors)))
        if any(factor.normalised for factor in stack):
            return None
        return Axes(tuple(reversed(reversed_dimensions)))

    def broadcast_operand(self, shape: Sequence[Size]) -> Axes | None:
        """``A`` on an operand of this shape that broadcasts to the tensor, or None if it does not vary along ``A``.

        The operand's dimensions line up with the tensor's last ones. If it has size 1 along a part of ``A`` only, it
        is neither constant along ``A`` nor centered by ``A``: raises :class:`PartlyConstant`.
        """
        aligned = self.dimensions[self.rank - len(shape) :]
        dimensions: list[Dimension] = []
        for dimension, size in zip(aligned, shape, strict=True):
            dimensions.append(() if size == 1 else dimension)
        operand = Axes(tuple(dimensions))
        if not operand.normalised_dimensions:
            return None
        if not same_size(operand.count, self.count):
            raise PartlyConstant
        return operand

    def __str__(self) -> str:
        """Short form for messages: ``[·, ·, 768]``; a dimension normalised in part reads ``12×(64)``."""
        words = []
        for dimension in self.dimensions:
            if not any(factor.normalised for factor in dimension):
                words.append("·")
            else:
                words.append("×".join(str(f.size) if f.normalised or len(dimension) == 1 else "·" for f in dimension))
        return f"[{', '.join(words)}]"


class PartlyConstant(Exception):
    """An operand broadcasts along a part of ``A`` only."""
