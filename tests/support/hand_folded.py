"""Models that are folded by hand: weights centered in float64, and RMSNorms in the place of the norms that read them.

What a plan does by itself. Here the maps are written down for each model, so that tests of what happens to a folded
model do not rest on how plans are made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch

import torch
import transformers
from architectures import TEXT, randomise, tokens
from torch import Tensor, nn
from torch.nn import functional

from lncompile.nn import CenteredEmbedding, RMSNorm


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Decoder(nn.Module):
    """Embeddings, blocks, a last norm and a head, which may share the embeddings' table."""

    def __init__(self, width: int = 16, layers: int = 3, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(29, width), nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 29, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = torch.arange(16).reshape(2, 8) % 29


def center(weight: Tensor, axis: int) -> None:
    """Subtract the mean along an axis, in float64 and rounded once."""
    exact = weight.double()
    weight.copy_(exact - exact.mean(axis, keepdim=True))


@dataclass(frozen=True)
class HandFolded:
    """A model that can be folded by hand.

    Attributes:
        build: makes it.
        inputs: what it is called with.
        centered: axes along which parameters are centered, by patterns of their names.
        norms: patterns of the names of the norms that fold.
        tied: embeddings whose table is read elsewhere: they center what they look up.
        sites: how many calls of LayerNorms it has, and how many fold.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor | bool]
    centered: Mapping[str, int]
    norms: Sequence[str]
    sites: tuple[int, int]
    tied: Sequence[str] = field(default_factory=tuple)

    def models(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """The model with random parameters, and a copy that is folded."""
        model = randomise(self.build().to(dtype).eval())
        return model, self.fold(copy.deepcopy(model))

    def fold(self, model: nn.Module) -> nn.Module:
        """Fold a model, which is changed."""
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                for axis in (axis for pattern, axis in self.centered.items() if fnmatch(name, pattern)):
                    center(parameter, axis)
        for name, module in list(model.named_modules()):
            if any(fnmatch(name, pattern) for pattern in self.norms):
                model.set_submodule(name, RMSNorm.in_place_of(module))
            elif name in self.tied:
                model.set_submodule(name, CenteredEmbedding.in_place_of(module))
        return model


_DECODER = {"places.weight": 1, "blocks.*.out.weight": 0, "blocks.*.out.bias": 0, "blocks.*.down.weight": 0,
            "blocks.*.down.bias": 0}  # fmt: skip
_DECODERS_NORMS = ("blocks.*.norm?", "norm")
MODELS = {
    "decoder": HandFolded(Decoder, {"ids": IDS}, {**_DECODER, "tokens.weight": 1}, _DECODERS_NORMS, (7, 7)),
    "tied_decoder": HandFolded(
        lambda: Decoder(tied=True), {"ids": IDS}, _DECODER, _DECODERS_NORMS, (7, 7), tied=("tokens",)
    ),
    "gpt2": HandFolded(
        lambda: transformers.GPT2Model(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=32, n_positions=16, **TEXT)
        ),
        {"input_ids": tokens(2, 6), "use_cache": False},
        {"wte.weight": 1, "wpe.weight": 1, "h.*.c_proj.weight": 1, "h.*.c_proj.bias": 0},
        ("h.*.ln_?", "ln_f"),
        (5, 5),
    ),
    "bert": HandFolded(
        lambda: transformers.BertModel(
            transformers.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                                    max_position_embeddings=16, **TEXT),
            add_pooling_layer=False,
        ),
        {"input_ids": tokens(2, 6)},
        {"embeddings.*_embeddings.weight": 1},
        ("embeddings.LayerNorm",),
        (5, 1),
    ),
}  # fmt: skip
