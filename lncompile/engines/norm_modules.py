"""Whether a module of an engine computes a LayerNorm, found by calling it: classes and names differ between engines."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def obstacle_of(module: nn.Module) -> str:
    """Why a module is not a LayerNorm over the last axis with a weight; ``""`` where it is.

    A module may take a second tensor and hand it out again beside the result, as fused norms of engines do.
    """
    weight, bias, eps = getattr(module, "weight", None), getattr(module, "bias", None), eps_of(module)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        return f"its module {type(module).__name__} has no weight of one axis, or no ε"
    if {name for name, _ in module.named_parameters()} - {"weight", "bias"} or list(module.children()):
        return f"its module {type(module).__name__} holds more than a weight and a bias"
    values = torch.randn(6, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight)
    # The last rows are as small as √ε, where another ε or another place of it would show.
    values = (values + 0.5) * torch.tensor([1.0, 1.0, 1.0, eps**0.5, eps**0.5, eps**0.5]).to(weight)[:, None]
    own = torch.Generator().manual_seed(1)
    kept = [weight.detach().clone(), None if bias is None else bias.detach().clone()]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            # Of a model whose weights come later, γ is one and β zero, which would hide what it does with them.
            for tensor in (weight, bias):
                if tensor is not None:
                    tensor.copy_((torch.randn(tensor.shape, generator=own) + 0.5).to(tensor))
            output = module(values)
            expected = functional.layer_norm(values.float(), weight.shape, weight.float(), _float(bias), eps)
            second = module(values, values)[1] if isinstance(output, tuple) else values
    except Exception as error:  # whatever the forward of an engine's module raises
        return f"its module {type(module).__name__} cannot be called with one tensor: {type(error).__name__}"
    finally:
        with torch.no_grad():
            for tensor, before in zip((weight, bias), kept, strict=True):
                if tensor is not None and before is not None:
                    tensor.copy_(before)
    result = output[0] if isinstance(output, tuple) else output
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 3e-2
    is_norm = isinstance(result, Tensor) and torch.allclose(result.float(), expected, rtol=tolerance, atol=tolerance)
    if not is_norm or second is not values:
        return f"its module {type(module).__name__} computes something else than a LayerNorm"
    return ""


def hands_on(module: nn.Module) -> bool:
    """Whether a module that computes a norm takes a second argument and returns it beside the result."""
    weight: Any = module.weight
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return isinstance(module(weight.detach()[None]), tuple)


def eps_of(module: nn.Module) -> float | None:
    """ε of a norm, under the names that it has in libraries."""
    for name in ("eps", "variance_epsilon", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float()


class HandsOn:
    """A norm that takes a second argument and returns it beside the result, as the module did that it stands for."""

    def forward(self, hidden_states: Tensor, residual: Any = None) -> tuple[Tensor, Any]:
        """Normalise the first argument."""
        return super().forward(hidden_states), residual  # type: ignore[misc]


@functools.cache
def _handing_on(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}HandsOn", (HandsOn, kind), {"__module__": __name__, "__doc__": HandsOn.__doc__})


#: Makes the norm of an engine that takes a module's place, with its parameters.
MakeNorm = Callable[[nn.Module], nn.Module]


def replacement(module: nn.Module, make: MakeNorm) -> nn.Module:
    """What takes the place of a module that computes a LayerNorm, called in the same way."""
    norm = make(module)
    if hands_on(module):
        kind: Any = type(norm)
        norm.__class__ = _handing_on(kind)
    return norm
