"""What each call of a normalisation normalises: the set ``A`` of ``layer_norm`` and of ``group_norm``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from lncompile.passes.decisions import Blocked, Reason
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Operation, value_of
from lncompile.passes.graph.operands import shape
from lncompile.passes.graph.sizes import Size

LAYER_NORMS = frozenset({"layer_norm", "native_layer_norm", "folded_norm"})
GROUP_NORMS = frozenset({"group_norm", "native_group_norm"})
# Norms that were folded before (passes/norms/folded_before.py): their input is centered by the model's weights.
FOLDED_NORMS = frozenset({"folded_norm"})
# These return (output, mean, 1/σ) and so show the mean of their input to what reads it.
WITH_STATISTICS = frozenset({"native_layer_norm", "native_group_norm"})


def normalised_axes(operation: Operation) -> Axes:
    """Return ``A`` on the input of a normalisation: the elements that share a mean.

    A layer norm normalises the trailing dimensions. A group norm on ``[N, C, *spatial]`` normalises ``C / groups``
    channels and all of the spatial dimensions together::

        layer_norm on [2, 5, 768] over (768,)       [·, ·, 768]
        group_norm on [8, 768] in 12 groups         [·, ·×64]
        group_norm on [8, 768, 14, 14] in 12 groups [·, ·×64, 14, 14]

    Raises:
        Blocked: where it cannot be told.
    """
    if operation.name in LAYER_NORMS:
        return Axes.trailing(shape(operation["input"]), _trailing_dimensions(operation))
    sizes, groups = shape(operation["input"]), operation["num_groups"]
    if len(sizes) < 2 or not isinstance(groups, int) or not isinstance(sizes[1], int) or sizes[1] % groups:
        raise Blocked(Reason.UNKNOWN_OPERATION, "a group norm whose groups are not plain numbers")
    if operation.name == "native_group_norm" and (operation["batch"], operation["channels"]) != sizes[:2]:
        raise Blocked(Reason.UNKNOWN_OPERATION, "a group norm that reads its input in another shape")
    unfolded = (sizes[0], groups, sizes[1] // groups, *sizes[2:])
    axes = Axes.of(unfolded, range(2, len(unfolded))).reshape(sizes)
    if axes is None:
        raise Blocked(Reason.UNKNOWN_OPERATION, "a group norm of an empty tensor")
    return axes


def _trailing_dimensions(operation: Operation) -> int:
    normalized_shape = operation["normalized_shape"]
    if isinstance(normalized_shape, fx.Node):
        normalized_shape = value_of(normalized_shape)
    if not isinstance(normalized_shape, tuple | list | torch.Size):
        raise Blocked(Reason.UNKNOWN_OPERATION, "a layer norm over dimensions that are not written out")
    return len(normalized_shape)


def is_layer_norm(operation: Operation) -> bool:
    """Whether a normalisation is a LayerNorm: every ``layer_norm``, and a ``group_norm`` over channels alone.

    Where every spatial dimension has the (static) size 1, group norm is layer norm of ``C / groups`` channels in
    parallel (LN-G). With a real spatial extent it is a normalisation of its own kind.
    """
    if operation.name in LAYER_NORMS:
        return True
    return operation.name in GROUP_NORMS and _is_all_one(shape(operation["input"])[2:])


def _is_all_one(sizes: Sequence[Size]) -> bool:
    return all(isinstance(size, int) and size == 1 for size in sizes)


def output_is_read(operation: Operation) -> bool:
    """Whether somebody reads what is normalised, and not the statistics alone."""
    if operation.name not in WITH_STATISTICS:
        return True
    return any(len(user.args) == 2 and user.args[1] == 0 for user in operation.node.users)


def mean_is_read(operation: Operation) -> bool:
    """Whether somebody reads the mean of its input, the second result of ``native_layer_norm`` and its like."""
    if operation.name not in WITH_STATISTICS:
        return False
    return not all(len(user.args) == 2 and user.args[1] in (0, 2) for user in operation.node.users)
