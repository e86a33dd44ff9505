"""A small model whose centered parameters are known, for tests of what works at each call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from architectures import randomise
from torch import Tensor, nn

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
IDS = torch.arange(10).reshape(2, 5)


class Stream(nn.Module):
    """An embedding and a residual branch in front of two norms, and a head: three parameters are centered."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.branch = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.norm, self.final, self.head = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 11, bias=False)

    def forward(self, ids: Tensor, hidden: bool = False) -> Tensor:
        stream = self.table(ids)
        stream = stream + self.branch(torch.relu(self.norm(stream)))
        return stream if hidden else self.head(self.final(stream))


CENTERED = {"table.weight", "branch.weight", "branch.bias"}


def made(kind: Callable[[], nn.Module] = Stream) -> Any:
    return randomise(kind().double()).eval()
