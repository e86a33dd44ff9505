"""A model of one's own, as ``lncompile examples/encoder.py:make`` takes it: a function that returns a model and inputs.

It is a pre-norm transformer encoder 64 wide, as it is used for time series and tables. In so narrow a model norms take
a noticeable part of the time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """A projection, pre-norm layers, a norm, and a head.

    Args:
        features: of each time step.
        width: of the residual stream.
        layers: how many.
        classes: of the head.
    """

    def __init__(self, features: int = 16, width: int = 64, layers: int = 4, classes: int = 8) -> None:
        super().__init__()
        self.project = nn.Linear(features, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, series: Tensor) -> Tensor:
        """``[batch, time, features]`` to ``[batch, classes]``."""
        stream = self.project(series)
        for layer in self.layers:
            stream = layer(stream)
        logits: Tensor = self.head(self.norm(stream).mean(dim=1))
        return logits


class Layer(nn.Module):
    """Attention and an MLP, each behind its norm.

    Args:
        width: of the residual stream.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """``[batch, time, width]`` to the same."""
        joint = self.joint(self.first_norm(stream))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        stream = stream + self.out(attended.transpose(1, 2).flatten(2))
        branch: Tensor = self.down(nn.functional.gelu(self.up(self.second_norm(stream))))
        return stream + branch


def make(batch: int = 32, tokens: int = 128) -> tuple[nn.Module, Tensor]:
    """Return the model and a batch of series, ``[batch, tokens, 16]``."""
    return Encoder(), torch.randn(batch, tokens, 16)
