"""What does the norm's kernel cost, LayerNorm's against RMSNorm's? Counted in the code, without a GPU or a clock.

Residual add, norm, affine and cast are one kernel. This has Inductor generate it for sm_90 over a table of widths, row
counts and dtypes, compiles every launch configuration that Inductor would try, and counts in its machine code:

- ``layer_norm``: what stock torch.compile makes of ``layer_norm(x + residual)``;
- ``rms_norm``: what it makes of the folded norm by itself;
- ``lnfold``: what the backend has it make, with rows up to 8192 wide held in registers; on a CPU, with rows of more
  than 4096 elements summed in slices, and the scale of all rows written before it is applied.

Instructions are counted a row and a warp (``instructions · warps / rows in a block``): what a scheduler has to issue,
since none of these kernels has a loop left in it (the table says so). The C++ kernels of the CPU are counted in their
text: loads and stores written, and passes over a row.

    python benchmarks/norm_kernels.py [--widths 64 ... --rows 1 ... --dtypes bfloat16 ...] [--time]

Prints a table and writes ``benchmarks/results/norm_kernels.json``. ``--time`` also times the three kernels on an NVIDIA
GPU, interleaved. ``norm_kernels_on_cpu.py`` times the C++ kernels.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import recording
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, fx
from torch.nn import functional

from lncompile.comparisons.machine import describe_machine
from lncompile.comparisons.timing import measure
from lncompile.lowering import FOLDED_STATISTIC, persistent_norms, rms_norm, torch_private_inductor
from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import GeneratedCode
from lncompile.lowering.inspect.machine_code import MachineCode, compile_kernel
from lncompile.lowering.inspect.triton_without_gpu import H200, triton_for_sm90
from lncompile.lowering.persistent import WIDEST_ROW

WIDTHS = (64, 768, 1024, 1280, 2048, 4096, 5120, 8192, 16384)
ROWS = (8192, 1, 65536)
DTYPES = ("bfloat16", "float16", "float32")
CPU_WIDTHS = (64, 768, 1024, 4096, 16384)
KINDS = ("layer_norm", "rms_norm", "lnfold")


def add_layer_norm(value: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Residual add and LayerNorm of ``[rows, width]``; the sum is read on."""
    total = value + residual
    return functional.layer_norm(total, (total.shape[-1],), weight, bias), total


