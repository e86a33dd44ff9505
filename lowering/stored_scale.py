"""The scale of a norm's rows kept in memory between the loop that makes it and the loops that apply it, on a CPU.

On a CPU Inductor writes one loop over rows, in which every vector of a row divides and takes a square root anew: a C++
compiler cannot know that what the loop writes is not the sum that it reads. With the scale in memory, what remains of a
vector is a product. There are two ways to keep it, by where it lies:

``APART``: one scale beside the other. Inductor makes them in a loop of their own, whole vectors of rows at a time. That
takes a second pass over the rows, so they have to fit into a cache::

    for row: sums[row] = Σ x²
    for 16 rows: scales[rows] = rsqrt(sums[rows] / n + ε)
    for row: for vector: y = x · scales[row] · γ + β

``IN_ROW``: with a gap behind each. Inductor makes nothing in vectors that has gaps, and so leaves it in the loop
over rows, between a row's sum and its result. That is one pass, with one square root a row::

    for row:
        sum = Σ x²
        scales[2 · row] = rsqrt(sum / n + ε)
        for vector: y = x · scales[2 · row] · γ + β

Which one is faster was measured (``benchmarks/norm_kernels_on_cpu.py``).
"""

from __future__ import annotations

import math
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from lncompile.lowering.realised import realised
from lncompile.lowering.target import target_of


class Spacing(IntEnum):
    """Elements from one row's scale to the next one's."""

    APART = 1
    IN_ROW = 2


class StoredScale(NamedTuple):
    """How the scale of each row is kept in memory.

    Attributes:
        sizes: of the scale, ``[..., 1]``, static.
        spacing: of the rows in memory.
    """

    sizes: tuple[int, ...]
    spacing: Spacing = Spacing.APART

    @property
    def strides(self) -> tuple[int, ...]:
        """Those of the scale in memory; the rows follow each other."""
        sizes = self.sizes
        return tuple(self.spacing * math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))

    def keep(self, scale: Tensor) -> Tensor:
        """Return a scale of these sizes, kept in memory this way; as plain tensor functions, which can be traced."""
        if self.spacing == Spacing.APART:
            return realised(scale.contiguous(), self.sizes, self.strides)
        # Only every second element of the memory is written, and read.
        memory = scale.new_empty([self.spacing * math.prod(self.sizes)])
        written = torch.as_strided_scatter(memory, scale, self.sizes, self.strides, 0)
        return torch.as_strided(written, self.sizes, self.strides, 0)


def stored_scale_of(value: Tensor) -> StoredScale | None:
    """How the scale of a norm over the last axis is kept in memory before it is applied.

    Args:
        value: ``[..., features]``, the norm's input or a fake tensor of its kind.

    Returns:
        The way that was measured to be the fastest. None where neither gains: on other devices, where sizes are dynamic
        or gradients are taken, for float64, for rows of a few vectors each, and for rows of float32 that no longer fit
        into a cache.

    Example:
        >>> stored_scale_of(torch.empty(2, 5, 768)).spacing
        <Spacing.IN_ROW: 2>
    """
    width = value.shape[-1]
    # Whether a symbol is in a range would be asked of each number in it.
    if not isinstance(width, int) or width not in _ROWS_OF_STORED_SCALES.get(value.dtype, ()):
        return None
    apart = scale_stored_apart(value)
    if apart is None:
        return None
    fits = value.numel() * value.element_size() <= _LARGEST_READ_TWICE
    if value.dtype == torch.float32:
        return apart._replace(spacing=Spacing.IN_ROW) if fits else None
    # In 16 bits a row has half as many vectors, for each of which a square root of its own row is waited for.
    return apart if fits else apart._replace(spacing=Spacing.IN_ROW)


def scale_stored_apart(value: Tensor) -> StoredScale | None:
    """How the scale of a deferred norm is kept in memory before it is applied: apart.

    What is said above holds for the loops behind the products too, and there it costs no second pass: the loop that
    makes the scale ends where the row does.

    Args:
        value: ``[..., features]``, the norm's input or a fake tensor of its kind.

    Returns:
        None on other devices and where sizes are dynamic or gradients are taken.

    Example:
        >>> scale_stored_apart(torch.empty(2, 5, 32)).sizes
        (2, 5, 1)
    """
    sizes = tuple(value.shape)
    if target_of(value.device).type != "cpu" or value.requires_grad or not all(isinstance(n, int) for n in sizes):
        return None
    return StoredScale((*sizes[:-1], 1))


#: Bytes that are read a second time out of a cache, on common servers.
_LARGEST_READ_TWICE = 4 << 20
#: Elements in the rows of which storing the scale was measured to gain.
_ROWS_OF_STORED_SCALES = {
    torch.float32: range(64, 2049),
    torch.bfloat16: range(64, 65537),
    torch.float16: range(64, 65537),
}

__all__ = ["Spacing", "StoredScale", "scale_stored_apart", "stored_scale_of"]
