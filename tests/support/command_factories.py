"""Factories for the command line, some of which do what no factory should."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
import typer
from torch import nn

from lncompile.models.loading import randomise

HERE = Path(__file__).resolve()
TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "bos_token_id": 1,
        "eos_token_id": 2, "architectures": ["GPT2LMHeadModel"]}  # fmt: skip


class Net(nn.Module):
    """Two norms that fold."""

    def __init__(self, spoiled: float = 0.0) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.second, self.last = nn.Linear(8, 8), nn.LayerNorm(8)
        self.spoiled = spoiled

    def forward(self, x):
        return self.last(self.second(self.norm(self.first(x)))) + self.spoiled


def make_net():
    return randomise(Net()), torch.randn(2, 8)


def make_linear():
    return randomise(nn.Linear(8, 8)), torch.randn(2, 8)


def make_sized(batch=2, tokens=3):
    return randomise(Net()), torch.randn(batch, tokens, 8)


def make_seeded(seed=7):
    return randomise(Net(), seed), torch.full((2, 8), float(seed))


def make_any(**sizes):
    return randomise(Net()), torch.full((2, 8), float(sum(sizes.values())))


def make_seeding():
    torch.manual_seed(3)
    return Net(), torch.randn(2, 8)


def make_constant():
    model = nn.utils.skip_init(nn.LayerNorm, 8)
    return model, torch.ones(2, 8)


def make_transformer():
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)))


def make_exit():
    sys.exit(0)


def make_exit_with_words():
    sys.exit("no licence")


def make_parsed():
    import argparse

    argparse.ArgumentParser().parse_args(["--nothing"])


def make_typer_exit():
    raise typer.Exit(0)


class Leaving(Net):
    def forward(self, x):
        if torch.compiler.is_compiling():
            return super().forward(x)
        raise SystemExit(0)


def make_leaving():
    return randomise(Leaving()), torch.randn(2, 8)


def make_large(batch=1):
    return randomise(Net()), torch.empty(batch << 40)


class Tied(nn.Module):
    """Its tensors are on the CPU whatever the default device is, and one parameter is in two places."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(11, 8, device="cpu"), nn.LayerNorm(8, device="cpu")
        self.head = nn.Linear(8, 11, bias=False, device="cpu")
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(8, device="cpu"))

    def forward(self, ids):
        return self.head(self.norm(self.table(ids) * self.scale))


def make_tied():
    return Tied(), torch.zeros(2, 3, dtype=torch.int64, device="cpu")


def make_on_meta():
    with torch.device("meta"):
        return Net(), torch.empty(2, 8)


def ok():
    return make_net()
