"""The private torch names of tools that look at what Inductor generates, or have it generate for a device not there.

The second half of :mod:`.torch_private`: nothing that compiles a user's model needs it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, fx

# --- Reading the generated code --------------------------------------------------------------------------------------

# Every cache that could answer in place of code generation: FX graphs (Inductor) and whole AOTAutograd results, on disk
# and remote. Not `force_disable_caches`: that also throws away compiled C++ and makes each look cost a g++ run.
_INDUCTOR_GRAPH_CACHES = {"fx_graph_cache": False, "fx_graph_remote_cache": False}
_AUTOGRAD_CACHES = {"enable_autograd_cache": False, "enable_remote_autograd_cache": False}


@contextlib.contextmanager
def recorded_wrappers() -> Iterator[list[str]]:
    """Context that lists the wrapper modules Inductor writes within it, whichever backend called it.

    `GraphLowering.save_output_code` is Inductor's own hook for this; it is called once for each graph, forward and
    backward. Unlike `torch._inductor.utils.run_and_get_code` the list keeps graphs whose text is the same.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config
    from torch._inductor.graph import GraphLowering

    wrappers: list[str] = []
    with (
        inductor_config.patch(_INDUCTOR_GRAPH_CACHES),
        functorch_config.patch(_AUTOGRAD_CACHES),
        mock.patch.object(GraphLowering, "save_output_code", wrappers.append),
    ):
        yield wrappers


def empty_compiler_caches() -> contextlib.AbstractContextManager[None]:
    """Context in which Inductor's and Triton's caches, on disk and in memory, are empty and answer nothing."""
    from torch._inductor.utils import fresh_cache

    context: contextlib.AbstractContextManager[None] = fresh_cache()
    return context


def count_of(group: str, key: str) -> int:
    """Return one of Dynamo's counters, ``("inductor", "cudagraph_skips")`` say."""
    from torch._dynamo.utils import counters

    return int(counters[group][key])


# --- Compiling for a device that is not there ------------------------------------------------------------------------


