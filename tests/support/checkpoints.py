"""Small checkpoints on disk, and what is in them."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from architectures import TEXT, randomise, tokens
from torch import nn

PROMPT = {"input_ids": tokens(2, 6), "use_cache": False}


def gpt2(dtype: torch.dtype = torch.float64, **settings: object) -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, n_inner=32, n_positions=16, **TEXT, **settings)
    return randomise(transformers.GPT2LMHeadModel(config).to(dtype).eval())


def saved(model: nn.Module, folder: Path, size: str = "50GB") -> Path:
    model.save_pretrained(folder, max_shard_size=size)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
