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
import sys
from collections.abc import Sequence
from typing import Any

import recording
import torch
from one_process import SPEEDUPS_ARE, answer_task, compiled_in_order, in_processes, time_case
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.comparisons.machine import describe_machine
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


def run(device: str, widths: Sequence[int], rows: Sequence[int], seconds: float, console: Console) -> dict[str, Any]:
    """Measure all shapes on one device and print a row for each.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        widths: of the stream.
        rows: numbers of tokens.
        seconds: for each shape.
        console: where to print.

    Returns:
        Everything measured, ready for JSON.
    """
    machine, measured = describe_machine(device), recording.commit()
    cases = []
    table = Table(title=f"a norm scaled behind the up-projection, {machine['device']}", box=None, pad_edge=False)
    for header in ("dtype", "rows x width", f"{STOCK} ms", "launches", *(f"{a} over {b}" for a, b in COMPARISONS)):
        table.add_column(header)
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for width in widths:
            for count in rows:
                console.print(f"measuring {name} {count}x{width} ...")
                case = {"width": width, "rows": count, "dtype": name, "device": device}
                timings, found = in_processes(__file__, case, list(CANDIDATES), seconds)
                launches = found["launches"]
                ratios = {f"{a} over {b}": timings.speedup(a, b) for a, b in COMPARISONS}
                cases.append(
                    {
                        "dtype": name,
                        "rows": count,
                        "width": width,
                        "launches": launches,
                        "rounds": timings.rounds,
                        "load_average_after": describe_machine(device)["load_average"],
                        "speedups": {key: vars(ratio) for key, ratio in ratios.items()},
                        "timings": timings.to_dict(),
                    }
                )
                table.add_row(
                    name,
                    f"{count}x{width}",
                    f"{1e3 * timings.median(STOCK):.3f}",
                    " ".join(str(launches[candidate]["generated"]) for candidate in (STOCK, OFF, ON)),
                    *(str(ratio) for ratio in ratios.values()),
                )
    console.print(table)
    return {
        "benchmark": "deferral",
        "measured": recording.now(),
        "commit": measured,
        "machine": machine,
        "model": "residual add, LayerNorm, Linear(d, 4d), GELU, Linear(4d, d), residual add, LayerNorm; random weights",
        "speedups_are": SPEEDUPS_ARE,
        "cases": cases,
    }


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="lnfold.defer: 'on' against 'off'.")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the stream")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="tokens")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each shape (default: 10)")
    parser.add_argument("--threads", type=int, help="CPU threads; one is steadier on a machine shared with others")
    chosen = parser.parse_args()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with torch.no_grad():
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            found = run(device, chosen.widths, chosen.rows, chosen.seconds, console)
            console.print(f"written to {recording.write(f'deferral-{device}', found)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(0 if answer_task(carry_out) else main())
