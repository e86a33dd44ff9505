"""A block with one norm that folds, for tests of its weights."""

from __future__ import annotations

from architectures import randomise
from torch import Tensor, nn


class Block(nn.Module):
    """A stream that starts in the block, so that its norm folds into ``inner``."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner, self.norm, self.outer = nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, value: Tensor) -> Tensor:
        return value + self.outer(self.norm(self.inner(value)))


def block(seed: int = 0, width: int = 8) -> Block:
    return randomise(Block(width).double(), seed=seed).eval()  # type: ignore[return-value]