@contextlib.contextmanager
def replaced_inner_compile(replace: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Context in which each graph that reaches Inductor is compiled by ``replace(Inductor's own function)``.

    `compile_fx(inner_compile=compile_fx_inner)` binds its default when torch is imported, so patching
    `compile_fx_inner` reaches no backend that is content with the default. `compile_fx_inner` itself, though, looks
    `_compile_fx_inner` up at each call: patched there, every caller of `compile_fx` is covered, ours included.
    """
    from torch._inductor import compile_fx

    with mock.patch.object(compile_fx, "_compile_fx_inner", replace(compile_fx._compile_fx_inner)):
        yield


@contextlib.contextmanager
def generated_but_not_loaded(sink: Callable[[str], None]) -> Iterator[None]:
    """Context in which Inductor generates code and hands it to ``sink`` in place of importing it."""
    from torch._inductor.graph import GraphLowering

    def generate_only(self: Any) -> SimpleNamespace:
        sink(self.codegen()[0].value)
        return SimpleNamespace(call=lambda args: None, __file__=None)

    with mock.patch.object(GraphLowering, "compile_to_module", generate_only):
        yield


@contextlib.contextmanager
def every_graph_lowered() -> Iterator[None]:
    """Context in which each traced graph reaches Inductor: not answered by a cache, and the backward graph not left
    until it is first called.
    """
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    autograd = {**_AUTOGRAD_CACHES, "force_non_lazy_backward_lowering": True}
    with inductor_config.patch(_INDUCTOR_GRAPH_CACHES), functorch_config.patch(autograd):
        yield


def self_contained_compilation() -> contextlib.AbstractContextManager[Any]:
    """Context in which kernels are compiled here and now.

    Worker processes would miss patches made in this one, a cache could answer with a kernel of another device, and
    Inductor's static launcher wants to load each kernel onto the device.
    """
    from torch._inductor import config as inductor_config

    options = {"force_disable_caches": True, "compile_threads": 1, "use_static_cuda_launcher": False}
    patch: contextlib.AbstractContextManager[Any] = inductor_config.patch(options)
    return patch


def fake_tensors_on(device: torch.device, values: Sequence[Any]) -> tuple[Any, list[Any]]:
    """Return the fake tensor mode of a graph's example inputs, and inputs like them that lie on ``device``."""
    mode = torch._guards.detect_fake_mode(values)
    if mode is None:
        raise RuntimeError("Inductor was called without fake tensors; only graphs that torch.compile made are handled")
    with mode:
        moved = [
            torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
            if isinstance(value, Tensor)
            else value
            for value in values
        ]
    return mode, moved


def propagate_fake_tensors(graph_module: fx.GraphModule, mode: Any, inputs: Sequence[Any]) -> None:
    """Recompute ``node.meta["val"]``, from which Inductor takes the device of each node."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)


def real_constants_among_fake_tensors(mode: Any) -> contextlib.AbstractContextManager[Any]:
    """Context in which graphs may hold real tensors; Inductor propagates fake tensors once more on its own."""
    return mock.patch.object(mode, "allow_non_fake_inputs", True)


def without_cuda_graphs(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return `_compile_fx_inner`'s keyword arguments with CUDA graphs off: recording one needs the device."""
    from torch._inductor.utils import BoxedBool

    return {**arguments, "cudagraphs": BoxedBool(False)}


def takes_a_list_of_arguments(function: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """Mark a function as following AOTAutograd's "boxed" calling convention: one list, which it may empty."""
    function._boxed_call = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def cuda_pretence(properties: Any, target: Any) -> Iterator[None]:
    """Context in which torch, Inductor and Triton believe in one CUDA device with the given properties.

    Args:
        properties: an object with the attributes of `torch.cuda.get_device_properties`.
        target: Triton's `GPUTarget`, what kernels are hashed and compiled for.
    """
    import triton
    from torch._dynamo import device_interface
    from torch._inductor.runtime import triton_helpers

    def always(value: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: value

    driver = SimpleNamespace(get_current_target=always(target), get_current_device=always(0))
    patches: list[tuple[Any, str, Any]] = [
        # Code generation reads the properties, once through torch.cuda and once through a name bound at import.
        (torch.cuda, "get_device_properties", always(properties)),
        (device_interface.CudaInterface, "get_device_properties", staticmethod(always(properties))),
        # Steers block sizes and warps, silently: without it the source is the same and the launch configs are not.
        (torch.cuda, "is_available", always(True)),
        # What that claim drags in: nothing may initialise CUDA, choose a device or touch its random state.
        (torch.cuda, "device", always(contextlib.nullcontext())),
        (torch.cuda, "current_device", always(0)),
        (torch.cuda, "device_count", always(1)),
        (torch.cuda, "get_rng_state", always(torch.zeros(16, dtype=torch.uint8))),
        (torch.cuda, "set_rng_state", always(None)),
        # Triton: libcuda is not there to be asked; each generated kernel asks for it when it is imported.
        (triton.runtime.driver, "_active", driver),
        (triton_helpers, "set_driver_to_gpu", always(None)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        _forget_devices()
        # On the way out too: nothing may remember the device that was never there.
        stack.callback(_forget_devices)
        yield


def _forget_devices() -> None:
    """Clear the process-wide memos of which device there is and what it can do."""
    from torch._inductor import utils as inductor_utils
    from torch._inductor.runtime.hints import DeviceProperties
    from torch.utils import _triton as triton_utils

    # `create` is a classmethod around a memoised function, reached through __func__.
    functions = [*vars(triton_utils).values(), *vars(inductor_utils).values(), DeviceProperties.create.__func__]  # type: ignore[attr-defined]
    for function in functions:
        if hasattr(function, "cache_clear") and getattr(function, "__module__", "").startswith("torch"):
            function.cache_clear()


# --- Compiled kernels ------------------------------------------------------------------------------------------------


def compile_launch_config(autotuner: Any, config: Any) -> Any:
    """Compile one launch configuration of a generated kernel with Inductor's own options; Triton's CompiledKernel."""
    return autotuner._precompile_config(config).kernel


# --- Running a CUDA wrapper on CPU tensors ---------------------------------------------------------------------------

# What a wrapper generated for CUDA calls on the device, and what to call in its place. Allocation keeps its arguments;
# a stream is only handed to launches, which the interpreter ignores.
CUDA_TO_CPU_TEXT = (
    ("empty_strided_cuda(", "empty_strided_cpu("),
    ("from torch._C import _cuda_getCurrentRawStream as get_raw_stream", "get_raw_stream = lambda index: 0"),
)


@contextlib.contextmanager
def cuda_device_switching_ignored() -> Iterator[None]:
    """Context in which the wrapper's device guard and `torch.cuda.set_device` do nothing."""
    with (
        mock.patch.object(torch.cuda, "_DeviceGuard", return_value=contextlib.nullcontext()),
        mock.patch.object(torch.cuda, "set_device"),
    ):
        yield


@contextlib.contextmanager
def replaced_libdevice(libdevice: Any) -> Iterator[None]:
    """Context in which kernels imported within it find ``libdevice`` where Inductor's kernels import it from."""
    from torch._inductor.runtime import triton_helpers

    with mock.patch.object(triton_helpers, "libdevice", libdevice):
        yield
