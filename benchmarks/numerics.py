"""How large are lnfold's errors next to stock torch.compile's, in bfloat16, float16 and float32?

The models are those of the tests' table, small and with every parameter random, as they are and under two stresses:
*massive channels* (two channels of every stream a thousand times the rest) and *large means* (the mean of what goes
into a stream a hundred times its spread). Errors are relative to float64 on the same weights. A ratio is lnfold's
error over that of ``backend="inductor"``, a geometric mean over many draws of weights with its 95% interval; below 1
lnfold is nearer to float64.

    python benchmarks/numerics.py [--models gpt2 bert] [--draws 64] [--eager]

Prints a table and writes ``benchmarks/results/numerics.json``. Needs the test extras (``make test`` installs them).
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table

from lncompile.comparisons.machine import describe_machine
from lncompile.lowering import torch_private_inductor

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def run(models: Sequence[str], draws: int, eager: bool) -> Iterator[dict[str, Any]]:
    """Measure every model, dtype and stress.

    Args:
        models: names in the tests' table of architectures.
        draws: sets of random weights for each.
        eager: whether to leave Inductor out: the rewritten graph as it is against eager.

    Yields:
        Everything measured so far, after each model and dtype, ready for JSON.
    """
    architectures: Any = importlib.import_module("architectures")
    numerics: Any = importlib.import_module("numerics")
    if eager:
        graphs: Any = importlib.import_module("graphs")
        torch_private_inductor.inductor_compile = graphs.run_as_it_is
    machine, measured = describe_machine(), recording.commit()
    rows = []
    for architecture in architectures.ARCHITECTURES:
        if architecture.name not in models:
            continue
        for dtype in DTYPES:
            torch.compiler.reset()
            found = numerics.measure(architecture, dtype, draws=draws, at_most=draws, eager=eager)
            for stress, errors in found.items():
                for error in errors:
                    rows.append(
                        {
                            "model": architecture.name,
                            "sites": architecture.sites,
                            "folded": architecture.folded,
                            "dtype": str(dtype).removeprefix("torch."),
                            "stress": stress,
                            "output": error.output,
                            "stock": error.stock,
                            "lnfold": error.lnfold,
                            "ratio": error.ratio,
                            "interval": error.interval,
                            "draws": error.draws,
                            "stays_finite": error.stays_finite,
                            "passed": error.passed,
                        }
                    )
            yield {
                "benchmark": "numerics",
                "measured": recording.now(),
                "commit": measured,
                "machine": machine,
                "yardstick": "eager" if eager else "inductor",
                "draws": draws,
                "summary": summarise(rows),
                "rows": rows,
            }


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Geometric mean and maximum of the ratios for each dtype and stress, over outputs behind a norm that folds."""
    summary = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for stress in dict.fromkeys(row["stress"] for row in rows):
            chosen = [
                row
                for row in rows
                if (row["dtype"], row["stress"]) == (dtype, stress) and row["folded"] and row["draws"]
            ]
            if not chosen:
                continue
            worst = max(chosen, key=lambda row: row["ratio"])
            summary.append(
                {
                    "dtype": dtype,
                    "stress": stress,
                    "outputs": len(chosen),
                    "geometric_mean": math.exp(sum(math.log(row["ratio"]) for row in chosen) / len(chosen)),
                    "maximum": worst["ratio"],
                    "interval_of_maximum": worst["interval"],
                    "worst": f"{worst['model']}{worst['output']}",
                    "passed": all(row["passed"] for row in chosen),
                }
            )
    return summary


def main() -> int:
    """Run the benchmark as a command."""
    architectures: Any = importlib.import_module("architectures")
    names = [architecture.name for architecture in architectures.ARCHITECTURES]
    parser = argparse.ArgumentParser(description="Errors of lnfold next to stock torch.compile's.")
    parser.add_argument("--models", nargs="+", choices=names, default=names, help="names in the tests' table")
    parser.add_argument("--draws", type=int, default=64, help="sets of random weights for each (default: 64)")
    parser.add_argument("--eager", action="store_true", help="leave Inductor out: quick, the yardstick is eager")
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    name = "numerics-eager" if chosen.eager else "numerics"
    with torch.no_grad():
        for found in run(chosen.models, chosen.draws, chosen.eager):
            # It takes long: what was measured is kept, whatever happens to the rest.
            path = recording.write(name, found)
            console.print(f"{found['rows'][-1]['model']} {found['rows'][-1]['dtype']}")
    table = Table(title=f"lnfold's error over {found['yardstick']}'s", box=None, pad_edge=False)
    for header in ("dtype", "stress", "outputs", "geometric mean", "maximum", "worst", "within budget"):
        table.add_column(header)
    for row in found["summary"]:
        interval = row["interval_of_maximum"]
        between = f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else ""
        ratios = (f"{row['geometric_mean']:.2f}", f"{row['maximum']:.2f}{between}")
        table.add_row(row["dtype"], row["stress"], str(row["outputs"]), *ratios, row["worst"], str(row["passed"]))
    console.print(table)
    console.print(f"written to {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
