"""Small decoders, and one step of decoding with a static cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import transformers
from architectures import randomise
from torch import Tensor, nn

CONFIGS: dict[str, Callable[[int], Any]] = {
    "gpt2": lambda layers: transformers.GPT2Config(n_embd=32, n_head=4, n_layer=layers, vocab_size=61, n_positions=32),
    "opt": lambda layers: transformers.OPTConfig(
        hidden_size=32, ffn_dim=64, num_attention_heads=4, num_hidden_layers=layers, vocab_size=61,
        word_embed_proj_dim=32, max_position_embeddings=32),
    "gpt_neox": lambda layers: transformers.GPTNeoXConfig(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=layers, vocab_size=61,
        max_position_embeddings=32),
}  # fmt: skip


def decoder(name: str, dtype: torch.dtype, layers: int = 2) -> tuple[nn.Module, Callable[[], dict[str, Any]]]:
    """A model, and what makes the arguments of one step of decoding with a static cache of its own."""
    model = randomise(transformers.AutoModelForCausalLM.from_config(CONFIGS[name](layers))).to(dtype).eval()
    keyword = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"

    def arguments() -> dict[str, Any]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        room, prompt = torch.arange(16), torch.arange(5)[None]

        def of(ids: Tensor, positions: Tensor) -> dict[str, Any]:
            visible = (room <= positions[:, None])[None, None]
            return {
                "input_ids": ids, "position_ids": positions[None], "attention_mask": visible, keyword: cache,
                "use_cache": True,
            }  # fmt: skip

        model(**of(prompt, torch.arange(5)))
        return of(torch.tensor([[7]]), torch.tensor([5]))

    return model, arguments
