"""What does a call pay to notice that a weight has changed?

Before each call of a compiled model the parameters that have centered copies are compared with those the copies were
made from, by identity and version (``passes/parameter_state.py``). This times that look alone, for a model of so many
centered parameters, with the check and without it (``lnfold.check=False``).

    python benchmarks/weight_check.py [--parameters 200]

Prints a table and writes ``benchmarks/results/weight_check.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lncompile.analysis import analyse
from lncompile.machine import describe_machine
from lncompile.models import randomise
from lncompile.options import Options
from lncompile.passes.materialize import Materializer
from lncompile.transform import transform

# Short runs, and many: few of them are interrupted by what else the machine does, and the median is one that was not.
CALLS, REPEATS = 400, 101


class Stream(nn.Module):
    """A residual stream that adds up linear layers, two parameters each, in front of one norm."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))
        self.norm = nn.LayerNorm(8)

    def forward(self, value: Tensor) -> Tensor:
        """Add the layers up and normalise, ``[batch, 8]``."""
        stream = self.layers[0](value)
        for layer in self.layers[1:]:
            stream = stream + layer(value)
        normed: Tensor = self.norm(stream)
        return normed


def materializers(parameters: int) -> tuple[dict[str, Materializer], tuple[Any, ...]]:
    """Return the materializers of a model, with the check and without, and the arguments of its compiled graph."""
    captured: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append((graph_module, list(example_inputs)))
        return graph_module.forward

    model = randomise(Stream(parameters // 2)).eval()
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, 8))
    ((graph_module, arguments),) = captured
    expressions = transform(analyse(graph_module, arguments, Options()), Options()).expressions
    assert len(expressions) == parameters
    looks = {"checked": Materializer(expressions), "not checked": Materializer(expressions, check=False)}
    return looks, tuple(arguments)  # a tuple, as a compiled graph's are when it is called


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="Cost of noticing that a weight has changed.")
    parser.add_argument("--parameters", type=int, default=200, help="that are centered (default: 200)")
    chosen = parser.parse_args()
    machine, measured = describe_machine(), recording.commit()
    with torch.no_grad():
        looks, arguments = materializers(chosen.parameters)
        samples: dict[str, list[float]] = {name: [] for name in looks}
        for _ in range(REPEATS):
            for name, look in looks.items():
                # Time of this thread: what others do on a shared machine is not a part of it.
                seconds = timeit.timeit(lambda look=look: look(arguments), timer=time.thread_time, number=CALLS)  # type: ignore[misc]
                samples[name].append(1e6 * seconds / CALLS)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=f"{chosen.parameters} centered parameters", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("µs a call (median)")
    table.add_column("least")
    for name, values in samples.items():
        table.add_row(name, f"{statistics.median(values):.2f}", f"{min(values):.2f}")
    console.print(table)
    result = {
        "benchmark": "weight_check",
        "measured": recording.now(),
        "commit": measured,
        "machine": machine,
        "parameters": chosen.parameters,
        "load_average_after": describe_machine()["load_average"],
        "microseconds_per_call": {name: statistics.median(values) for name, values in samples.items()},
        "least_microseconds_per_call": {name: min(values) for name, values in samples.items()},
        "samples": samples,
    }
    console.print(f"written to {recording.write('weight_check', result)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
