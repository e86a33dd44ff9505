"""Generated Triton kernels compiled for a GPU and counted in their machine code, on a machine without one.

Triton's own `ptxas` and `cuobjdump` do it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import Kernel
from lncompile.lowering.inspect.triton_without_gpu import H200, GpuProperties, pretend_gpu, require_triton


@dataclass(frozen=True)
class MachineCode:
    """One kernel compiled for one launch configuration, counted in its SASS.

    Compare two kernels compiled by the same Triton: absolute numbers move with its version.

    Attributes:
        instructions: SASS instructions, without the padding behind the end.
        shuffles: exchanges between the lanes of a warp (SHFL): 5 reduce one value over a warp.
        barriers: synchronisations of a block (BAR).
        loads: loads from global memory (LDG). One instruction moves up to 16 bytes a thread.
        stores: stores to global memory (STG).
        spills: loads and stores of registers that did not fit (LDL, STL).
        calls: function calls (CALL).
        loops: branches backward. Without any, ``instructions`` is what a warp issues at most.
        registers: registers a thread.
        stack: stack bytes a thread.
        shared_memory: shared memory bytes a block.
        warps: warps a block.
        blocks: the launch configuration's block sizes (XBLOCK, R0_BLOCK).
        operations: how often each SASS operation occurs, by its name without suffixes.
        text: the SASS as cuobjdump prints it.
    """

    instructions: int
    shuffles: int
    barriers: int
    loads: int
    stores: int
    spills: int
    calls: int
    loops: int
    registers: int
    stack: int
    shared_memory: int
    warps: int
    blocks: Mapping[str, int]
    operations: Mapping[str, int]
    text: str

    @classmethod
    def from_listing(
        cls, sass: str, resources: str, *, shared_memory: int, warps: int, blocks: Mapping[str, int]
    ) -> Self:
        """Count in the listings of ``cuobjdump -sass`` and ``cuobjdump -res-usage``.

        Raises:
            ValueError: the listings are not of one kernel.
        """
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", sass, re.MULTILINE)
        while names and names[-1] in ("NOP", "BRA"):  # behind EXIT: a branch to itself and padding
            names.pop()
        used = {key: re.search(rf"{key}:(\d+)", resources) for key in ("REG", "STACK")}
        registers, stack = used["REG"], used["STACK"]
        if not names or registers is None or stack is None:
            raise ValueError("not a listing of cuobjdump: found no instructions or no resource usage")
        operations = Counter(names)
        branches = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/[^;]*\bBRA\b[^;]*?\b0x([0-9a-f]+)", sass, re.MULTILINE)
        return cls(
            instructions=len(names),
            shuffles=operations["SHFL"],
            barriers=operations["BAR"],
            loads=operations["LDG"],
            stores=operations["STG"],
            spills=operations["LDL"] + operations["STL"],
            calls=operations["CALL"],
            # The last branch, behind EXIT, is to itself.
            loops=sum(int(target, 16) < int(address, 16) for address, target in branches),
            registers=int(registers[1]),
            stack=int(stack[1]),
            shared_memory=shared_memory,
            warps=warps,
            blocks=dict(blocks),
            operations=dict(operations),
            text=sass,
        )

    def per_row(self, count: int) -> float:
        """What all warps together do of something for one row of a reduction, or for one element of a pointwise kernel.

        Args:
            count: what a warp does of it, one of the attributes.
        """
        return count * self.warps / self.blocks.get("XBLOCK", 1)


def compile_kernel(kernel: Kernel, properties: GpuProperties = H200) -> tuple[MachineCode, ...]:
    """Compile a generated Triton kernel with Inductor's options, for each launch configuration it would try.

    Args:
        kernel: a Triton kernel from `triton_for_sm90`.
        properties: the device.

    Returns:
        One entry for each configuration, in Inductor's order; of several the device would time each and keep one.

    Raises:
        ImportError: Triton is not installed.
        ValueError: the kernel is not a Triton kernel.
        RuntimeError: this process runs Triton's interpreter (TRITON_INTERPRET=1), or cuobjdump failed.

    Example:
        >>> [code.shuffles for code in compile_kernel(triton_for_sm90(rms_norm, x, (1024,)).kernels[0])]
        [5]
    """
    if kernel.language != "triton":
        raise ValueError(f"kernel {kernel.name!r} is written in {kernel.language}, only Triton's compile to SASS")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 is set: one process cannot both interpret and compile Triton kernels")
    with pretend_gpu(properties), tempfile.TemporaryDirectory(prefix="lncompile_") as folder:
        autotuner = _load(kernel, Path(folder))
        compiled = [torch_private_codegen.compile_launch_config(autotuner, config) for config in autotuner.configs]
        return tuple(_disassemble(c, config.kwargs) for c, config in zip(compiled, autotuner.configs, strict=True))


def _load(kernel: Kernel, folder: Path) -> Any:
    """Import a kernel's text; Inductor's autotuner object for it."""
    # Triton reads the source of a kernel from its file, so there has to be one; its name must be new each time.
    digest = hashlib.sha256(kernel.source.encode()).hexdigest()[:16]
    path = folder / f"lncompile_kernel_{digest}.py"
    path.write_text(kernel.source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


def _disassemble(compiled: Any, blocks: Mapping[str, int]) -> MachineCode:
    """Count in a CompiledKernel of Triton's."""
    tools = Path(require_triton().__file__ or "").parent / "backends" / "nvidia" / "bin"
    # cuobjdump looks for its helper nvdisasm on PATH.
    environment = {**os.environ, "PATH": os.pathsep.join([str(tools), os.environ.get("PATH", "")])}

    def listing(option: str, cubin: str) -> str:
        command = [str(tools / "cuobjdump"), option, cubin]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        return done.stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass, resources = listing("-sass", file.name), listing("-res-usage", file.name)
    metadata = compiled.metadata
    return MachineCode.from_listing(
        sass, resources, shared_memory=metadata.shared, warps=metadata.num_warps, blocks=blocks
    )
