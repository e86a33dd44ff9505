"""An engine's model as the tests of loading need it: names, merged weights and loaders like vLLM's, without vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

#: Where the tensors of a checkpoint go: a part of their name, the name it becomes, and which rows of a merged weight.
STACKED = {".q_proj.": (".qkv.", 0), ".k_proj.": (".qkv.", 1), ".v_proj.": (".qkv.", 2)}


class Layer(nn.Module):
    """A layer of OPT, with its queries, keys and values in one weight, and attention of each token to itself."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size = config.hidden_size
        self.attention = nn.Module()
        self.attention.qkv = nn.Linear(size, 3 * size)
        self.attention.out_proj = nn.Linear(size, size)
        self.self_attn_layer_norm = nn.LayerNorm(size)
        self.fc1 = nn.Linear(size, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, size)
        self.final_layer_norm = nn.LayerNorm(size)
        for parameter in self.attention.qkv.parameters():
            parameter.weight_loader = _load_part

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.attention.qkv(self.self_attn_layer_norm(hidden)).chunk(3, -1)
        hidden = hidden + self.attention.out_proj(query + key + value)
        return hidden + self.fc2(functional.relu(self.fc1(self.final_layer_norm(hidden))))


class Engine(nn.Module):
    """OPT as an engine writes it, with what an engine could do that transformers does not.

    Args:
        config: of OPT.
        scale: what the embeddings are multiplied with.
        reads_stream: whether the stream itself goes out beside the result.
    """

    def __init__(self, config: Any, scale: float = 1.0, reads_stream: bool = False) -> None:
        super().__init__()
        size = config.hidden_size
        self.scale, self.reads_stream = scale, reads_stream
        self.decoder = nn.Module()
        self.decoder.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.decoder.embed_positions = nn.Embedding(config.max_position_embeddings + 2, size)
        self.decoder.blocks = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.decoder.final_layer_norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.head.weight = self.decoder.embed_tokens.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(ids.shape[-1]) + 2
        hidden = self.scale * self.decoder.embed_tokens(ids) + self.decoder.embed_positions(positions)
        for layer in self.decoder.blocks:
            hidden = layer(hidden)
        logits = self.head(self.decoder.final_layer_norm(hidden))
        return (logits, hidden) if self.reads_stream else (logits,)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a checkpoint of transformers."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        loaded = set()
        for stored, tensor in weights:
            name = stored.removeprefix("model.").replace("lm_head", "head").replace(".layers.", ".blocks.")
            name = name.replace(".self_attn.", ".attention.")
            part = None
            for before, (behind, index) in STACKED.items():
                if before in name:
                    name, part = name.replace(before, behind), index
            parameter = parameters[name]
            loader = getattr(parameter, "weight_loader", _load)
            loader(parameter, tensor) if part is None else loader(parameter, tensor, part)
            loaded.add(name)
        return loaded


def _load(parameter: Tensor, tensor: Tensor) -> None:
    assert parameter.shape == tensor.shape
    parameter.data.copy_(tensor)


def _load_part(parameter: Tensor, tensor: Tensor, part: int) -> None:
    rows = parameter.shape[0] // 3
    parameter.data[part * rows : (part + 1) * rows].copy_(tensor)
