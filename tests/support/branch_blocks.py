"""A residual branch of any shape behind a norm that folds, for tests of what becomes of the products that read it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from architectures import randomise
from torch import Tensor, nn


class BranchBlock(nn.Module):
    """A stream that folds and that a residual connection keeps, a norm, and what a function does with both.

    Args:
        function: makes ``[batch, tokens, out]`` of this block and the stream, ``[batch, tokens, width]``.
        width: of the stream.
        out: features of ``up`` and ``gate``.
    """

    def __init__(self, function: Callable[[BranchBlock, Tensor], Tensor], width: int, out: int) -> None:
        super().__init__()
        self.function = function
        self.table, self.norm, self.plain = nn.Embedding(11, width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.simple, self.final = nn.LayerNorm(width, elementwise_affine=False), nn.LayerNorm(width)
        self.up, self.gate, self.down = nn.Linear(width, out), nn.Linear(width, out, bias=False), nn.Linear(out, width)
        self.weight, self.bias = nn.Parameter(torch.zeros(width, out)), nn.Parameter(torch.zeros(out))
        self.point = nn.Conv1d(width, out, 1)

    def forward(self, ids: Tensor) -> Tensor:
        """Answer tokens, int64 ``[batch, tokens]``."""
        stream = self.table(ids)
        return self.final(stream + self.down(self.function(self, stream)))


Branch = Callable[[BranchBlock, Tensor], Tensor]


def branch_block(branch: Branch, width: int, out: int) -> BranchBlock:
    """One with random parameters, in float64."""
    return randomise(BranchBlock(branch, width, out)).double().eval()  # type: ignore[return-value]


__all__ = ["Branch", "BranchBlock", "branch_block"]
