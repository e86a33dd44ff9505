"""Having Inductor write a value to memory, where it would compute it anew for every reader."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def realised(value: Tensor, sizes: Sequence[int], strides: Sequence[int]) -> Tensor:
    """The tensor itself; where it is contiguous and all of its storage.

    Inductor computes a pointwise result anew in each kernel or loop that reads it, an activation once for every row of
    the next weight, the scale of a row once for every vector of it, unless something needs it in memory: a view by
    strides does. What is stored goes to the end of the kernel or loop that computes what it is made of.

    Args:
        value: any tensor.
        sizes: its sizes, static.
        strides: its strides.
    """
    return torch.as_strided(value, tuple(sizes), tuple(strides), 0)


__all__ = ["realised"]
