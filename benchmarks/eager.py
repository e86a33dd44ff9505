"""What does a folded model gain without a compiler?

A LayerNorm is one kernel of ATen's, and so is an RMSNorm on a GPU. This times models as they are against their folds
(``lncompile.fold``), both run eagerly, interleaved, in several processes. The models' shapes are real, their weights
random.

    python benchmarks/eager.py [--seconds 12] [--threads N]

Prints a table and writes ``benchmarks/results/eager-<device>.json``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from one_process import answer_task, measured_case, run_on_devices, time_case
from rich.console import Console
from rich.table import Table
from torch import nn

import lncompile
from lncompile.models.random_weights import randomise

DTYPES = (torch.float32, torch.bfloat16)
AS_IT_IS, FOLDED = "as it is", "folded"
COMPARISONS = ((FOLDED, AS_IT_IS),)


def narrow_encoder() -> tuple[nn.Module, dict[str, Any]]:
    """Return a pre-norm encoder 64 wide, and a series of 64 steps."""
    layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, norm_first=True)
    # Without its fast path, which is one operator with its norms inside.
    encoder = nn.TransformerEncoder(layer, 6, norm=nn.LayerNorm(64), enable_nested_tensor=False)
    for part in encoder.layers:
        part.activation_relu_or_gelu = 0
    return nn.Sequential(nn.Linear(8, 64), encoder, nn.Linear(64, 1)), {"input": torch.randn(8, 64, 8)}


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """Return GPT-2 small, and a prompt of 128 tokens."""
    transformers: Any = importlib.import_module("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False))
    return model, {"input_ids": torch.randint(1000, 50_000, (1, 128))}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    """Return ViT-tiny, and one image."""
    transformers: Any = importlib.import_module("transformers")
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    return model, {"pixel_values": torch.randn(1, 3, 224, 224)}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "encoder, 64 wide, 8x64": narrow_encoder,
    "ViT-tiny, one image": vit,
    "GPT-2 small, 128 tokens": gpt2,
}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Time a model and its fold, in this process.

    Args:
        task: ``model``, ``dtype``, ``seconds``, ``device``, ``order``.

    Returns:
        Seconds of each call, and how many norms fold.
    """
    device, dtype = task["device"], getattr(torch, task["dtype"])
    torch.manual_seed(0)
    model, inputs = MODELS[task["model"]]()
    model = randomise(model).eval()
    plan = lncompile.plan(model, **inputs)
    made = {
        AS_IT_IS: lambda: model.to(device, dtype),
        FOLDED: lambda: lncompile.fold(model, **inputs).to(device, dtype),
    }
    # The model itself is converted last: a fold is made of the weights as they are.
    models = {name: made[name]() for name in sorted(task["order"], key=lambda name: name == AS_IT_IS)}
    inputs = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype) for name, value in inputs.items()
    }
    runs = {name: functools.partial(models[name], **inputs) for name in task["order"]}
    return {**time_case(runs, task["seconds"], device), "folded": plan.folded, "sites": plan.total}


def run(device: str, chosen: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all models on one device and print a row for each.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        chosen: ``models``, and ``seconds`` for each case.
        console: where to print.

    Returns:
        Everything measured, ready for JSON.
    """
    cases = []
    table = Table(title=f"eager, on {device}", box=None, pad_edge=False)
    for header in ("model", "dtype", "folded", "as it is ms", "folded ms", "folded over as it is"):
        table.add_column(header)
    for model, dtype in itertools.product(chosen.models, DTYPES):
        name = str(dtype).removeprefix("torch.")
        console.print(f"measuring {model}, {name} ...")
        case = {"model": model, "dtype": name, "device": device}
        timings, found, measured = measured_case(__file__, case, [AS_IT_IS, FOLDED], COMPARISONS, chosen.seconds)
        cases.append({"model": model, "dtype": name, **found, **measured})
        table.add_row(
            model,
            name,
            f"{found['folded']} of {found['sites']}",
            *(f"{1e3 * timings.median(candidate):.2f}" for candidate in (AS_IT_IS, FOLDED)),
            str(timings.speedup(FOLDED, AS_IT_IS)),
        )
    console.print(table)
    return {"cases": cases}


OPTIONS: dict[str, dict[str, Any]] = {
    "--models": {"nargs": "+", "default": list(MODELS), "choices": list(MODELS), "help": "default: all"},
    "--seconds": {"type": float, "default": 12.0, "help": "for each case (default: 12)"},
}

if __name__ == "__main__":
    if not answer_task(carry_out):
        sys.exit(run_on_devices("eager", "A folded model and the model as it is, in eager mode.", OPTIONS, run))
