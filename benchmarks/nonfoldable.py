"""What a site that does not fold should run: Inductor's own layer_norm, or ATen's eager kernel?

Measures ``lnfold.nonfoldable="inductor"`` against ``"eager"`` on a post-norm encoder of BERT-base's shapes, where only
the embeddings' norm folds: every other LayerNorm is fed by a residual that carries an earlier norm's output. Stock
``torch.compile`` and eager are timed beside them, interleaved, in several processes.

    python benchmarks/nonfoldable.py [--layers 4] [--seconds 20] [--threads N]

Prints a table and writes ``benchmarks/results/nonfoldable-<device>.json``.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import sys
from typing import Any

import torch
from one_process import answer_task, compiled_in_order, measured_case, run_on_devices, time_case
from rich.console import Console
from rich.table import Table

import lncompile
from lncompile.models.loading import randomise

SHAPES = ((1, 128), (8, 128))
DTYPES = (torch.float32, torch.bfloat16)

#: What is compared with what: (candidate, baseline).
COMPARISONS = (
    ("nonfoldable=inductor", "nonfoldable=eager"),
    ("nonfoldable=inductor", "inductor"),
    ("nonfoldable=eager", "inductor"),
)


def encoder(layers: int, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Build BERT-base's encoder with fewer layers, every parameter random."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
    return randomise(model).eval().to(device, dtype)


#: What each candidate is compiled with.
CANDIDATES: dict[str, dict[str, Any]] = {
    "eager": {},
    "inductor": {"backend": "inductor"},
    **{
        f"nonfoldable={choice}": {"backend": "lnfold", "options": {"lnfold.nonfoldable": choice}}
        for choice in ("inductor", "eager")
    },
}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Time all candidates on one model and one shape, in this process.

    Args:
        task: ``layers``, ``dtype``, ``batch``, ``length``, ``seconds``, ``device``, ``order``.

    Returns:
        Seconds of each call, and what lnfold made of the model's norms.
    """
    device = task["device"]
    model = encoder(task["layers"], getattr(torch, task["dtype"]), device)
    shape = (task["batch"], task["length"])
    tokens = torch.randint(1000, 30_000, shape, generator=torch.Generator().manual_seed(1)).to(device)
    report = lncompile.explain(model, tokens)
    runs = compiled_in_order(model, lambda run: run(tokens), CANDIDATES, task["order"], device)
    timed = time_case({name: functools.partial(run, tokens) for name, run in runs.items()}, task["seconds"], device)
    return {**timed, "folded": report.folded, "sites": report.total}


def run(device: str, chosen: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all cases on one device and print a row for each.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        chosen: ``layers`` of the encoder, ``seconds`` for each case.
        console: where to print.

    Returns:
        Everything measured, ready for JSON.
    """
    cases = []
    table = Table(title=f"nonfoldable sites on {device}, {chosen.layers} layers", box=None, pad_edge=False)
    for header in ("dtype", "batch", "folded", "inductor ms", "eager ms", *(f"{a} over {b}" for a, b in COMPARISONS)):
        table.add_column(header)
    for dtype, (batch, length) in itertools.product(DTYPES, SHAPES):
        name = str(dtype).removeprefix("torch.")
        console.print(f"measuring {name} {batch}x{length} ...")
        case = {"layers": chosen.layers, "dtype": name, "batch": batch, "length": length, "device": device}
        timings, found, measured = measured_case(__file__, case, list(CANDIDATES), COMPARISONS, chosen.seconds)
        cases.append({"dtype": name, "batch": batch, "length": length, **found, **measured})
        table.add_row(
            name,
            f"{batch}x{length}",
            f"{found['folded']} of {found['sites']}",
            *(f"{1e3 * timings.median(f'nonfoldable={choice}'):.2f}" for choice in ("inductor", "eager")),
            *(str(timings.speedup(a, b)) for a, b in COMPARISONS),
        )
    console.print(table)
    return {"model": f"BertModel, BertConfig's sizes with {chosen.layers} layers, random weights", "cases": cases}


OPTIONS: dict[str, dict[str, Any]] = {
    "--layers": {"type": int, "default": 4, "help": "encoder layers (default: 4)"},
    "--seconds": {"type": float, "default": 20.0, "help": "for each case (default: 20)"},
}

if __name__ == "__main__":
    if not answer_task(carry_out):
        sys.exit(run_on_devices("nonfoldable", "lnfold.nonfoldable: 'inductor' against 'eager'.", OPTIONS, run))
