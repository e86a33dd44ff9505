"""What does a call pay to notice that a weight has changed, and what where weights change at every call?

*The look.* Before each call of a compiled model the parameters that have centered copies are compared with those the
copies were made from: by identity, version, place and a few elements (``lnfold.check="values"``, the default), by
identity and version (``"versions"``), or not (``"off"``); see ``lncompile/runtime/parameter_state.py``. This times the
look alone, for a model of so many centered parameters: with all of them in the cache, as between calls of a small
model, and behind a pass over other memory that leaves nothing of them in the cache, as between calls of a large one.

*Weights that move.* A decoder whose parameters get other storage in front of each call, as offloading does it: stock
against lnfold, after lnfold gave folding up. The two are timed in turn, the order changing from round to round.

    python benchmarks/weight_check.py [--parameters 200]

Prints tables and writes ``benchmarks/results/weight_check.json``.
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

import lncompile
from lncompile.analysis import analyse
from lncompile.comparisons.machine import describe_machine
from lncompile.models.loading import randomise
from lncompile.options import Options
from lncompile.runtime.materialize import Materializer
from lncompile.transform import transform

# Short runs, and many: few of them are interrupted by what else the machine does, and the median is one that was not.
CALLS, REPEATS = 400, 101
COLD_REPEATS = 41
# Calls until the first computation is made up for, and the look is all there is.
SETTLING = 20
# Elements of a pass over other memory: 256 MiB, several times the cache of a server's processor.
OTHER_MEMORY = 64 * 2**20
ROUNDS = 301

#: Takes the arguments of a call, and gives the centered weights.
Looks = dict[str, Callable[[tuple[Any, ...]], Any]]


class Stream(nn.Module):
    """A residual stream that adds up linear layers, two parameters each, in front of one norm."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, value: Tensor) -> Tensor:
        """Add the layers up and normalise, ``[batch, width]``."""
        stream = self.layers[0](value)
        for layer in self.layers[1:]:
            stream = stream + layer(value)
        normed: Tensor = self.norm(stream)
        return normed


class Decoder(nn.Module):
    """Pre-norm blocks with attention, a table in front and a head behind."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(512, width)
        block = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 512)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of ``[batch, tokens]``."""
        logits: Tensor = self.head(self.blocks(self.table(ids)))
        return logits


def materializers(parameters: int, width: int) -> tuple[Looks, tuple[Any, ...]]:
    """Return a model's materializers, by how they look, and the arguments of its compiled graph."""
    captured: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured.append((graph_module, list(example_inputs)))
        return graph_module.forward

    torch.compiler.reset()
    model = randomise(Stream(parameters // 2, width)).eval()
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(2, width))
    ((graph_module, arguments),) = captured
    expressions = transform(analyse(graph_module, arguments, Options()), Options()).expressions
    assert len(expressions) == parameters
    looks = {check: _looking(Materializer(expressions, check=check)) for check in ("values", "versions", "off")}
    given = tuple(arguments)  # a tuple, as a compiled graph's are when it is called
    for look in looks.values():
        for _ in range(SETTLING):
            look(given)
    return looks, given


def _looking(materializer: Materializer) -> Callable[[tuple[Any, ...]], Any]:
    """What a call does, as in ``lncompile/folded_graph.py``."""

    def look(arguments: tuple[Any, ...]) -> Any:
        settled = materializer.settled
        if settled is not None:
            same, values = settled
            if not same.difference(arguments):
                return values
        return materializer(arguments)

    return look


def in_cache(looks: Looks, arguments: tuple[Any, ...]) -> dict[str, list[float]]:
    """Microseconds of each look, called again and again."""
    samples: dict[str, list[float]] = {name: [] for name in looks}
    for _ in range(REPEATS):
        for name, look in looks.items():
            # Time of this thread: what others do on a shared machine is not a part of it.
            seconds = timeit.timeit(lambda look=look: look(arguments), timer=time.thread_time, number=CALLS)  # type: ignore[misc]
            samples[name].append(1e6 * seconds / CALLS)
    return samples


def out_of_cache(looks: Looks, arguments: tuple[Any, ...]) -> dict[str, list[float]]:
    """Microseconds of each look behind a pass over other memory."""
    samples: dict[str, list[float]] = {name: [] for name in looks}
    other = torch.ones(OTHER_MEMORY)
    for _ in range(COLD_REPEATS):
        for name, look in looks.items():
            other.sum()
            started = time.perf_counter()
            look(arguments)
            samples[name].append(1e6 * (time.perf_counter() - started))
    return samples


def moving(width: int = 256, layers: int = 4) -> dict[str, Any]:
    """Microseconds of calls of a model whose parameters get other storage in front of each."""
    torch.compiler.reset()
    torch.set_num_threads(1)
    model = randomise(Decoder(width, layers)).eval().requires_grad_(False)
    ids = torch.arange(16).reshape(1, 16)
    compiled = {backend: torch.compile(model, backend=backend) for backend in ("inductor", "lnfold")}
    samples: dict[str, list[float]] = {backend: [] for backend in compiled}
    folded_at_first = None
    for index in range(-30, ROUNDS):
        for backend in sorted(compiled, reverse=index % 2 == 0):
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()
            started = time.perf_counter()
            compiled[backend](ids)
            if index >= 0:
                samples[backend].append(1e6 * (time.perf_counter() - started))
        if folded_at_first is None:
            folded_at_first = sum(report.folded for report in lncompile.reports(compiled["lnfold"]))
    return {
        "folded_at_first": folded_at_first,
        "folded": sum(report.folded for report in lncompile.reports(compiled["lnfold"])),
        "microseconds_per_call": medians(samples),
        "samples": samples,
    }


def medians(samples: dict[str, list[float]]) -> dict[str, float]:
    """The median of each list."""
    return {name: statistics.median(values) for name, values in samples.items()}


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="Cost of noticing that a weight has changed.")
    parser.add_argument("--parameters", type=int, default=200, help="that are centered (default: 200)")
    chosen = parser.parse_args()
    machine, measured = describe_machine(), recording.commit()
    with torch.no_grad():
        small = in_cache(*materializers(chosen.parameters, width=8))
        large = out_of_cache(*materializers(chosen.parameters, width=512))
        offloaded = moving()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=f"µs a call for {chosen.parameters} centered parameters (median)", box=None, pad_edge=False)
    for header in ("lnfold.check", "in the cache", "least", "out of the cache"):
        table.add_column(header)
    for name, values in small.items():
        cells = (statistics.median(values), min(values), statistics.median(large[name]))
        table.add_row(name, *(f"{cell:.1f}" for cell in cells))
    console.print(table)
    times = offloaded["microseconds_per_call"]
    console.print(
        f"weights that move at each call: stock {times['inductor']:.0f} µs, lnfold {times['lnfold']:.0f} µs "
        f"({times['lnfold'] / times['inductor']:.3f} times)"
    )
    result = {
        "benchmark": "weight_check",
        "measured": recording.now(),
        "commit": measured,
        "machine": machine,
        "parameters": chosen.parameters,
        "load_average_after": describe_machine()["load_average"],
        "microseconds_per_call": medians(small),
        "least_microseconds_per_call": {name: min(values) for name, values in small.items()},
        "microseconds_per_call_out_of_cache": medians(large),
        "weights_that_move": offloaded,
        "samples": {"in_cache": small, "out_of_cache": large},
    }
    console.print(f"written to {recording.write('weight_check', result)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
