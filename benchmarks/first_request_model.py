"""The model of ``first_request.py``, in a module of its own: what is saved names its class by its module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """A pre-norm block with causal attention.

    Args:
        width: of the stream.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, tokens, width]`` to the same."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        added: Tensor = self.down(functional.gelu(self.up(self.norm_2(x))))
        return x + added


class Decoder(nn.Module):
    """Embeddings, blocks, a final norm and a head.

    Args:
        width: of the stream.
        layers: how many blocks.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(1024, width), nn.Embedding(256, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1024)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.05, mean=0.01)

    def forward(self, ids: Tensor) -> Tensor:
        """``[batch, tokens]`` of int64 to ``[batch, tokens, 1024]``."""
        x = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
