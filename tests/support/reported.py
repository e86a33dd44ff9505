"""A model to report on: a decoder with a pre-norm layer for each block."""

from __future__ import annotations

import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

D = 16


class Block(nn.Module):
    """A pre-norm layer; ``shows`` makes its second stream visible to an activation."""

    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn, self.mlp = nn.Linear(D, D), nn.Linear(D, D)
        self.shows = shows

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        out = self.mlp(self.ln_2(x))
        return self.mlp(functional.relu(x)) + out if self.shows else x + out


class Decoder(nn.Module):
    def __init__(self, layers: int = 12, shows: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, D)
        self.h = nn.ModuleList(Block(index == shows) for index in range(layers))
        self.ln_f = nn.LayerNorm(D)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.h:
            x = block(x)
        return self.ln_f(x).sum(-1)


IDS = torch.tensor([[1, 5, 3]])


def model(**arguments: int) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Decoder(**arguments).double()).eval()
