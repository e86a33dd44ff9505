"""Errors of stock torch.compile and of lnfold in narrow dtypes, on weights that are hard on a LayerNorm.

One compiled model serves many weights: they are written into its parameters in place, which Inductor's code does not
depend on and lnfold notices.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from architectures import Architecture, randomise
from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.verify import BUDGET, ROUNDINGS, floating_outputs, relative_error

#: What writes into a residual stream, by the names that models give it.
_OUT = re.compile(r"\b(c_proj|out_proj|o_proj|fc_out|fc2|dense_4h_to_h|down_proj|linear2|dense)\b")
_TABLES = re.compile(r"emb|wte|wpe|position|token")
#: The channels that become massive.
CHANNELS = (3, 17)


def as_they_are(model: nn.Module) -> None:
    """Weights as `randomise` makes them: means about half of the spread."""


def massive_channels(model: nn.Module) -> None:
    """Two channels of every stream are a thousand times the rest, and norms bring them out still more."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and _TABLES.search(name):
            _scale(parameter, -1, 1000.0)
        elif _OUT.search(name) and name.endswith("weight"):
            # GPT-2 keeps [in, out].
            _scale(parameter, 1 if type_of(model, name) == "Conv1D" else 0, 10.0)
        elif "norm" in name or "ln" in name:
            _scale(parameter, 0, 3.0)


def large_means(model: nn.Module) -> None:
    """The mean of what goes into a stream is a hundred times its spread."""
    for name, parameter in model.named_parameters():
        if (parameter.dim() == 2 and _TABLES.search(name)) or (_OUT.search(name) and name.endswith("bias")):
            parameter.add_(100 * parameter.std())


def type_of(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name.rpartition(".")[0])).__name__


def _scale(parameter: Tensor, dimension: int, factor: float) -> None:
    if parameter.shape[dimension] > max(CHANNELS):
        parameter.index_copy_(
            dimension,
            torch.tensor(CHANNELS),
            parameter.index_select(dimension, torch.tensor(CHANNELS)) * factor,
        )


STRESSES: dict[str, Callable[[nn.Module], None]] = {
    "plain": as_they_are,
    "massive channels": massive_channels,
    "large means": large_means,
}


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one output relative to float64, geometric means over several draws of weights.

    Single draws tell little: where a softmax is nearly saturated, errors of both differ by factors, either way.

    Attributes:
        output: where it stands in the model's output.
        stock: error of the yardstick.
        lnfold: error of lnfold.
        resolution: of the dtype.
        draws: how many draws of weights count: those for which the yardstick is finite.
        stays_finite: whether lnfold's output is finite for all of them.
    """

    output: str
    stock: float
    lnfold: float
    resolution: float
    draws: int
    stays_finite: bool

    @property
    def passed(self) -> bool:
        return self.stays_finite and self.lnfold <= max(BUDGET * self.stock, ROUNDINGS * self.resolution)

    @property
    def ratio(self) -> float:
        return self.lnfold / self.stock


def measure(
    architecture: Architecture,
    dtype: torch.dtype,
    stresses: Sequence[str] = tuple(STRESSES),
    draws: int = 8,
    eager: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, list[Errors]]:
    """Return the errors of every output for every stress.

    Args:
        architecture: the model.
        dtype: of its weights, inputs and streams.
        stresses: which weights.
        draws: how many sets of random weights.
        eager: whether the yardstick is eager and not Inductor.
        options: lnfold's.
    """
    model, inputs = architecture.model(dtype), architecture.inputs(dtype)
    stock = model if eager else torch.compile(model)
    folded = torch.compile(model, backend="lnfold", options=options)
    found: dict[str, list[Errors]] = {}
    for stress in stresses:
        pairs: dict[str, list[tuple[float, float]]] = {}
        finite: dict[str, bool] = {}
        for seed in range(draws):
            randomise(model, seed)
            STRESSES[stress](model)
            expected = reference(model, inputs)
            with torch_private.many_recompiles():
                ours, theirs = floating_outputs(folded(**inputs)), floating_outputs(stock(**inputs))
            for name, value in expected.items():
                errors = pairs.setdefault(name, [])
                # Beyond the range of the dtype there is nothing to compare.
                if bool(theirs[name].isfinite().all()):
                    finite[name] = finite.get(name, True) and bool(ours[name].isfinite().all())
                    if finite[name]:
                        errors.append((relative_error(theirs[name], value), relative_error(ours[name], value)))
        resolution = torch.finfo(dtype).eps
        found[stress] = [
            Errors(
                name,
                geometric_mean([stock_error for stock_error, _ in errors], resolution),
                geometric_mean([lnfold_error for _, lnfold_error in errors], resolution),
                resolution,
                len(errors),
                finite.get(name, True),
            )
            for name, errors in pairs.items()
        ]
    return found


def geometric_mean(errors: Sequence[float], resolution: float) -> float:
    """Geometric mean; an error of exactly zero counts as a thousandth of a rounding, none at all as one rounding."""
    logarithms = [math.log(max(error, resolution / 1000)) for error in errors]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else resolution


def reference(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """What the model gives in float64, from the very same weights."""
    wide = copy.deepcopy(model).double()
    widened = torch_private.tree_map(
        lambda value: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value, inputs
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return floating_outputs(wide(**widened))
    finally:
        torch.set_default_dtype(default)


def table(found: dict[str, list[Errors]]) -> str:
    """Lines for a failing test."""
    lines = [
        f"{stress:17} {error.output:28} stock {error.stock:.2e} lnfold {error.lnfold:.2e} ratio {error.ratio:.2f}"
        f"{'' if error.passed else '  WORSE'}{'' if error.stays_finite else '  NOT FINITE'}"
        for stress, errors in found.items()
        for error in errors
    ]
    return "\n".join(lines)
