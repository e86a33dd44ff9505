"""Inductor's Triton kernels for a Hopper GPU, generated, compiled and counted on a machine without a GPU.

The function is traced and run on CPU tensors as usual. Where Inductor is handed a graph, the graph's tensors are moved
to a CUDA device that exists in name only, Inductor generates the code it would generate there, and the caller gets
zeros for outputs. Triton's own `ptxas` and `cuobjdump` do the rest.

What is not as on the device:
- what Inductor settles by timing kernels (max-autotune) is out of reach;
- what torch decides before that point saw the CPU (what lnfold chooses by device asks `target_of`). Scaled dot product
  attention stays the CPU's operator, counted as one extern call as it would be on the device, but its inputs may be
  laid out otherwise; CUDA graphs are off;
- with the CPU build of torch, graphs that draw random numbers (dropout in training) fail in torch with "not linked
  with support for cuda devices".

Needs Triton (``pip install triton``, Linux), not the CUDA build of torch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor, fx

from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import GeneratedCode, Kernel
from lncompile.lowering.target import compiled_for


@dataclass(frozen=True)
class GpuProperties:
    """What `torch.cuda.get_device_properties` says of a device; the names are torch's.

    Sizes are in bytes, except ``regs_per_multiprocessor``, which counts 32-bit registers.
    """

    name: str
    gcnArchName: str
    major: int
    minor: int
    multi_processor_count: int
    total_memory: int
    L2_cache_size: int
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    regs_per_multiprocessor: int = 65536
    max_threads_per_multi_processor: int = 2048
    max_threads_per_block: int = 1024
    warp_size: int = 32

    @property
    def capability(self) -> int:
        """Compute capability as Triton writes it: 90 for sm_90."""
        return 10 * self.major + self.minor


H200 = GpuProperties(
    name="NVIDIA H200",
    gcnArchName="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=150754820096,
    L2_cache_size=62914560,
)


def require_triton() -> ModuleType:
    """Import Triton.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        import triton
    except ImportError as error:
        raise ImportError("generating CUDA kernels needs Triton, with or without a GPU: pip install triton") from error
    module: ModuleType = triton
    return module


@contextlib.contextmanager
def pretend_gpu(properties: GpuProperties = H200) -> Iterator[None]:
    """Context in which torch, Inductor and Triton believe in one CUDA device. Nothing may be launched within it.

    Args:
        properties: the device to believe in.

    Raises:
        ImportError: Triton is not installed.
    """
    require_triton()
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", properties.capability, properties.warp_size)
    with torch_private_codegen.cuda_pretence(properties, target), torch_private_codegen.self_contained_compilation():
        yield


# --- Generating ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetargetedCode(GeneratedCode):
    """Code generated for a GPU from graphs traced on the CPU.

    Attributes:
        inputs: for each wrapper in ``source`` the CPU arguments of its first call, in the wrapper's order (parameters
            first); empty for a wrapper that was not called. They are what `run_in_interpreter` takes.
    """

    inputs: tuple[tuple[Any, ...], ...] = ()


class Recorder:
    """Collects what is generated while `retargeted_to_gpu` is active."""

    def __init__(self) -> None:
        self._wrappers: list[str] = []
        self._inputs: list[tuple[Any, ...]] = []

    @property
    def code(self) -> RetargetedCode:
        """All code generated so far."""
        read = GeneratedCode.from_wrappers(self._wrappers)
        return RetargetedCode(read.source, read.kernels, read.extern_calls, tuple(self._inputs))

    @property
    def graph_count(self) -> int:
        """How many wrappers were generated so far."""
        return len(self._wrappers)

    def add_wrapper(self, source: str) -> None:
        """Record a wrapper as it is generated."""
        self._wrappers.append(source)
        self._inputs.append(())

    def add_call(self, graph: int, arguments: Sequence[Any]) -> None:
        """Record the arguments of a wrapper's first call, the wrapper given by its index."""
        if not self._inputs[graph]:
            self._inputs[graph] = tuple(arguments)


@contextlib.contextmanager
def retargeted_to_gpu(properties: GpuProperties = H200) -> Iterator[Recorder]:
    """Context in which every backend that ends in Inductor compiles CPU graphs for a GPU.

    Compiled functions return zeros of the right shape, stride and dtype (in a graph of dynamic shapes the right
    values, from running the graph operation by operation). CUDA graphs are off. The compiler is reset on entry and on
    exit, since neither an earlier CPU kernel nor one of these stand-ins may answer later calls.

    Args:
        properties: the device to generate for.

    Yields:
        A `Recorder`, whose ``code`` holds what was generated so far.

    Raises:
        ImportError: Triton is not installed.

    Example:
        >>> with retargeted_to_gpu() as recorder, torch.no_grad():
        ...     _ = torch.compile(model, backend="lnfold")(tokens)
        >>> recorder.code.launches
        12
    """
    require_triton()
    recorder = Recorder()

    def replace(inductor: Callable[..., Any]) -> Callable[..., Any]:
        def compile_for_gpu(graph_module: fx.GraphModule, example_inputs: Sequence[Any], **arguments: Any) -> Any:
            return _compile_for_gpu(inductor, graph_module, example_inputs, arguments, properties, recorder)

        return compile_for_gpu

    torch.compiler.reset()
    try:
        with (
            compiled_for(torch.device("cuda")),
            torch_private_codegen.every_graph_lowered(),
            torch_private_codegen.replaced_inner_compile(replace),
        ):
            yield recorder
    finally:
        torch.compiler.reset()


