"""Sharded weights: which of them can be centered where they lie, each process its own shard.

torch's tensor parallelism keeps a weight as a ``DTensor``: one tensor over a mesh of processes, of which each holds a
*local* tensor. For every dimension of the mesh a placement says how they make the whole:

* ``Replicate()``: each local tensor is the whole;
* ``Shard(k)``: each is a piece of it, cut along its dimension k;
* ``Partial()``: the whole is the sum of them.

Operations on DTensors mean the whole, whatever the placements, so all rules hold for them as they are. What is left to
ask is what centering costs. ``C`` along A takes means over A and over nothing else, so it acts on every piece by itself
where no cut goes through A::

    C [W_1 | W_2] = [C W_1 | C W_2]            Shard along another dimension than A
    C (W_1 + W_2) = C W_1 + C W_2              Partial, because C is linear

In the usual plan (``q``, ``k``, ``v``, ``up`` column-wise, ``o``, ``down`` row-wise) the weights in front of norms are
the row-wise ones: ``[out, in]`` cut along ``in``, centered along ``out``, which every process holds whole. No process
has to ask another. A weight that is cut along its own A would have to: that is left alone, since a process that finds
its copy outdated when another does not would wait for ever.
"""

from __future__ import annotations

import math
from typing import Any, cast

from torch import Tensor, distributed

from lncompile.lowering import torch_private
from lncompile.passes.graph.axes import Axes, Factor

if distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    FROM_LOCAL: Any = DTensor.from_local
else:
    FROM_LOCAL = None


def is_sharded(value: Any) -> bool:
    """Whether a value is a DTensor, whatever its placements."""
    return distributed.is_available() and isinstance(value, DTensor)


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all processes, each of which has to ask for it."""
    whole: Tensor = cast("Any", tensor).full_tensor()
    return whole


def sharded_like(tensor: Tensor, value: Tensor) -> Tensor:
    """A tensor that each process has whole, as a DTensor with the placements of another one."""
    from torch.distributed.tensor import distribute_tensor

    like = cast("Any", tensor)
    return distribute_tensor(value, like.device_mesh, like.placements)


def problem_with(tensor: Tensor) -> str | None:
    """Say why the values of a sharded parameter cannot be centered, whichever A is asked for; None if they can.

    Args:
        tensor: a real DTensor.
    """
    placements = ", ".join(str(placement) for placement in _placements(tensor))
    if any(type(placement) not in (Shard, Replicate) for placement in _placements(tensor)):
        return f"is a DTensor with placements ({placements}), whose shards are not understood"
    if torch_private.is_opaque_tensor(torch_private.local_tensor(tensor)):
        return f"is a DTensor of {type(torch_private.local_tensor(tensor)).__name__}, whose values cannot be centered"
    return None


def centering_obstacle(tensor: Tensor | None, axes: Axes) -> str | None:
    """Say why a tensor cannot be centered along ``A`` without communication; None if it can.

    Args:
        tensor: the (fake) tensor. One that is no DTensor has no obstacle.
        axes: ``A`` on the whole tensor.
    """
    if tensor is None or not is_sharded(tensor):
        return None
    if axes.partial:
        return "it is a DTensor of which only a part is to be centered"
    for placement in _placements(tensor):
        if type(placement) is Replicate:
            continue
        if type(placement) is not Shard:
            return f"its placement is {placement}"
        # Where A normalises the dimension in groups, whole groups must lie in each shard.
        if not axes.is_free(placement.dim) and local_factors(tensor, placement.dim, axes) is None:
            return f"it is sharded along the normalised axis ({placement}), so its mean takes communication"
    return None


def is_understood(tensor: Tensor) -> bool:
    """Whether a DTensor's pieces make the whole by being joined and summed, and in no other way."""
    return all(
        type(placement) in (Shard, Replicate) or (type(placement) is Partial and placement.reduce_op in ("sum", "avg"))
        for placement in _placements(tensor)
    )


def is_partial(tensor: Tensor) -> bool:
    """Whether a DTensor's pieces are addends of the whole."""
    return any(isinstance(placement, Partial) for placement in _placements(tensor))


def shards_along(tensor: Tensor, dimension: int) -> int:
    """Return in how many pieces a DTensor is cut along a dimension."""
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    placements = zip(mesh.shape, _placements(tensor), strict=True)
    return math.prod(size for size, placement in placements if placement == Shard(dimension))


def local_factors(tensor: Tensor, dimension: int, axes: Axes) -> tuple[Factor, ...] | None:
    """``A`` along one dimension of the local tensor, from ``A`` on the whole; None where a cut goes through a group.

    Args:
        tensor: the DTensor, cut into equal pieces along the dimension.
        dimension: a dimension of it.
        axes: ``A`` on the whole tensor.
    """
    shards = shards_along(tensor, dimension)
    size = math.prod(factor.size for factor in axes.dimensions[dimension])
    if not is_understood(tensor) or not isinstance(size, int) or size % shards:
        return None
    parts = Axes((axes.dimensions[dimension],)).reshape((shards, size // shards))
    return parts.dimensions[1] if parts is not None and parts.is_free(0) else None


def _placements(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.placements)  # type: ignore[attr-defined]


def local_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor that this process holds."""
    return int(torch_private.local_tensor(tensor).nbytes) if is_sharded(tensor) else tensor.nbytes


__all__ = [
    "FROM_LOCAL",
    "centering_obstacle",
    "is_partial",
    "is_sharded",
    "is_understood",
    "local_bytes",
    "local_factors",
    "problem_with",
    "shards_along",
]
