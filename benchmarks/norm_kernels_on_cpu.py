"""How long does the norm's C++ kernel take: LayerNorm's, the folded norm's as stock compiles it, and lnfold's?

Residual adds, norm and affine over a table of widths and dtypes, with as many rows as fit into the second cache. All
sizes are timed in each of several processes, half of which compile the three kernels in the opposite order.

    python benchmarks/norm_kernels_on_cpu.py [--widths 64 ... --dtypes bfloat16 ... --processes 4]

Prints a table and writes ``benchmarks/results/norm_kernels-cpu.json``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import operator
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from norm_kernels import DTYPES, KINDS, arguments, compiled_by
from one_process import PROCESSES, SPEEDUPS_ARE, answer_task
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

from lncompile.comparisons.even_terms import compile_apart, settle
from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.processes import RepeatedTimings, orders, run_processes
from lncompile.comparisons.timing import PairedTimings, measure
from lncompile.lowering import (
    rms_norm,
    slices_of_row,
    stored_scale_of,
    torch_private_caches,
    torch_private_dynamo,
)

#: Up to where a row no longer fits into its nearest cache.
WIDTHS = (64, 256, 768, 1024, 2048, 4096, 8192, 16384)
#: Rows times width: as many as fit into the second cache.
ELEMENTS = 1 << 19
#: Of the stream. Of few terms it is added anew wherever it is read; of more than four it is written first, in a loop of
#: its own, and kept for who reads it next.
TERMS = (2, 5)
#: Inductor's ``realize_reads_threshold``.
_MOST_TERMS_ADDED_ANEW = 4


def norm_of_sum(norm: Callable[..., Tensor], weight: Tensor, bias: Tensor, *terms: Tensor) -> tuple[Tensor, ...]:
    """The norm of a sum of ``[rows, width]``, and the sum where it is written anyway.

    Args:
        norm: as :func:`torch.nn.functional.layer_norm`.
        weight: γ.
        bias: β.
        terms: of the sum.
    """
    total = functools.reduce(operator.add, terms)
    output = norm(total, (weight.shape[0],), weight, bias)
    # A stream that is written anyway, which the next layer reads. Returning another would have it written.
    return (output, total) if len(terms) > _MOST_TERMS_ADDED_ANEW else (output,)


def timed(size: tuple[int, str, int], order: Sequence[str], seconds: float) -> dict[str, Any]:
    """Seconds of a call of the three kinds, interleaved.

    Args:
        size: width of the input, dtype of input, γ and β, and terms of the stream.
        order: in which the kinds are compiled.
        seconds: how long to measure.
    """
    width, dtype, terms = size
    *_, weight, bias = arguments(1, width, dtype)
    stream = [torch.randn(max(1, ELEMENTS // width), width, dtype=weight.dtype) for _ in range(terms)]
    calls: dict[str, Callable[[], Any]] = {}
    for kind in order:
        norm: Callable[..., Tensor] = functional.layer_norm if kind == "layer_norm" else rms_norm
        if kind == "lnfold":
            norm = functools.partial(rms_norm, slices=slices_of_row(stream[0]), stored_scale=stored_scale_of(stream[0]))
        function, backend = functools.partial(norm_of_sum, norm), compiled_by(kind)[1]
        calls[kind] = functools.partial(compile_apart(function, backend=backend, dynamic=False), weight, bias, *stream)
        with torch_private_dynamo.many_recompiles(), torch_private_caches.without_autograd_cache():
            calls[kind]()
    return {"seconds": dict(measure(calls, seconds=seconds).seconds)}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Time every size that a task names."""
    settle()
    return {"sizes": [timed(size, order=task["order"], seconds=task["seconds"]) for size in task["sizes"]]}


def main(given: Sequence[str] | None = None) -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="The norm's kernels on a CPU, timed.")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="default: from 64 to 16384")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--processes", type=int, default=PROCESSES, help=f"at least 2 (default: {PROCESSES})")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each size and process (default: 0.5)")
    chosen = parser.parse_args(given)
    machine, measured = {**describe_machine("cpu"), "threads": chosen.threads}, recording.commit()
    sizes = [(width, dtype, terms) for dtype, terms, width in itertools.product(chosen.dtypes, TERMS, chosen.widths)]
    tasks = [
        {"sizes": sizes, "order": order, "seconds": chosen.seconds, "threads": chosen.threads}
        for order in orders(KINDS, chosen.processes)
    ]
    results = run_processes(
        str(Path(__file__)), tasks, lambda number: print(f"process {number + 1} of {len(tasks)}", flush=True)
    )
    headers = [*(f"{kind} µs" for kind in KINDS), *(f"lnfold over {kind}" for kind in KINDS[:2])]
    table = Table("dtype", "rows", "width", "terms", *headers)
    cells = []
    for (width, dtype, terms), timings in zip(
        sizes, zip(*(result["sizes"] for result in results), strict=True), strict=True
    ):
        repeated = RepeatedTimings(
            tuple(PairedTimings({kind: tuple(process["seconds"][kind]) for kind in KINDS}) for process in timings)
        )
        speedups = {f"lnfold_over_{kind}": repeated.speedup("lnfold", kind) for kind in KINDS[:2]}
        cell = {
            "dtype": dtype,
            "rows": max(1, ELEMENTS // width),
            "width": width,
            "terms": terms,
            "rounds": repeated.rounds,
            **{f"{kind}_us": repeated.median(kind) * 1e6 for kind in KINDS},
            **{name: vars(ratio) for name, ratio in speedups.items()},
        }
        cells.append(cell)
        table.add_row(
            dtype,
            str(cell["rows"]),
            str(width),
            str(terms),
            *(f"{cell[f'{kind}_us']:.0f}" for kind in KINDS),
            *map(str, speedups.values()),
        )
    path = recording.write(
        "norm_kernels-cpu",
        {
            "commit": measured,
            "measured_at": recording.now(),
            "machine": machine,
            "load_average_after": describe_machine()["load_average"],
            "processes": chosen.processes,
            "speedups_are": SPEEDUPS_ARE,
            "cells": cells,
        },
    )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(0 if answer_task(carry_out) else main())
