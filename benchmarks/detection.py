"""How long do detection and placement take, next to Inductor's own compile time?

The graph is GPT-2 XL's, 48 layers, with small weights: what our passes and Inductor do depends on the operations and
not on how wide they are. Stock ``torch.compile`` compiles it without any cache; then every phase of ours is timed on
the graph Dynamo captured, several times.

    python benchmarks/detection.py [--layers 48] [--repeats 7]

Prints a table and writes ``benchmarks/results/detection.json``.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table

from lncompile.analysis import analyse
from lncompile.comparisons.machine import describe_machine
from lncompile.lowering import torch_private_inductor
from lncompile.models.loading import randomise
from lncompile.options import Options
from lncompile.transform import transform


def model(layers: int) -> torch.nn.Module:
    """Build GPT-2 with this many narrow layers, every parameter random."""
    transformers: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=layers, n_embd=64, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0
    )
    return randomise(transformers.GPT2LMHeadModel(config)).eval()


def capture_and_compile(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[Any, list[Any], float]:
    """Return the graph Dynamo captures with its inputs, and how long Inductor takes for it, caches off.

    Args:
        model: in evaluation mode.
        tokens: its input, ``[batch, length]``.

    Returns:
        The graph module, the value of each placeholder, and seconds.
    """
    captured: list[tuple[Any, list[Any], float]] = []

    def backend(graph_module: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        compiled = torch_private_inductor.inductor_compile(graph_module, example_inputs, {"force_disable_caches": True})
        captured.append((graph_module, list(example_inputs), time.perf_counter() - started))
        return compiled

    torch.compile(model, backend=backend, fullgraph=True)(tokens, use_cache=False)
    (found,) = captured
    return found


def run(layers: int, repeats: int) -> dict[str, Any]:
    """Measure every phase.

    Args:
        layers: of the model.
        repeats: of each of our phases.

    Returns:
        Everything measured, ready for JSON.
    """
    machine, measured = describe_machine(), recording.commit()
    tokens = torch.arange(16)[None]
    graph_module, example_inputs, inductor = capture_and_compile(model(layers), tokens)
    detection, rewriting = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        analysis = analyse(graph_module, example_inputs, Options())
        decided = time.perf_counter()
        transform(analysis, Options())
        detection.append(decided - started)
        rewriting.append(time.perf_counter() - decided)
    return {
        "benchmark": "detection",
        "measured": recording.now(),
        "commit": measured,
        "machine": machine,
        "load_average_after": describe_machine()["load_average"],
        "model": f"GPT2LMHeadModel, {layers} layers, 64 wide, random weights, 1x16 tokens",
        "nodes": len(graph_module.graph.nodes),
        "sites": len(analysis.verdicts),
        "folded": sum(verdict.folded for verdict in analysis.verdicts),
        "seconds": {
            "inductor (stock, no caches, once)": inductor,
            "detection and placement (median)": statistics.median(detection),
            "rewrite and lowering (median)": statistics.median(rewriting),
        },
        "samples": {"detection and placement": detection, "rewrite and lowering": rewriting},
    }


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="Time of detection and placement next to Inductor's.")
    parser.add_argument("--layers", type=int, default=48, help="of GPT-2 (default: 48, GPT-2 XL's)")
    parser.add_argument("--repeats", type=int, default=7, help="of our own phases (default: 7)")
    chosen = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    with torch.no_grad():
        found = run(chosen.layers, chosen.repeats)
    seconds = found["seconds"]
    inductor = next(iter(seconds.values()))
    title = f"{found['model']}: {found['folded']} of {found['sites']} norms fold, {found['nodes']} nodes"
    table = Table(title=title, box=None, pad_edge=False)
    for header in ("phase", "seconds", "share of Inductor's"):
        table.add_column(header)
    for name, value in seconds.items():
        table.add_row(name, f"{value:.3f}", f"{value / inductor:.1%}")
    console.print(table)
    console.print(f"written to {recording.write('detection', found)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
