"""Inductor's Triton kernels for a Hopper GPU, generated on a machine without a GPU.

The function is traced and run on CPU tensors as usual. Where Inductor is handed a graph, the graph's tensors are moved
to a CUDA device that exists in name only, Inductor generates the code it would generate there, and the caller gets
zeros for outputs. What is generated can be compiled and counted (:mod:`.machine_code`).

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering.inspect import torch_private_codegen
from lncompile.lowering.inspect.generated_code import GeneratedCode
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
