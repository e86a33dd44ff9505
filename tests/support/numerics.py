"""Errors of stock torch.compile and of lnfold in narrow dtypes, on weights that are hard on a LayerNorm.

One compiled model serves many weights: they are written into its parameters in place, which Inductor's code does not
depend on and lnfold notices. That a model whose weights change at every call is not folded for long is left out.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from architectures import Architecture, randomise
from scipy import stats
from torch import Tensor, nn

import lncompile
from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.runtime.renewals import Renewals
from lncompile.verification import BUDGET, ROUNDINGS, floating_outputs, relative_error

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
        interval: of their ratio, 95%, from the spread over the draws.
        draws: how many draws of weights count: those for which the yardstick is finite.
        stays_finite: whether lnfold's output is finite for all of them.
    """

    output: str
    stock: float
    lnfold: float
    resolution: float
    interval: tuple[float, float] | None
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
    at_most: int = 64,
    eager: bool = False,
    options: dict[str, Any] | None = None,
) -> dict[str, list[Errors]]:
    """Return the errors of every output for every stress.

    Args:
        architecture: the model.
        dtype: of its weights, inputs and streams.
        stresses: which weights.
        draws: how many sets of random weights.
        at_most: how many where fewer look worse than the budget. Eight draws of a model that is nearly saturated give
            1.4 where sixty-four give 1.1.
        eager: whether the yardstick is eager and not Inductor.
        options: lnfold's.
    """
    model, inputs = architecture.model(dtype), architecture.inputs(dtype)
    stock = model if eager else torch.compile(model)
    folded = torch.compile(model, backend="lnfold", options=options)
    found: dict[str, list[Errors]] = {}
    for stress in stresses:
        outputs: dict[str, _Draws] = {}
        for seed in range(max(draws, at_most)):
            if seed >= draws and all(output.errors(dtype).passed for output in outputs.values()):
                break
            randomise(model, seed)
            STRESSES[stress](model)
            expected = reference(model, inputs)
            with (
                torch_private_dynamo.many_recompiles(),
                mock.patch.object(Renewals, "are_too_many", return_value=False),
            ):
                ours, theirs = floating_outputs(folded(**inputs)), floating_outputs(stock(**inputs))
            for name, value in expected.items():
                outputs.setdefault(name, _Draws(name)).add(value, theirs[name], ours[name])
        found[stress] = [output.errors(dtype) for output in outputs.values()]
    # Or stock would have been compared with itself.
    sites = [site for report in lncompile.reports(folded) for site in report.sites]
    assert not [site for site in sites if site.reason is lncompile.Reason.MOVING_WEIGHTS]
    return found


class _Draws:
    """The errors of one output, draw by draw."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._pairs: list[tuple[float, float]] = []
        self._stays_finite = True

    def add(self, expected: Tensor, stock: Tensor, lnfold: Tensor) -> None:
        # Beyond the range of the dtype there is nothing to compare.
        if stock.isfinite().all():
            self._stays_finite = self._stays_finite and bool(lnfold.isfinite().all())
            if self._stays_finite:
                self._pairs.append((relative_error(stock, expected), relative_error(lnfold, expected)))

    def errors(self, dtype: torch.dtype) -> Errors:
        resolution = torch.finfo(dtype).eps
        return Errors(
            self._name,
            geometric_mean([stock for stock, _ in self._pairs], resolution),
            geometric_mean([lnfold for _, lnfold in self._pairs], resolution),
            resolution,
            interval_of_ratio(self._pairs, resolution),
            len(self._pairs),
            self._stays_finite,
        )


def geometric_mean(errors: Sequence[float], resolution: float) -> float:
    """Geometric mean; an error of exactly zero counts as a thousandth of a rounding, none at all as one rounding."""
    logarithms = [logarithm(error, resolution) for error in errors]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else resolution


def interval_of_ratio(errors: Sequence[tuple[float, float]], resolution: float) -> tuple[float, float] | None:
    """95% interval of the geometric mean of lnfold's error over the yardstick's; none of a single draw."""
    if len(errors) < 2:
        return None
    ratios = [logarithm(lnfold, resolution) - logarithm(stock, resolution) for stock, lnfold in errors]
    mean, spread = statistics.mean(ratios), statistics.stdev(ratios) / math.sqrt(len(ratios))
    reach = float(stats.t.ppf(0.975, len(ratios) - 1)) * spread
    return math.exp(mean - reach), math.exp(mean + reach)


def logarithm(error: float, resolution: float) -> float:
    """Logarithm of an error; that of exactly zero is taken for a thousandth of a rounding."""
    return math.log(max(error, resolution / 1000))


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
