"""Gradients of a captured graph, as it is and rewritten for training: they must be equal, whatever the loss.

Both graphs are run as they are, by autograd's eager operators: that a rewrite keeps gradients is a property of the
graph, as its predictions are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphs import Captured
from torch import Tensor, nn

from lncompile.analysis import analyse
from lncompile.options import Options
from lncompile.runtime.materialize import Materializer
from lncompile.transform import transform

# A parameter whose gradient is this much smaller than the largest has rounding errors of the large ones.
SMALL = 1e-3
# About the rounding error of a double.
DISTURBANCE = 1e-15


@dataclass(frozen=True)
class Comparison:
    """How far the gradients of a rewritten graph are from the original's.

    Attributes:
        folded: how many sites fold in training, costs left out of account.
        error: the largest difference in a parameter's gradient, relative to its size.
        noise: what the original's own gradients differ by when every parameter is off by rounding: where an attention
            is saturated its gradient is a difference of large numbers, and says as much about rounding as about
            anything else.
    """

    folded: int
    error: float
    noise: float


def compare_gradients(captured: Captured) -> Comparison:
    """Rewrite a graph for training and compare the gradients of a random loss in all its parameters.

    Args:
        captured: a graph; its parameters are copied and take gradients.

    """
    inputs = [_with_gradient(value) for value in captured.example_inputs]
    with torch.enable_grad():
        analysis = analyse(captured.graph_module, inputs, Options(training="on"))
        folded = sum(verdict.folded for verdict in analysis.verdicts)
        if analysis.placement is None:
            return Comparison(folded, 0.0, 0.0)
        transformed = transform(analysis, Options(training="on"))
        values = Materializer(transformed.expressions)(inputs)
        expected = _gradients(captured.graph_module, inputs, inputs)
        actual = _gradients(transformed.graph_module, [*inputs, *values], inputs)
        disturbed = [_disturbed(value) for value in inputs]
        noisy = _gradients(captured.graph_module, disturbed, disturbed)
    return Comparison(folded, _largest_error(actual, expected), _largest_error(noisy, expected))


def _with_gradient(value: Any) -> Any:
    if isinstance(value, nn.Parameter) and value.is_floating_point():
        return nn.Parameter(value.detach().clone())
    return value


def _disturbed(value: Any) -> Any:
    if isinstance(value, nn.Parameter) and value.requires_grad:
        return nn.Parameter(value.detach() * (1 + DISTURBANCE * torch.randn_like(value)))
    return value


def _gradients(function: Callable[..., Any], arguments: Sequence[Any], inputs: Sequence[Any]) -> list[Tensor | None]:
    parameters = [value for value in inputs if isinstance(value, nn.Parameter) and value.requires_grad]
    # What a graph writes into (caches, running statistics) must not be what the next run reads.
    fresh = [
        value.detach().clone() if isinstance(value, Tensor) and not value.requires_grad else value
        for value in arguments
    ]
    torch.manual_seed(0)
    outputs = [value for value in _tensors(function(*fresh)) if value.requires_grad]
    torch.manual_seed(1)
    loss = sum((output * torch.randn_like(output)).sum() for output in outputs)
    if not isinstance(loss, Tensor):
        return []
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _largest_error(actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> float:
    assert len(actual) == len(expected)
    assert [gradient is None for gradient in actual] == [gradient is None for gradient in expected]
    pairs = [(one, other) for one, other in zip(actual, expected, strict=True) if one is not None and other is not None]
    if not pairs:
        return 0.0
    sizes = [float(gradient.abs().max()) if gradient.numel() else 0.0 for _, gradient in pairs]
    floor = max(SMALL * max(sizes), torch.finfo(torch.float64).tiny)
    return max(
        float((ours - theirs).abs().max()) / max(size, floor) if theirs.numel() else 0.0
        for (ours, theirs), size in zip(pairs, sizes, strict=True)
    )
