"""What applying a plan makes of weights that take γ or β of the norm in front of them: values, before they are written.

Where a weight is centered as well, the two commute (one acts on the features that come in, the other on those that go
out), and it is rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lncompile.passes.graph.sharding import is_sharded, whole_of
from lncompile.passes.rewrites.affine import scale_weight, shift_bias
from lncompile.passes.rewrites.arithmetic import EXACT, add_means
from lncompile.plans.entries import AbsorbedNorm, CenteredParameter

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

#: What is said of values that a dtype cannot hold.
TOO_LARGE = "would have values that {} cannot hold, or has some that are not finite: fold the model in a wider dtype"
# Rounding moves numbers by the spacing of their dtype. More than this many is what underflow does.
_ROUNDINGS = 8

#: What is taken out of parameters that are centered, by their names.
Means = Mapping[str, tuple[CenteredParameter, Sequence[Tensor]]]


@dataclass
class Absorption:
    """New values, in float64.

    Attributes:
        values: of parameters that are there, by name, computed when they are written.
        added: biases that are not there yet, by name.
    """

    values: dict[str, Callable[[], Tensor]] = field(default_factory=dict)
    added: dict[str, nn.Parameter] = field(default_factory=dict)


def means_in(
    entries: Iterable[CenteredParameter], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[CenteredParameter, Sequence[Tensor]]]:
    """The means of each parameter that is not centered yet. Those of a sharded one are of the whole tensor.

    Args:
        entries: what is to be centered.
        tensors: of the model, by name.
    """
    means: dict[str, tuple[CenteredParameter, Sequence[Tensor]]] = {}
    for entry in entries:
        whole, scales = whole_tensor(tensors[entry.name]), scales_of(entry, tensors)
        if not entry.is_done(whole, scales):
            means[entry.name] = (entry, entry.means(entry.scaled(whole, scales)))
    return means


def absorbed(absorb: Iterable[AbsorbedNorm], tensors: Mapping[str, Tensor], means: Means) -> Absorption:
    """Compute what layers take of the norms in front of them.

    Args:
        absorb: what is absorbed.
        tensors: of the model, by name.
        means: what is taken out of those of them that are centered.
    """
    found = Absorption()
    ones: dict[str, Callable[[], Tensor]] = {}
    for name, (centered, _) in means.items():
        if centered.scaled_by:
            found.values[name] = functools.partial(_centered, name, tensors, means)
            for scale in centered.scaled_by:
                ones[scale] = functools.partial(torch.ones_like, whole_tensor(tensors[scale]))
    for entry in absorb:
        gamma = None if entry.weight is None else whole_tensor(tensors[entry.weight]).clone()
        beta = None if entry.bias is None or entry.bias not in tensors else whole_tensor(tensors[entry.bias])
        for layer in entry.layers:
            weight = tensors[layer.weight]
            exact = functools.partial(_centered, layer.weight, tensors, means)
            if beta is not None and layer.bias is not None:
                own = None if layer.bias not in tensors else _centered(layer.bias, tensors, means)
                row = shift_bias(own, exact(), beta, layer.dimension, EXACT)
                if layer.bias in tensors:
                    found.values[layer.bias] = functools.partial(_value, row)
                else:
                    found.added[layer.bias] = nn.Parameter(row.to(weight.dtype), weight.requires_grad)
            if gamma is not None:
                found.values[layer.weight] = functools.partial(_scaled, exact, gamma, layer.dimension)
        if gamma is not None and entry.weight is not None:
            ones[entry.weight] = functools.partial(torch.ones_like, gamma)
    found.values.update(ones)  # last: what is computed before reads them
    return found


def scales_of(entry: CenteredParameter, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """What the channels of a parameter are multiplied with."""
    return [whole_tensor(tensors[name]) for name in entry.scaled_by]


def zero_biases(plan: FoldPlan, tensors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """The biases that layers get, without their values."""
    added = {}
    for layer in (layer for entry in plan.absorb for layer in entry.layers):
        if layer.adds_bias and layer.bias is not None and layer.bias not in tensors:
            weight = tensors[layer.weight]
            value = weight.new_zeros(weight.shape[1 - layer.dimension])
            added[layer.bias] = nn.Parameter(value, weight.requires_grad)
    return added


def lost_in(exact: Tensor, dtype: torch.dtype) -> str:
    """Say what a dtype would lose of values beyond their rounding; ``""`` where it holds them.

    Args:
        exact: the values, in float64.
        dtype: they are to be kept in.
    """
    rounded = exact.to(dtype)
    if not bool(rounded.isfinite().all()):
        return TOO_LARGE.format(dtype)
    if float((rounded.to(EXACT) - exact).norm()) > _ROUNDINGS * torch.finfo(dtype).eps * float(exact.norm()):
        return f"would have values so small that {dtype} loses them: fold the model in a wider dtype"
    return ""


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor, gathered from all processes where it is sharded."""
    return whole_of(tensor) if is_sharded(tensor) else tensor


def shifted(entry: CenteredParameter, value: Tensor, means: Sequence[Tensor]) -> Tensor:
    """A parameter with a number added to each group of its elements, in float64."""
    for axes, mean in zip(entry.axes(), means, strict=True):
        value = add_means(value, mean, axes)
    return value


def _centered(name: str, tensors: Mapping[str, Tensor], means: Means) -> Tensor:
    """A parameter as it will be, in float64, but for what it absorbs."""
    value = whole_tensor(tensors[name])
    if name not in means:
        return value.to(EXACT)
    entry, taken = means[name]
    return shifted(entry, entry.scaled(value, scales_of(entry, tensors)), [-mean for mean in taken])


def _value(value: Tensor) -> Tensor:
    return value


def _scaled(weight: Callable[[], Tensor], scale: Tensor, dimension: int) -> Tensor:
    return scale_weight(weight(), scale, dimension, EXACT)
