"""Two pre-norm residual branches, for tests of the backend as it is called."""

from __future__ import annotations

from typing import Any

import torch
from architectures import randomise
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


class Residual(nn.Module):
    """Two pre-norm residual branches; `breaks` puts a graph break between them."""

    def __init__(self, width: int = 16, breaks: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, 4)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.breaks = breaks

    def forward(self, value: Tensor) -> Tensor:
        stream = self.first(value)
        stream = stream + self.second(torch.relu(self.norm_1(stream)))
        if self.breaks:
            torch._dynamo.graph_break()
        return self.head(self.norm_2(stream))


def model(**config: Any) -> nn.Module:
    return randomise(Residual(**config).double())


def value(*shape: int) -> Tensor:
    return torch.randn(*(shape or (5, 16)), dtype=torch.float64)
