"""Centering a parameter in place, a slice at a time: exact arithmetic in float64 takes little memory then.

Groups of elements that share a mean lie within one slice, so a slice is a parameter by itself::

    [768, 3072] centered along axis 0       slices of columns
    [50257, 768] centered along axis 1      slices of rows
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lncompile.passes.graph.axes import Axes
from lncompile.passes.rewrites.arithmetic import add_means, is_centered, means_of
from lncompile.plans.entries import CenteredParameter, Centering

#: Elements in a slice: 32 MiB in float64, of which the arithmetic holds a few.
SLICE = 4 << 20


def center_in_place(entry: CenteredParameter, tensor: Tensor) -> bool:
    """Center a parameter as :meth:`FoldPlan.apply` does, and return whether it was not centered before.

    Args:
        entry: what to center.
        tensor: contiguous, of the entry's shape.
    """
    if is_done(entry, tensor):
        return False
    for centering in entry.centerings:
        for part, axes in _slices(centering, tensor):
            part.copy_(add_means(part, -means_of(part, axes), axes))
    return True


def is_done(entry: CenteredParameter, tensor: Tensor) -> bool:
    """Whether a parameter is centered, to the rounding of its dtype."""
    return all(is_centered(part, axes) for centering in entry.centerings for part, axes in _slices(centering, tensor))


def is_rounded(entry: CenteredParameter, tensor: Tensor) -> bool:
    """Whether the means are as near to zero as rounding of centered values leaves them, whatever the values were.

    A rounding moves a number by half a unit in its last place at most, so means are at most ``ε/2 · mean(|w|)``. They
    may be as large: where a mean is smaller than half a unit of most numbers, these all stay where they are.
    """
    information = torch.finfo(tensor.dtype)
    smallest = information.smallest_normal * information.eps
    slack = 32.0 if tensor.dtype == torch.float64 else 1.0 + 1e-6
    for centering in entry.centerings:
        for part, axes in _slices(centering, tensor):
            allowed = slack * (0.5 * information.eps * means_of(part.abs(), axes) + smallest)
            if not bool((means_of(part, axes).abs() <= allowed).all()):
                return False
    return True


def _slices(centering: Centering, tensor: Tensor) -> Iterator[tuple[Tensor, Axes]]:
    """Parts of a tensor with the set of axes on each, as views of it."""
    whole = tensor.view(centering.view)
    others = [axis for axis in range(whole.dim()) if axis not in centering.axes]
    if whole.numel() <= SLICE or not others:
        yield whole, centering.on(whole.shape)
        return
    along = max(others, key=lambda axis: whole.shape[axis])
    size = max(1, SLICE * whole.shape[along] // whole.numel())
    for start in range(0, whole.shape[along], size):
        part = whole.narrow(along, start, min(size, whole.shape[along] - start))
        rows = dict(centering.rows)
        if along in rows:
            rows[along] = tuple(row - start for row in rows[along] if start <= row < start + part.shape[along])
            if not rows[along]:
                continue
        yield part, Centering(tuple(part.shape), centering.axes, rows).on(part.shape)