def triton_for_sm90(
    function: Callable[..., Any],
    *args: Any,
    backend: str | Callable[..., Any] = "inductor",
    options: Mapping[str, Any] | None = None,
    properties: GpuProperties = H200,
    **kwargs: Any,
) -> RetargetedCode:
    """Generate the Triton code of a function or module for an sm_90 device, by tracing it on CPU tensors.

    Args:
        function: a function or module, not compiled yet. It is compiled as one graph with static shapes. Under
            ``torch.no_grad()`` the inference graph is generated, otherwise forward and backward.
        args: its positional arguments, on the CPU. Their values do not matter; distinct arguments must not be one
            tensor, since Dynamo makes one input of it.
        backend: a backend that ends in Inductor, by name or as a function.
        options: options for ``torch.compile``, as the backend takes them.
        properties: the device.
        kwargs: its keyword arguments.

    Returns:
        Wrappers, Triton kernels, and the arguments each wrapper was called with.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: nothing was generated.
        Exception: what Dynamo raises where the function does not trace to one graph.

    Example:
        >>> x = torch.empty(8192, 1024, dtype=torch.bfloat16)
        >>> code = triton_for_sm90(torch.nn.functional.gelu, x)
        >>> [kernel.name for kernel in code.kernels]
        ['triton_poi_fused_gelu_0']
    """
    with retargeted_to_gpu(properties) as recorder:
        compiled = torch.compile(
            function,
            backend=backend,
            fullgraph=True,
            dynamic=False,
            options=dict(options) if options is not None else None,
        )
        compiled(*args, **kwargs)
    code = recorder.code
    if not code.source:
        raise RuntimeError(f"no code was generated: backend {backend!r} does not end in Inductor, or there is no graph")
    return code


def _compile_for_gpu(
    inductor: Callable[..., Any],
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    arguments: dict[str, Any],
    properties: GpuProperties,
    recorder: Recorder,
) -> Callable[[list[Any]], Any]:
    """Stand in for Inductor's compilation of one graph: generate code for the GPU, return something to call."""
    device = torch.device("cuda", 0)
    mode, inputs = torch_private_codegen.fake_tensors_on(device, example_inputs)
    # The copy is moved and given to Inductor, which changes it; the graph itself may still be run below.
    on_gpu = _moved_to(copy.deepcopy(graph_module), device)
    graph = recorder.graph_count
    with torch_private_codegen.real_constants_among_fake_tensors(mode):
        torch_private_codegen.propagate_fake_tensors(on_gpu, mode, inputs)
        with pretend_gpu(properties), torch_private_codegen.generated_but_not_loaded(recorder.add_wrapper):
            inductor(on_gpu, inputs, **torch_private_codegen.without_cuda_graphs(arguments))
    run = _stand_in(graph_module)

    def call(values: list[Any]) -> Any:
        # A graph without operations generates no wrapper.
        if graph < recorder.graph_count:
            recorder.add_call(graph, values)
        return run(values)

    return torch_private_codegen.takes_a_list_of_arguments(call)


def _moved_to(graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """Make every operation that names a device name the given one, in subgraphs too; copy constants to it.

    A graph captured on the device copies constants just so: ``torch.tensor([...], device="cuda")`` is a CPU tensor of
    the graph module and a `device_put`. Scalars stay, they mix with tensors of any device.
    """

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for module in graph_module.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        for node in list(module.graph.nodes):
            node.args = fx.node.map_aggregate(node.args, moved)
            node.kwargs = fx.node.map_aggregate(node.kwargs, moved)
            constant = getattr(module, node.target, None) if node.op == "get_attr" else None
            if isinstance(constant, Tensor) and constant.dim() > 0:
                with module.graph.inserting_after(node):
                    copied = module.graph.call_function(torch.ops.prims.device_put.default, (node, device))
                node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
        module.recompile()
    return graph_module


def _stand_in(graph_module: fx.GraphModule) -> Callable[[list[Any]], list[Any]]:
    """Return something on the CPU that yields what the graph yields, in shape, stride and dtype."""
    outputs = graph_module.graph.output_node().args[0]
    assert isinstance(outputs, (tuple, list)), "Inductor's graphs return a tuple"
    values = [output.meta["val"] if isinstance(output, fx.Node) else output for output in outputs]
    tensors = [value for value in values if isinstance(value, Tensor)]
    sizes = [size for tensor in tensors for size in (*tensor.size(), *tensor.stride())]
    if not all(isinstance(size, int) for size in sizes):

        def run_eagerly(arguments: list[Any]) -> list[Any]:
            return list(fx.Interpreter(graph_module).run(*arguments))

        return run_eagerly
    # As numbers: a fake tensor would keep the tracing context alive.
    kinds = [(v.size(), v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in values]

    def zeros(arguments: list[Any]) -> list[Any]:
        arguments.clear()
        return [
            torch.empty_strided(kind[0], kind[1], dtype=kind[2]).zero_() if isinstance(kind, tuple) else kind
            for kind in kinds
        ]

    return zeros


# --- Compiling and counting ------------------------------------------------------------------------------------------


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
