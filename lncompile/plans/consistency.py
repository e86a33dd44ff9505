"""Whether the parts of a fold plan fit each other: what a file may say wrong that is of the right form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lncompile.plans.entries import AbsorbedNorm, CenteredParameter, Centering, PlanError

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

_OUTCOMES = frozenset({"rms_norm", "centered", "layer_norm"})


def require_consistent(plan: FoldPlan) -> None:
    """Check what a plan says about parameters and modules against the form of the model it is of.

    Raises:
        PlanError: where it speaks of what the model does not have, or of the same thing twice.
    """
    problem = next(_problems(plan), None)
    if problem is not None:
        raise PlanError(f"the plan contradicts itself: {problem}")


def _problems(plan: FoldPlan) -> Iterator[str]:
    for entry in plan.center:
        yield from _unknown_tensors(plan, f"'{entry.name}'", (entry.name, *entry.also), entry.shape)
        yield from _unknown_tensors(plan, f"'{entry.name}'", entry.scaled_by)
        yield from _wrong_parts(entry)
    named = Counter(name for entry in plan.center for name in (entry.name, *entry.also))
    named.update(name for entry in plan.center for name in dict.fromkeys(entry.scaled_by) if name in named)
    yield from _twice(named, "is to be changed")
    for norm in plan.replace:
        yield from _unknown_modules(plan, (norm.path, *norm.also))
        if not (math.isfinite(norm.eps) and norm.eps >= 0):
            yield f"the ε of '{norm.path}' is {norm.eps}"
        if not norm.normalized_shape or min(norm.normalized_shape) < 1:
            yield f"'{norm.path}' normalises {list(norm.normalized_shape)}"
        prefix = f"{norm.path}." if norm.path else ""
        own = [prefix + name for name in (norm.weight, norm.bias) if name is not None]
        in_state = [name for name in own if name in plan.form.tensors]  # a buffer need not be
        yield from _unknown_tensors(plan, f"'{norm.path}'", in_state, norm.normalized_shape)
    yield from _twice(Counter(path for norm in plan.replace for path in (norm.path, *norm.also)), "is to be replaced")
    for lookup in plan.lookups:
        yield from _unknown_modules(plan, (lookup.path, *lookup.also))
        yield from _unknown_tensors(plan, f"'{lookup.path}'", (lookup.table, *lookup.tied), lookup.shape)
        yield from _unknown_tensors(plan, f"'{lookup.path}'", (f"{lookup.path}.weight",), lookup.shape)
        if len(lookup.shape) != 2:
            yield f"the table of '{lookup.path}' has shape {list(lookup.shape)}"
    yield from _twice(Counter(path for lookup in plan.lookups for path in (lookup.path, *lookup.also)), "is looked up")
    for absorbing in plan.absorb:
        yield from _wrong_absorption(plan, absorbing)
    for planned in plan.norms:
        if planned.becomes not in _OUTCOMES:
            yield f"'{planned.name}' becomes {planned.becomes!r}"
    for group in plan.form.tied:
        yield from _unknown_tensors(plan, "a tie", group)


def _unknown_tensors(
    plan: FoldPlan, who: str, names: Collection[str], shape: Sequence[int] | None = None
) -> Iterator[str]:
    for name in names:
        known = plan.form.tensors.get(name)
        if known is None:
            yield f"{who} speaks of '{name}', which its model does not have"
        elif shape is not None and tuple(known) != tuple(shape):
            yield f"'{name}' has shape {list(known)} and is to be changed as one of shape {list(shape)}"


def _unknown_modules(plan: FoldPlan, paths: Collection[str]) -> Iterator[str]:
    for path in paths:
        if path not in plan.form.modules:
            yield f"its model does not have a module '{path}'"


def _twice(counts: Counter[str], what: str) -> Iterator[str]:
    for name, count in counts.items():
        if count > 1:
            yield f"'{name}' {what} {count} times"


def _wrong_parts(entry: CenteredParameter) -> Iterator[str]:
    if not entry.centerings:
        yield f"'{entry.name}' is to be centered along nothing"
    if entry.scaled_by and not 0 <= entry.dimension < len(entry.shape):
        yield f"'{entry.name}' does not have a dimension {entry.dimension}"
    if len(entry.centerings) < 2:
        return
    sets = [_elements(centering, entry.shape) for centering in entry.centerings]
    for index, one in enumerate(sets):
        for other in sets[:index]:
            if all(bool((here & there).any()) for here, there in zip(one, other, strict=True)):
                yield f"centerings of '{entry.name}' share elements"
                return


def _elements(centering: Centering, shape: Sequence[int]) -> list[Tensor]:
    """Which indices of each dimension take part: a centering's elements are the product of these."""
    chosen = []
    factors = list(enumerate(centering.view))
    for size in shape:
        flags = torch.ones(1, dtype=torch.bool)
        while factors and (flags.numel() < size or factors[0][1] == 1):
            axis, length = factors.pop(0)
            own = torch.zeros(length, dtype=torch.bool)
            own[list(centering.rows.get(axis, range(length)))] = True
            flags = (flags[:, None] & own[None, :]).reshape(-1)
        chosen.append(flags)
    return chosen


def _wrong_absorption(plan: FoldPlan, entry: AbsorbedNorm) -> Iterator[str]:
    replaced = {norm.path: norm for norm in plan.replace}
    norm = replaced.get(entry.path)
    if norm is None:
        yield f"γ or β of '{entry.path}' is to be absorbed, which does not become an RMSNorm"
        return
    yield from _unknown_tensors(plan, f"'{entry.path}'", [name for name in (entry.weight, entry.bias) if name])
    prefix = f"{entry.path}." if entry.path else ""
    for what, name, own in (("γ", entry.weight, norm.weight), ("β", entry.bias, norm.bias)):
        if name is not None and (own is None or name != prefix + own):
            yield f"'{name}' is not {what} of '{entry.path}'"
    for layer in entry.layers:
        yield from _unknown_modules(plan, (layer.path,))
        yield from _unknown_tensors(plan, f"'{entry.path}'", (layer.weight,))
        shape = plan.form.tensors.get(layer.weight, ())
        if len(shape) < 2 or layer.dimension not in (0, 1) or shape[layer.dimension] != norm.normalized_shape[-1]:
            what = f"'{layer.weight}' of shape {list(shape)}"
            yield f"{what} cannot absorb '{entry.path}' along dimension {layer.dimension}"
        elif entry.bias is not None and layer.bias is None:
            yield f"β of '{entry.path}' needs a bias in '{layer.path}'"
        elif layer.bias is not None and not layer.adds_bias:
            yield from _unknown_tensors(plan, f"'{entry.path}'", (layer.bias,), (shape[1 - layer.dimension],))
        elif layer.adds_bias and layer.bias in plan.form.tensors:
            yield f"'{layer.bias}' is to be added, and is there already"
        elif layer.adds_bias and layer.bias != (f"{layer.path}.bias" if layer.path else "bias"):
            yield f"'{layer.bias}' is to be added to '{layer.path}', and is not a bias of it"
