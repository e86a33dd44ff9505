"""Which elements of a tensor are centered together: the set ``A`` of the theory, tracked through views.

``A`` starts as the trailing axes of a LayerNorm's input. Going up the graph it moves (permute), splits
(``[768] → [12, 64]``), merges, or becomes a part of a larger axis (per-head norms: ``[768] → 12 groups of 64``). All
of it is described by writing each dimension as a product of *factors*, outermost first, each of which is normalised
or free::

    [batch, sequence, 768], LayerNorm over 768        ((batch·F), (sequence·F), (768·N))
    [tokens, 12 * 64],      per-head norm over 64     ((tokens·F), (12·F, 64·N))
    [batch, 768, 14, 14],   channels of a ViT's stem  ((batch·F), (768·N), (14·F), (14·F))

Where only a part of a tensor feeds a norm (the queries in a joint projection of queries, keys and values) a factor also
says which of its indices are *chosen*; elsewhere the tensor stays as it is. What is centered is a product of choices::

    [tokens, 3 * 768],      LayerNorm of the first third      ((tokens·F), (3·F chosen 0, 768·N))
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lncompile.passes.graph.factors import Dimension, Factor, choosing, normal_form
from lncompile.passes.graph.sizes import Size, quotient, same_size


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
        return Axes(tuple(normal_form([Factor(size, index >= first)]) for index, size in enumerate(shape)))

    @staticmethod
    def of(shape: Sequence[Size], normalised: Iterable[int]) -> Axes:
        """``A`` = the given dimensions (non-negative) of a tensor of this shape."""
        chosen = set(normalised)
        return Axes(tuple(normal_form([Factor(size, index in chosen)]) for index, size in enumerate(shape)))

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
                    product = product * factor.count
        return product

    @property
    def partial(self) -> bool:
        """Whether only chosen parts of the tensor are centered."""
        return any(factor.chosen is not None for dimension in self.dimensions for factor in dimension)

    @property
    def whole(self) -> bool:
        """Whether ``A`` is a set of whole dimensions (no dimension is normalised in part)."""
        return not self.partial and all(
            len(dimension) <= 1 or not any(f.normalised for f in dimension) for dimension in self.dimensions
        )

    @property
    def can_be_unfolded(self) -> bool:
        """Whether a tensor's dimensions can be split into their factors: one at most may be of unknown size in each."""
        return all(
            len(dimension) <= 1 or sum(not isinstance(factor.size, int) for factor in dimension) <= 1
            for dimension in self.dimensions
        )

    def is_free(self, dimension: int) -> bool:
        """Whether ``A`` does not touch this dimension: nothing is centered along it, and nothing chosen."""
        return not any(factor.normalised or factor.chosen is not None for factor in self.dimensions[dimension])

    def chosen_indices(self, dimension: int) -> tuple[int, ...] | None:
        """Indices of a dimension at which anything is centered; None for all of them.

        Raises:
            Uncuttable: if a choice stands beside a factor of unknown size.
        """
        factors = self.dimensions[dimension]
        if all(factor.chosen is None for factor in factors):
            return None
        if not all(isinstance(factor.size, int) for factor in factors):
            raise Uncuttable
        indices = [0]
        for factor in factors:
            indices = [index * factor.size + own for index in indices for own in factor.indices]
        return tuple(indices)

    def overlaps(self, other: Axes) -> bool:
        """Whether both center some element of one tensor: not if their choices share no index in a dimension."""
        for dimension in range(self.rank):
            try:
                mine, theirs = self.chosen_indices(dimension), other.chosen_indices(dimension)
            except Uncuttable:
                continue  # they may meet
            if mine is not None and theirs is not None and not set(mine) & set(theirs):
                return False
        return True

    def cut(self, dimension: int, kept: range) -> Axes | None:
        """``A`` on the tensor that keeps these indices of a dimension only; None if nothing is centered there.

        A shift that is constant along ``A`` is constant along a part of ``A``: cut along the normalised axis itself,
        the part that is kept is the ``A`` of the shift that is left.

        Raises:
            Uncuttable: if what is left is not a product of factors.
        """
        if self.is_free(dimension):
            return self.with_free(dimension, len(kept))
        before = self.chosen_indices(dimension)
        if before is not None and not set(before) & set(kept):
            return None
        if kept.step > 1 and len(self.dimensions[dimension]) > 1:
            return self._every(dimension, kept)
        factor, inner, kept = self._cut_open(self.dimensions[dimension], kept)
        chosen = kept if factor.chosen is None else set(factor.chosen)
        left = [position for position, index in enumerate(kept) if index in chosen]
        if not left:
            return None
        if factor.normalised and len(left) == 1:
            raise Uncuttable  # a shift of one element is not a shift of a group
        return self._with(dimension, (choosing(len(kept), factor.normalised, left), *inner))

    def _every(self, dimension: int, kept: range) -> Axes | None:
        """``A`` on every second (third, ...) index of a dimension: ``[24] → [12, 2] → [12]``."""
        size = math.prod(factor.size for factor in self.dimensions[dimension])
        if size % kept.step or kept.start >= kept.step or len(kept) != size // kept.step:
            raise Uncuttable
        parts = Axes((self.dimensions[dimension],)).reshape((len(kept), kept.step))
        one = None if parts is None else parts.cut(1, range(kept.start, kept.start + 1))
        if one is None:
            raise Uncuttable
        return self._with(dimension, one.dimensions[0])

    def placed(self, dimension: int, size: int, kept: range) -> Axes:
        """The inverse of ``cut``: ``A`` on a tensor whose dimension has this size, chosen at the indices that are kept.

        Raises:
            Uncuttable: if that is not a product of factors.
        """
        factors = self.dimensions[dimension]
        if len(factors) > 1:
            width = math.gcd(size, kept.start, len(kept)) if kept.step == 1 else 0
            parts = Axes((factors,)).reshape((len(kept) // width, width)) if width else None
            if parts is None or len(parts.dimensions[0]) > 1:
                raise Uncuttable
            outer, inner = parts.dimensions
            kept = range(kept.start // width, kept.stop // width)
            size //= width
        else:
            outer, inner = factors, ()
        (factor,) = outer or (Factor(len(kept), False),)
        # Its size may be a formula; in numbers it is that of what is kept.
        chosen = range(len(kept)) if factor.chosen is None else factor.chosen
        return self._with(dimension, (choosing(size, factor.normalised, [kept[i] for i in chosen]), *inner))

    def _cut_open(self, factors: Dimension, kept: range) -> tuple[Factor, Dimension, range]:
        """A dimension as one factor along which it is cut, the factors inside of it, and the indices to keep of it."""
        if len(factors) == 1:
            return factors[0], (), kept
        size = math.prod(factor.size for factor in factors)
        width = math.gcd(size, kept.start, len(kept)) if kept.step == 1 and isinstance(size, int) else 0
        parts = Axes((factors,)).reshape((size // width, width)) if width else None
        if parts is None or len(parts.dimensions[0]) != 1:
            raise Uncuttable
        return parts.dimensions[0][0], parts.dimensions[1], range(kept.start // width, kept.stop // width)

    def _with(self, dimension: int, factors: Iterable[Factor]) -> Axes:
        dimensions = list(self.dimensions)
        dimensions[dimension] = normal_form(factors)
        return Axes(tuple(dimensions))

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
        dimensions[dimension] = normal_form([Factor(size, False)])
        return Axes(tuple(dimensions))

    def insert_free(self, dimension: int, size: Size = 1) -> Axes:
        """``A`` with a new free dimension before ``dimension``."""
        new = normal_form([Factor(size, False)])
        return Axes((*self.dimensions[:dimension], new, *self.dimensions[dimension:]))

    def remove(self, dimension: int) -> Axes:
        """``A`` without a dimension."""
        return Axes((*self.dimensions[:dimension], *self.dimensions[dimension + 1 :]))

    def reshape(self, shape: Sequence[Size]) -> Axes | None:
        """``A`` after ``tensor.reshape(shape)``, or None where it cannot be told or is not a product of factors.

        Reads both factorisations from the right, splitting a factor where the new shape has a boundary in it.
        """
        stack = list(normal_form(factor for dimension in self.dimensions for factor in dimension))
        if any(size == 0 for size in shape) or any(factor.size == 0 for factor in stack):
            return None
        reversed_dimensions: list[Dimension] = []
        for size in reversed(shape):
            if not any(factor.normalised or factor.chosen is not None for factor in stack):
                # Only free elements are left: however they are cut, they stay free.
                reversed_dimensions.append(normal_form([Factor(size, False)]))
                continue
            factors: list[Factor] = []
            needed = size
            while needed != 1:
                if not stack:
                    return None
                top = stack.pop()
                if top.size == needed:
                    factors.append(top)
                    needed = 1
                elif (parts := top.split(needed)) is not None:
                    factors.append(parts[1])
                    if parts[0].size != 1:
                        stack.append(parts[0])
                    needed = 1
                elif (rest := quotient(needed, top.size)) is not None:
                    factors.append(top)
                    needed = rest
                else:
                    return None
            reversed_dimensions.append(normal_form(reversed(factors)))
        if any(factor.normalised or factor.chosen is not None for factor in stack):
            return None
        return Axes(tuple(reversed(reversed_dimensions)))

    def broadcast_operand(self, shape: Sequence[Size]) -> Axes | None:
        """``A`` on an operand of this shape that broadcasts to the tensor, or None if it does not vary along ``A``.

        The operand's dimensions line up with the tensor's last ones. If it has size 1 along a part of ``A`` only, it
        is neither constant along ``A`` nor centered by ``A``, and neither is one that does not tell chosen parts from
        others: raises :class:`PartlyConstant`.
        """
        aligned = self.dimensions[self.rank - len(shape) :]
        dimensions: list[Dimension] = []
        for dimension, size in zip(aligned, shape, strict=True):
            dimensions.append(() if size == 1 else dimension)
        operand = Axes(tuple(dimensions))
        if not operand.normalised_dimensions and (self.normalised_dimensions or not self.partial):
            return None
        if not same_size(operand.count, self.count) or operand._choices() != self._choices():
            raise PartlyConstant
        return operand

    def _choices(self) -> list[Factor]:
        return [factor for dimension in self.dimensions for factor in dimension if factor.chosen is not None]

    def __str__(self) -> str:
        """Short form for messages: ``[·, ·, 768]``; a dimension normalised in part reads ``12×(64)``."""
        words = []
        for dimension in self.dimensions:
            if not any(factor.normalised for factor in dimension):
                words.append("·")
            else:
                words.append("×".join(str(f.size) if f.normalised or len(dimension) == 1 else "·" for f in dimension))
        return f"[{', '.join(words)}]"


class Uncuttable(Exception):
    """A cut leaves a part of ``A`` that is not a product of factors."""


class PartlyConstant(Exception):
    """An operand broadcasts along a part of ``A`` only."""