def add_rms_norm(value: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The same with the norm that a folded LayerNorm becomes."""
    total = value + residual
    return rms_norm(total, (total.shape[-1],), weight, bias), total


def as_lnfold_compiles(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Hand the graph to Inductor as the backend does with a folded norm's."""
    for node in graph_module.graph.nodes:
        if node.target is torch.mean:
            node.meta["custom"] = dict(FOLDED_STATISTIC)
    with persistent_norms(graph_module, {}):
        return torch_private_inductor.inductor_compile(graph_module, inputs, {})


def compiled_by(kind: str) -> tuple[Callable[..., Any], str | Callable[..., Any]]:
    """Return the function and the backend of a kind."""
    function = add_layer_norm if kind == "layer_norm" else add_rms_norm
    return function, as_lnfold_compiles if kind == "lnfold" else "inductor"


def arguments(rows: int, width: int, dtype: str, device: str = "cpu") -> list[Tensor]:
    """Stream, residual, γ and β."""
    kind = {"dtype": getattr(torch, dtype), "device": device}
    return [
        torch.randn(rows, width, **kind) if device == "cuda" else torch.empty(rows, width, **kind) for _ in "xr"
    ] + [torch.ones(width, **kind) for _ in "wb"]


# --- sm_90 -----------------------------------------------------------------------------------------------------------


def launch(code: MachineCode) -> dict[str, Any]:
    """One launch configuration, as numbers; ``per_row`` is what all warps together do for one row."""
    return {
        "blocks": dict(code.blocks),
        "warps": code.warps,
        "instructions": code.instructions,
        "instructions_per_row": code.per_row(code.instructions),
        "loads_per_row": code.per_row(code.loads),
        "stores_per_row": code.per_row(code.stores),
        "shuffles_per_row": code.per_row(code.shuffles),
        "barriers": code.barriers,
        "loops": code.loops,
        "registers": code.registers,
        "spills": code.spills,
        "shared_memory": code.shared_memory,
    }


def sm90(kind: str, rows: int, width: int, dtype: str, known: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Kernels of one kind at one size, each with all launch configurations that Inductor would try.

    Args:
        kind: one of ``KINDS``.
        rows: of the input.
        width: of the input.
        dtype: of input, γ and β.
        known: machine code by the kernel's text, which is read and added to.
    """
    function, backend = compiled_by(kind)
    generated = triton_for_sm90(function, *arguments(rows, width, dtype), backend=backend)
    kernels = []
    for kernel in generated.kernels:
        if kernel.source not in known:
            known[kernel.source] = [launch(code) for code in compile_kernel(kernel)]
        kernels.append(
            {
                "persistent": "persistent_reduction(" in kernel.source,
                "welford": kernel.welford,
                "reductions": kernel.reductions,
                "loads": kernel.loads,
                "stores": kernel.stores,
                "launches": known[kernel.source],
            }
        )
    return kernels


COUNTS = ("instructions_per_row", "loads_per_row", "stores_per_row", "shuffles_per_row", "barriers")


def least(kernels: list[dict[str, Any]], count: str) -> float:
    """A count over all kernels, each in the configuration that has the least of it."""
    return float(sum(min(launch[count] for launch in kernel["launches"]) for kernel in kernels))


def not_less(candidate: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> list[str]:
    """In what a candidate does more than a baseline."""
    more = [count for count in COUNTS if least(candidate, count) > least(baseline, count)]
    if len(candidate) > len(baseline):
        more.append("kernels")
    if any(launch["spills"] for kernel in candidate for launch in kernel["launches"]):
        more.append("spills")
    return more


# --- C++ -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def generated_only() -> Iterator[list[str]]:
    """Context in which Inductor's C++ is generated and not compiled; the graph runs operation by operation."""
    wrappers: list[str] = []

    def replace(inductor: Callable[..., Any]) -> Callable[..., Any]:
        def generate(graph_module: fx.GraphModule, inputs: Sequence[Any], **keywords: Any) -> Callable[..., Any]:
            interpreter = fx.Interpreter(fx.GraphModule(graph_module, graph_module.graph))
            with torch_private_codegen.generated_but_not_loaded(wrappers.append):
                inductor(graph_module, inputs, **keywords)
            return torch_private_codegen.takes_a_list_of_arguments(lambda values: list(interpreter.run(*values)))

        return generate

    torch.compiler.reset()
    with torch_private_codegen.every_graph_lowered(), torch_private_codegen.replaced_inner_compile(replace):
        yield wrappers
    torch.compiler.reset()


def cpp(kind: str, rows: int, width: int, dtype: str) -> dict[str, Any]:
    """Counts in the C++ text of one kind at one size."""
    function, backend = compiled_by(kind)
    with generated_only() as wrappers:
        torch.compile(function, backend=backend, dynamic=False)(*arguments(rows, width, dtype))
    code = GeneratedCode.from_wrappers(wrappers)
    return {
        "kernels": len(code.kernels),
        "reductions": sum(kernel.reductions for kernel in code.kernels),
        "welford": any(kernel.welford for kernel in code.kernels),
        "loads": sum(kernel.loads for kernel in code.kernels),
        "stores": sum(kernel.stores for kernel in code.kernels),
        "passes": sum(kernel.source.count(f"static_cast<int64_t>({width}L); x1+=") for kernel in code.kernels),
    }


# --- Timing ----------------------------------------------------------------------------------------------------------


def timed(rows: int, width: int, dtype: str) -> dict[str, Any]:
    """Microseconds of the three kinds on this machine's GPU, interleaved, one CUDA graph of 20 launches each."""
    inputs = arguments(rows, width, dtype, "cuda")
    graphs: dict[str, Callable[[], None]] = {}
    for kind in KINDS:
        function, backend = compiled_by(kind)
        torch.compiler.reset()
        compiled = torch.compile(function, backend=backend, dynamic=False)
        compiled(*inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                compiled(*inputs)
        graphs[kind] = graph.replay
    timings = measure(graphs, seconds=0.5, device="cuda")
    return {
        **{f"{kind}_us": timings.median(kind) / 20 * 1e6 for kind in KINDS},
        **{f"lnfold_over_{kind}": str(timings.speedup("lnfold", kind)) for kind in KINDS[:2]},
    }


# --- Command ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Run the benchmark as a command."""
    parser = argparse.ArgumentParser(description="The norm's kernel, counted in its code.")
    parser.add_argument("--widths", type=int, nargs="+", help="default: from 64 to 16384")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="default: from 1 to 65536")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--time", action="store_true", help="time the kernels too; needs an NVIDIA GPU")
    parser.add_argument("--output", type=Path, default=recording.RESULTS, help="folder of the JSON")
    chosen = parser.parse_args()
    if chosen.time and not torch.cuda.is_available():
        parser.error("--time needs an NVIDIA GPU; norm_kernels_on_cpu.py times the CPU's kernels")
    chosen.widths = chosen.widths or list(WIDTHS)
    machine, measured = describe_machine("cuda" if chosen.time else "cpu"), recording.commit()
    table = Table("dtype", "rows", "width", *KINDS, "registers", "more than LN", title="instructions a row, per warp")
    result: dict[str, Any] = {
        "commit": measured,
        "measured_at": recording.now(),
        "machine": machine,
        "triton": importlib.metadata.version("triton"),
        "target": H200.name,
        "timed": chosen.time,
        "widest_row_in_registers": WIDEST_ROW,
        "cpp": [],
        "sm90": [],
    }
    known: dict[str, list[dict[str, Any]]] = {}
    # Row counts steer launch configurations only, in the same way whatever the dtype.
    groups = [(dtype, chosen.rows[0]) for dtype in chosen.dtypes]
    groups += [(chosen.dtypes[0], rows) for rows in chosen.rows[1:]]
    with torch.no_grad():
        for dtype in ("float32", "bfloat16"):
            for width in CPU_WIDTHS:
                counts = {kind: cpp(kind, 256, width, dtype) for kind in KINDS[:2]}
                result["cpp"].append({"dtype": dtype, "width": width, **counts})
        for done, (dtype, rows) in enumerate(groups, 1):
            for width in chosen.widths:
                cell = measured_cell(rows, width, dtype, known, table)
                result["sm90"].append({**cell, "timed": timed(rows, width, dtype)} if chosen.time else cell)
            # What is there if it is ended early: a whole run takes ten minutes.
            path = recording.write_to(chosen.output / "norm_kernels.json", {**result, "groups": [done, len(groups)]})
    Console().print(table)
    print(f"wrote {path}")
    return int(any(cell["more_than_layer_norm"] for cell in result["sm90"]))


def measured_cell(
    rows: int, width: int, dtype: str, known: dict[str, list[dict[str, Any]]], table: Table
) -> dict[str, Any]:
    """Count the three kinds at one size, and add them to the table as a row."""
    kinds = {kind: sm90(kind, rows, width, dtype, known) for kind in KINDS}
    more = not_less(kinds["lnfold"], kinds["layer_norm"])
    registers = max(launch["registers"] for kernel in kinds["lnfold"] for launch in kernel["launches"])
    counts = [f"{least(kinds[kind], 'instructions_per_row'):.0f}" for kind in KINDS]
    table.add_row(dtype, str(rows), str(width), *counts, str(registers), ", ".join(more) or "none")
    return {"dtype": dtype, "rows": rows, "width": width, **kinds, "more_than_layer_norm": more}


if __name__ == "__main__":
    sys.exit(main())
