"""Whether a folded model answers as the model that it was made from: what graphs do not show is tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.plans.capture import Call, own_arguments
from lncompile.plans.entries import PlanError
from lncompile.plans.keeping import kept_as_it_was

#: Relative errors far above what rounding makes of a whole model, by the size of a dtype in bits.
_TOLERANCES = {64: 1e-6, 32: 1e-2, 16: 0.25}


def require_same_answers(model: nn.Module, folded: nn.Module, calls: Sequence[Call]) -> None:
    """Call both models with the examples, and compare.

    Args:
        model: as it was.
        folded: the folded one.
        calls: the examples.

    Raises:
        PlanError: where an answer has another form, or is another one beyond rounding.
    """
    with torch.no_grad(), kept_as_it_was(model), kept_as_it_was(folded):
        for number, call in enumerate(calls, 1):
            wanted, found = (_answer(one, call) for one in (model, folded))
            problem = _difference(wanted, found)
            if problem:
                raise PlanError(
                    f"the folded model answers example {number} in another way: {problem}. Does its code look at the "
                    "class of its norms, at their attributes or at the weights of embeddings? Nothing was changed"
                )


def _answer(model: nn.Module, call: Call) -> list[Any]:
    args, kwargs = own_arguments(call, copies=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return torch_private.tree_leaves(getattr(model, call.method)(*args, **kwargs))
        except (TypeError, AttributeError) as error:
            return [f"{type(error).__name__}: {error}"]


def _difference(wanted: Sequence[Any], found: Sequence[Any]) -> str:
    if len(wanted) != len(found):
        return f"it returns {len(found)} values, and not {len(wanted)}"
    for one, other in zip(wanted, found, strict=True):
        if isinstance(one, str) or isinstance(other, str):
            if one != other:
                return f"{other!r}, and not {one!r}"
            continue
        if not isinstance(one, Tensor) or not isinstance(other, Tensor):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            return f"a tensor is {list(other.shape)} of {other.dtype}, and not {list(one.shape)} of {one.dtype}"
        if not one.is_floating_point() or torch_private.is_opaque_tensor(one):
            continue
        exact, given = one.double(), other.double()
        both = exact.isfinite() & given.isfinite()
        size = exact[both].norm()
        error = float((exact[both] - given[both]).norm() / size) if size > 0 else 0.0
        if error > _TOLERANCES[torch.finfo(one.dtype).bits]:
            return f"the relative error of a tensor {list(one.shape)} is {error:.1g}"
    return ""
