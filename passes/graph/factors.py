"""Factors of a dimension: products of sizes, each of which is normalised or free, and chosen wholly or in part.

They are what :mod:`.axes` describes the set ``A`` with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lncompile.passes.graph.sizes import Size, quotient


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension: its size, whether the elements along it are centered together, and which are at all.

    ``chosen`` are the indices at which anything is centered, in order; None stands for all of them.
    """

    size: Size
    normalised: bool
    chosen: tuple[int, ...] | None = None

    @property
    def count(self) -> Size:
        """How many of its indices are centered."""
        return self.size if self.chosen is None else len(self.chosen)

    @property
    def indices(self) -> range | tuple[int, ...]:
        """The chosen indices of a factor of known size."""
        return range(self.size) if self.chosen is None else self.chosen

    def split(self, inner: int) -> tuple[Factor, Factor] | None:
        """The factor as an outer and an inner one of this size; None if what is chosen is not a product of choices."""
        outer = quotient(self.size, inner)
        if outer is None:
            return None
        if self.chosen is None:
            return Factor(outer, self.normalised), Factor(inner, self.normalised)
        outer_indices = sorted({index // inner for index in self.chosen})
        inner_indices = sorted({index % inner for index in self.chosen})
        if len(outer_indices) * len(inner_indices) != len(self.chosen):
            return None
        return choosing(outer, self.normalised, outer_indices), choosing(inner, self.normalised, inner_indices)


Dimension = tuple[Factor, ...]


def choosing(size: int, normalised: bool, chosen: Sequence[int]) -> Factor:
    """A factor with these indices chosen. All of them are not a choice; one alone has nothing to be centered with."""
    if len(chosen) == size:
        return Factor(size, normalised)
    return Factor(size, normalised and len(chosen) > 1, tuple(chosen))


def _reduced(factor: Factor) -> list[Factor]:
    """A factor with a choice in its shortest form: what is chosen wholly, outside and inside of it, split off."""
    if factor.chosen is None:
        return [factor]
    size, chosen = factor.size, factor.chosen
    run = next((i for i in range(1, len(chosen)) if chosen[i] != chosen[0] + i), len(chosen))
    for inner in range(run, 1, -1):
        parts = factor.split(inner) if size % inner == 0 else None
        if parts is not None and parts[1].chosen is None:
            return [*_reduced(parts[0]), parts[1]]
    for outer in range(len(chosen), 1, -1):
        parts = factor.split(size // outer) if size % outer == 0 else None
        if parts is not None and parts[0].chosen is None:
            return [parts[0], *_reduced(parts[1])]
    return [factor]


def _product(outer: Factor, inner: Factor) -> Factor | None:
    """Two neighbours of one kind as one factor; None where a choice meets a size that is not known."""
    size = outer.size * inner.size
    if outer.chosen is None and inner.chosen is None:
        return Factor(size, outer.normalised)
    if not isinstance(size, int):
        return None
    chosen = [i * inner.size + j for i in outer.indices for j in inner.indices]
    return choosing(size, outer.normalised, chosen)


def normal_form(factors: Iterable[Factor]) -> Dimension:
    """Normal form: no factors of size 1, no two neighbours of one kind unless just one of them has a choice."""
    merged: list[Factor] = []
    for factor in factors:
        if factor.size == 1:
            continue
        if merged and merged[-1].normalised == factor.normalised:
            product = _product(merged[-1], factor)
            if product is not None:
                merged[-1] = product
                continue
        merged.append(factor)
    if all(factor.chosen is None for factor in merged):
        return tuple(merged)
    reduced = [part for factor in merged for part in _reduced(factor)]
    # Once more without the choices: splitting off may have left two free neighbours.
    result: list[Factor] = []
    for factor in reduced:
        if result and result[-1].normalised == factor.normalised and result[-1].chosen is factor.chosen is None:
            result[-1] = Factor(result[-1].size * factor.size, factor.normalised)
        else:
            result.append(factor)
    return tuple(result)
