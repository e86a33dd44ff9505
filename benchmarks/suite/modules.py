"""Models that no class of transformers is: pre-norm encoders, a residual MLP, MLP-Mixer, as their papers have them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PreNormLayer(nn.Module):
    """Attention and a feed-forward, each behind a norm, written out: torch's own layer is one operator in evaluation.

    Args:
        width: of the stream.
        heads: of attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.joint, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Return ``[batch, tokens, width]`` of the same."""
        parts = self.joint(self.norm_1(stream)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*parts.unbind())
        stream = stream + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = stream + self.down(functional.gelu(self.up(self.norm_2(stream))))
        return result


class SeriesEncoder(nn.Module):
    """A token for each patch of a series, a pre-norm encoder over them, and a forecast from each (as in 2211.14730).

    Args:
        width: of the encoder.
        layers: of it.
        heads: of attention.
        patches: that a series is cut into.
        patch: points in each.
    """

    def __init__(self, width: int, layers: int, heads: int, patches: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.first, self.place = nn.Linear(patch, width), nn.Parameter(torch.randn(patches, width))
        self.encoder = nn.Sequential(*(PreNormLayer(width, heads) for _ in range(layers)), nn.LayerNorm(width))
        self.head = nn.Linear(width, patch)

    def forward(self, series: Tensor) -> Tensor:
        """Return ``[batch, patches, patch]`` for ``[batch, patches * patch]``."""
        patches = series.reshape(series.shape[0], -1, self.patch)
        result: Tensor = self.head(self.encoder(self.first(patches) + self.place))
        return result


class TableEncoder(nn.Module):
    """A token for each column, torch's own pre-norm encoder over them, and a head (FT-Transformer, 2106.11959).

    Args:
        width: of the encoder.
        layers: of it.
        heads: of attention.
        columns: of the table.
    """

    def __init__(self, width: int, layers: int, heads: int, columns: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.randn(columns, width)), nn.Parameter(torch.randn(columns, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``[batch, columns, 1]`` for ``[batch, columns]``."""
        result: Tensor = self.head(self.encoder(rows[..., None] * self.scale + self.shift))
        return result


class ResidualMLP(nn.Module):
    """Pre-norm blocks of two linear layers on rows of a table (the ResNet of 2106.11959, with LayerNorm).

    Args:
        width: of the stream.
        layers: blocks.
        columns: of the table.
    """

    def __init__(self, width: int, layers: int, columns: int) -> None:
        super().__init__()
        self.first = nn.Linear(columns, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)

    def forward(self, rows: Tensor) -> Tensor:
        """Return ``[batch, 1]`` for ``[batch, columns]``."""
        stream = self.first(rows)
        for block in self.blocks:
            stream = stream + block(stream)
        result: Tensor = self.head(self.norm(stream))
        return result


class MixerBlock(nn.Module):
    """Mixes tokens, then channels, each behind a norm."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(tokens, width // 2), nn.GELU(), nn.Linear(width // 2, tokens))
        self.channels = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, stream: Tensor) -> Tensor:
        """Return ``[batch, tokens, width]`` of the same."""
        stream = stream + self.tokens(self.norm_1(stream).transpose(1, 2)).transpose(1, 2)
        result: Tensor = stream + self.channels(self.norm_2(stream))
        return result


class MLPMixer(nn.Module):
    """MLP-Mixer (2105.01601).

    Args:
        width: channels.
        layers: blocks.
        image_size: of the square images.
        patch_size: of the patches they are cut into.
    """

    def __init__(self, width: int, layers: int, image_size: int, patch_size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch_size, patch_size)
        tokens = (image_size // patch_size) ** 2
        self.blocks = nn.ModuleList(MixerBlock(width, tokens) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return ``[batch, 1000]`` for ``[batch, 3, image_size, image_size]``."""
        stream = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for block in self.blocks:
            stream = block(stream)
        result: Tensor = self.head(self.norm(stream).mean(1))
        return result


__all__ = ["MLPMixer", "PreNormLayer", "ResidualMLP", "SeriesEncoder", "TableEncoder"]
