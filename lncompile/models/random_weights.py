"""Random weights that hide nothing: every parameter moved off its initial value."""

from __future__ import annotations

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every parameter off its initial value, so that nothing hides: γ ≠ 1, β ≠ 0, biases and means nonzero.

    A freshly initialised model would pass with half of its terms forgotten: its γ are 1, its β and biases 0, and the
    mean of its stream close to 0. Matrices keep the scale of their initialisation.

    Args:
        model: changed in place, on whatever device its parameters are; each device draws numbers of its own. One on the
            meta device has no values to change.
        seed: of the random numbers.

    Returns:
        The model.

    Example:
        >>> randomise(nn.LayerNorm(4)).weight
        Parameter containing: ...
    """
    if all(parameter.device.type == "meta" for parameter in model.parameters()):
        return model  # there is nothing to move
    devices = {parameter.device for parameter in model.parameters()}
    generators = {device: torch.Generator(device).manual_seed(seed) for device in devices}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = generators[parameter.device]
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device)
            if parameter.dim() >= 2:
                # A learned token or position may start at zero; 0.02 is what transformers' models start from.
                scale = float(parameter.std()) or 0.02
                parameter.add_(scale * (0.3 * noise + 0.1))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise + 0.1)
            elif parameter.dim() == 1:
                parameter.add_(0.3 * noise)
    return model
