"""How long does a fresh process take to its first answer, with code that another process compiled?

A decoder of twelve layers is compiled once with stock and once with lnfold, and saved: by ``aot_compile`` into a file,
and under ``caching_precompile`` into Dynamo's cache. Then fresh processes load it and answer one request, stock and
lnfold in turn, the order of each pair drawn. Each begins with a cache folder of its own: with nothing but what was
saved (a new container), or as the process that compiled left it (a restart).

Two times are taken: from the start of the interpreter to the answer, importing torch and building the model included,
and of loading and the first call alone.

    python benchmarks/first_request.py [--processes 9]

Writes ``benchmarks/results/first_request.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WAYS = ("aot_compile", "caching_precompile")
FOLDERS = ("new container", "restart")
BACKENDS = ("inductor", "lnfold")
WIDTH, LAYERS, TOKENS = 384, 12, 64


def save(way: str, backend: str, folder: Path) -> None:
    """Compile and save."""
    import torch
    from first_request_model import Decoder

    torch.manual_seed(0)
    model, ids = Decoder(WIDTH, LAYERS).eval(), torch.arange(TOKENS)[None]
    with torch.no_grad():
        if way == "aot_compile":
            torch._dynamo.config.enable_aot_compile = True
            compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
            compiled.forward.aot_compile(((ids,), {})).save_compiled_function(folder / "compiled.bin")
            return
        torch._dynamo.config.caching_precompile = True
        torch.compile(model, backend=backend)(ids)
        saved = torch.compiler.save_cache_artifacts()
        assert saved is not None
        (folder / "artifacts.bin").write_bytes(saved[0])


def load(way: str, backend: str, folder: Path, started: float) -> dict[str, float]:
    """Load, answer one request, and say how long that took, in seconds."""
    import torch
    from first_request_model import Decoder

    torch.manual_seed(0)
    model, ids = Decoder(WIDTH, LAYERS).eval(), torch.arange(TOKENS)[None]
    with torch.no_grad():
        before = time.time()
        if way == "aot_compile":
            with (folder / "compiled.bin").open("rb") as file:
                compiled: Any = torch.compiler.load_compiled_function(file)
            answer = compiled(model, ids)
        else:
            torch._dynamo.config.caching_precompile = True
            if (folder / "artifacts.bin").exists():
                torch.compiler.load_cache_artifacts((folder / "artifacts.bin").read_bytes())
            answer = torch.compile(model, backend=backend)(ids)
        done = time.time()
        wrong = (answer - model(ids)).abs().max().item()
    hits = torch._dynamo.utils.counters["dynamo_cache"]["dynamo_cache_hit"]
    if wrong > 1e-3 or (way == "caching_precompile" and not hits):
        raise RuntimeError(f"the first answer of {backend} by {way} is wrong by {wrong}, or nothing was loaded")
    return {"from_start_s": done - started, "load_and_call_s": done - before}


def run(*arguments: str, cache: Path) -> dict[str, float]:
    """Run this file in a process of its own, on one thread."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run([*command, str(time.time())], env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(way: str, processes: int, scratch: Path) -> list[dict[str, Any]]:
    """Compile with both backends, and time fresh processes in pairs."""
    caches, folders = {}, {}
    for backend in BACKENDS:
        folders[backend], caches[backend] = scratch / f"{way}-{backend}", scratch / f"{way}-{backend}-cache"
        folders[backend].mkdir()
        run("save", way, backend, str(folders[backend]), cache=caches[backend])
    coin, results = random.Random(0), []
    for kind in FOLDERS:
        times: dict[str, list[dict[str, float]]] = {backend: [] for backend in BACKENDS}
        for number in range(processes + 1):
            for backend in coin.sample(BACKENDS, 2):
                cache = scratch / "cache"
                shutil.rmtree(cache, ignore_errors=True)
                if kind == "restart":
                    shutil.copytree(caches[backend], cache)
                taken = run("load", way, backend, str(folders[backend]), cache=cache)
                if number:  # the first pair reads files that the system does not hold yet
                    times[backend].append(taken)
        medians = {
            what: {backend: statistics.median(taken[what] for taken in times[backend]) for backend in BACKENDS}
            for what in ("from_start_s", "load_and_call_s")
        }
        ratios = {what: median["lnfold"] / median["inductor"] for what, median in medians.items()}
        results.append(
            {"way": way, "cache": kind, "median_s": medians, "lnfold_over_stock": ratios, "processes": times}
        )
        said = ", ".join(f"{what} {ratios[what]:.3f} of {medians[what]['inductor']:.2f}" for what in ratios)
        print(f"{way}, {kind}: {said}", flush=True)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark as a command."""
    import recording

    from lncompile.comparisons.machine import describe_machine

    parser = argparse.ArgumentParser(description="How long does a fresh process take to its first answer?")
    parser.add_argument("--processes", type=int, default=9, help="pairs of processes of each kind (default: 9)")
    parser.add_argument("--output", type=Path, default=recording.RESULTS / "first_request.json")
    chosen = parser.parse_args(arguments)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as scratch:
        results = [result for way in WAYS for result in compare(way, chosen.processes, Path(scratch))]
    found = {
        "benchmark": "first_request",
        "measured": recording.now(),
        "commit": recording.commit(),
        "machine": {**machine, "threads": 1},
        "load_average_after": describe_machine()["load_average"],
        "model": {"width": WIDTH, "layers": LAYERS, "tokens": TOKENS},
        "results": results,
    }
    print(f"written to {recording.write_to(chosen.output, found)}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("save", "load"):
        step, way, backend, folder, started = sys.argv[1:]
        if step == "save":
            save(way, backend, Path(folder))
            print("{}")
        else:
            print(json.dumps(load(way, backend, Path(folder), float(started))))
        sys.exit()
    sys.exit(main())
