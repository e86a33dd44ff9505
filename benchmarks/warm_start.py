"""How long until the first answer, in a fresh process, with empty and with filled caches?

Each measurement is a process of its own that builds GPT-2 with a few layers and makes the first call of
``torch.compile(model, backend=...)``. Cold, Inductor's caches are empty; warm, they are what the cold process of the
same backend left behind. Stock ``inductor`` and ``lnfold`` take turns. For ``lnfold`` the call includes importing it,
and its centered weights are computed in both.

    python benchmarks/warm_start.py [--layers 4] [--rounds 5]

Prints a table and writes ``benchmarks/results/warm_start.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import recording
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.timing import PairedTimings

BACKENDS = ("inductor", "lnfold")
PROCESS = """
import json, sys, time
import torch, transformers
from torch._dynamo.utils import counters

backend, layers, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
config = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=4, vocab_size=512, bos_token_id=0, eos_token_id=0)
model = transformers.GPT2LMHeadModel(config).eval()
tokens = torch.arange(64)[None]
with torch.no_grad():
    model(tokens, use_cache=False)
    started = time.perf_counter()
    torch.compile(model, backend=backend, fullgraph=True)(tokens, use_cache=False)
    seconds = time.perf_counter() - started
print(json.dumps({
    "seconds": seconds,
    "autograd_cache_hits": counters["aot_autograd"]["autograd_cache_hit"],
    "folded": counters["lnfold"]["folded"],
}))
"""


def first_call(backend: str, layers: int, width: int, cache: str) -> dict[str, Any]:
    """Start a process and return what it measured.

    Args:
        backend: a name that ``torch.compile`` knows.
        layers: of the model.
        width: of the model.
        cache: the folder of Inductor's caches.
    """
    finished = subprocess.run(
        [sys.executable, "-c", PROCESS, backend, str(layers), str(width)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def run(layers: int, width: int, rounds: int) -> dict[str, Any]:
    """Measure round after round.

    Args:
        layers: of the model.
        width: of the model.
        rounds: of one cold and one warm process for each backend.

    Returns:
        Everything measured, ready for JSON.
    """
    machine, measured = describe_machine(), recording.commit()
    samples: dict[str, list[float]] = {f"{backend}, {state}": [] for backend in BACKENDS for state in ("cold", "warm")}
    with Progress(transient=True) as progress:
        task = progress.add_task("processes", total=rounds * len(samples))
        for number in range(rounds):
            for backend in BACKENDS[number % 2 :] + BACKENDS[: number % 2]:
                with tempfile.TemporaryDirectory(prefix="lncompile-warm-start-") as cache:
                    for state in ("cold", "warm"):
                        found = first_call(backend, layers, width, cache)
                        if found["autograd_cache_hits"] != (state == "warm"):
                            raise RuntimeError(f"a {state} process had {found['autograd_cache_hits']} cache hits")
                        if (backend == "lnfold") != (found["folded"] == 2 * layers + 1):
                            raise RuntimeError(f"{backend} folded {found['folded']} norms")
                        samples[f"{backend}, {state}"].append(found["seconds"])
                        progress.advance(task)
    timings = PairedTimings({name: tuple(values) for name, values in samples.items()})
    ratios = {state: timings.speedup(f"inductor, {state}", f"lnfold, {state}") for state in ("cold", "warm")}
    return {
        "benchmark": "warm_start",
        "measured": recording.now(),
        "commit": measured,
        "machine": machine,
        "load_average_after": describe_machine()["load_average"],
        "model": f"GPT2LMHeadModel, {layers} layers, {width} wide, random weights, 1x64 tokens",
        "seconds_to_first_answer": timings.to_dict(),
        "lnfold_over_inductor": {
            state: {"median": ratio.median, "low": ratio.low, "high": ratio.high} for state, ratio in ratios.items()
        },
    }


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="Time to the first answer in fresh processes, cold and warm.")
    parser.add_argument("--layers", type=int, default=4, help="of GPT-2 (default: 4)")
    parser.add_argument("--width", type=int, default=256, help="of GPT-2 (default: 256)")
    parser.add_argument("--rounds", type=int, default=5, help="cold and warm processes of each backend (default: 5)")
    chosen = parser.parse_args()
    found = run(chosen.layers, chosen.width, chosen.rounds)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    table = Table(title=f"{found['model']}: seconds to the first answer", box=None, pad_edge=False)
    for header in ("caches", *BACKENDS, "lnfold / inductor, 95% interval"):
        table.add_column(header)
    for state, ratio in found["lnfold_over_inductor"].items():
        medians = (found["seconds_to_first_answer"][f"{backend}, {state}"]["median_s"] for backend in BACKENDS)
        interval = f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
        table.add_row(state, *(f"{median:.2f}" for median in medians), interval)
    console.print(table)
    console.print(f"written to {recording.write('warm_start', found)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
