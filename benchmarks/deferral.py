"""Is it worth while to scale behind the products (``lnfold.defer``)?

Times GPT-2's MLP with its norm and its residual connection in real widths, with the scale in the norm's kernel
(``"off"``) and behind the up-projection (``"on"``), stock ``torch.compile`` and the block without its norm beside them,
interleaved, in several processes. On a CPU and, where there is one, an NVIDIA GPU.

    python benchmarks/deferral.py [--seconds 10] [--widths 768 2048] [--rows 128 4096] [--threads N]

Prints a table and writes ``benchmarks/results/deferral-<device>.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from typing import Any

import torch
from one_process import answer_task, compiled_in_order, measured_case, run_on_devices, time_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.lowering.inspect.generated_code import generated_code
from lncompile.models.loading import randomise

WIDTHS, ROWS = (768, 1024, 2048), (128, 1024, 4096)
DTYPES = (torch.float32, torch.bfloat16)
OFF, ON, STOCK = "scaled in the norm", "scaled behind the product", "inductor"
#: What is compared with what: (candidate, baseline).
COMPARISONS = ((ON, OFF), (ON, STOCK), (OFF, STOCK))


class Block(nn.Module):
    """A residual stream, an MLP on it behind its norm, and the norm of what comes next."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.norm, self.next = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, value: Tensor) -> Tensor:
        """Add two branches up to a stream, and a third, ``[rows, width]``."""
        stream = self.first(value) + self.second(value)
        branch = self.down(functional.gelu(self.up(self.norm(stream)), approximate="tanh"))
        normed: Tensor = self.next(stream + branch)
        return normed


#: What each candidate is compiled with.
CANDIDATES: dict[str, dict[str, Any]] = {
    STOCK: {"backend": "inductor"},
    OFF: {"backend": "lnfold", "options": {"lnfold.defer": "off"}},
    ON: {"backend": "lnfold", "options": {"lnfold.defer": "on"}},
}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Time all candidates on one shape, in this process.

    Args:
        task: ``width``, ``rows``, ``dtype``, ``device``, ``seconds``, ``order``.

    Returns:
        Seconds of each call; and for each candidate the launches counted in its code.

    Raises:
        RuntimeError: the norm is not deferred where it is to be, or is where it is not.
    """
    width, device, dtype = task["width"], task["device"], getattr(torch, task["dtype"])
    model = randomise(Block(width)).eval().to(device, dtype)
    value = torch.randn(task["rows"], width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    launches: dict[str, Any] = {}
    for name, arguments in CANDIDATES.items():
        code = generated_code(torch.compile(model, **arguments), value)
        launches[name] = {"generated": code.launches, "extern": code.extern_calls}
    torch.compiler.reset()
    runs = compiled_in_order(model, lambda run: run(value), CANDIDATES, task["order"], device)
    for name, lowering in ((OFF, "rms_norm"), (ON, "rms_norm_deferred")):
        (report,) = lncompile.reports(runs[name])
        if [site.lowering for site in report.sites] != [lowering, "rms_norm"]:
            raise RuntimeError(f"{name}: expected {lowering}, and got\n{report}")
    timed = time_case({name: functools.partial(run, value) for name, run in runs.items()}, task["seconds"], device)
    return {**timed, "launches": launches}


def run(device: str, chosen: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure all shapes on one device and print a row for each.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        chosen: ``widths`` of the stream, ``rows``: numbers of tokens, ``seconds`` for each shape.
        console: where to print.

    Returns:
        Everything measured, ready for JSON.
    """
    cases = []
    table = Table(title=f"a norm scaled behind the up-projection, {device}", box=None, pad_edge=False)
    for header in ("dtype", "rows x width", f"{STOCK} ms", "launches", *(f"{a} over {b}" for a, b in COMPARISONS)):
        table.add_column(header)
    for dtype, width, rows in itertools.product(DTYPES, chosen.widths, chosen.rows):
        name = str(dtype).removeprefix("torch.")
        console.print(f"measuring {name} {rows}x{width} ...")
        case = {"width": width, "rows": rows, "dtype": name, "device": device}
        timings, found, measured = measured_case(__file__, case, list(CANDIDATES), COMPARISONS, chosen.seconds)
        launches = found["launches"]
        cases.append({"dtype": name, "rows": rows, "width": width, "launches": launches, **measured})
        table.add_row(
            name,
            f"{rows}x{width}",
            f"{1e3 * timings.median(STOCK):.3f}",
            " ".join(str(launches[candidate]["generated"]) for candidate in (STOCK, OFF, ON)),
            *(str(timings.speedup(a, b)) for a, b in COMPARISONS),
        )
    console.print(table)
    return {
        "model": "residual add, LayerNorm, Linear(d, 4d), GELU, Linear(4d, d), residual add, LayerNorm; random weights",
        "cases": cases,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "--widths": {"type": int, "nargs": "+", "default": WIDTHS, "help": "of the stream"},
    "--rows": {"type": int, "nargs": "+", "default": ROWS, "help": "tokens"},
    "--seconds": {"type": float, "default": 10.0, "help": "for each shape (default: 10)"},
}

if __name__ == "__main__":
    if not answer_task(carry_out):
        sys.exit(run_on_devices("deferral", "lnfold.defer: 'on' against 'off'.", OPTIONS, run))
