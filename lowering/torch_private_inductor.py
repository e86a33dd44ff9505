"""How a graph is handed to Inductor, and what its configuration means: the private names of torch for that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from lncompile.lowering.torch_private import fake_mode_of
from lncompile.lowering.torch_private_caches import without_precompilation
from lncompile.lowering.torch_private_dynamo import innermost_function


def inductor_compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Make the Inductor call that backend="inductor" makes."""
    from torch._inductor.compile_fx import compile_fx

    # With other arguments compile_fx may return paths of packages; like this it returns a function.
    compiled: Any = compile_fx(graph_module, list(example_inputs), config_patches=config_patches)
    return compiled  # type: ignore[no-any-return]


def inductor_compile_later(graph_module: fx.GraphModule, config_patches: dict[str, Any]) -> Callable[..., Any] | None:
    """Make that call outside of Dynamo, for a graph that it captured, with the fake values that it computed then.

    Returns:
        The compiled function; None where compiling assumed something more of dynamic sizes, which Dynamo's guards, made
        long since, do not check.
    """
    from torch._guards import TracingContext, tracing

    examples = [node.meta["example_value"] for node in graph_module.graph.nodes if node.op == "placeholder"]
    mode = fake_mode_of(examples)
    environment = None if mode is None else mode.shape_env
    before = len(environment.guards) if environment is not None else 0
    with tracing(TracingContext(mode)):
        compiled = innermost_function(inductor_compile(graph_module, examples, config_patches))
    return compiled if environment is None or len(environment.guards) == before else None


def inductor_compile_apart(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Make that call while Dynamo compiles something, without a trace in what Dynamo knows of it.

    Its guards, its fake tensors and what AOTAutograd notes for it are those of the graph that is compiled in the end.

    Args:
        graph_module: what is compiled; its sizes are static.
        example_inputs: its inputs, none of them fake.
        config_patches: what differs from Inductor's own configuration.
    """
    from torch._functorch import config as functorch_config
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Without an environment for sizes, in which there are none here, Inductor's caches are not asked.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    # The mode knows a tensor that it has seen, as long as the fake one is held: here with the sizes that it has.
    static = [mode.from_tensor(value, static_shapes=True) for value in example_inputs if isinstance(value, Tensor)]
    # What is saved for other processes is what is compiled in the end.
    not_bundled = functorch_config.patch(bundled_autograd_cache=False)
    with tracing(TracingContext(mode)), not_bundled, without_precompilation():
        compiled = inductor_compile(graph_module, example_inputs, config_patches)
    del static  # had to live until here
    return innermost_function(compiled)


def called_apart() -> Any:
    """Context in which compiled code is called while Dynamo compiles something, as if it did not."""
    from torch._guards import tracing

    return tracing(None)


def uses_cuda_graphs(config_patches: Mapping[str, Any]) -> bool:
    """Whether Inductor records what it compiles into CUDA graphs."""
    from torch._inductor import config

    return bool(config_patches.get("triton.cudagraphs", config.triton.cudagraphs))


def configuration_in_words(config_patches: Mapping[str, Any]) -> str:
    """Return what Inductor is asked for, the settings of this process included, in a text that another one repeats.

    Folders, and what a process measures or logs, are left out.
    """
    from torch._inductor import config

    settings = {
        name: value
        for name, value in config.get_config_copy().items()
        if isinstance(value, bool | int | float | str | None) and not any(part in name for part in _NOT_OF_THE_CODE)
    }
    return repr(sorted({**settings, **config_patches}.items()))


# Parts of the names of settings that differ from one machine or folder to the next, and not in what is generated.
_NOT_OF_THE_CODE = ("_dir", "path", "log", "thread", "worker", "timeout", "trace", "debug", "cache", "_profile")


def inductor_config(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Resolve ``mode`` and ``options`` as backend="inductor" does, with its own errors for what it does not know."""
    wrapper: Any = torch._TorchCompileInductorWrapper
    return dict(wrapper(mode, options, None).config)


def inductor_option_names() -> list[str]:
    """Names of all Inductor options."""
    from torch._inductor import config

    return list(config.get_config_copy())


def freezes_weights(config_patches: Mapping[str, Any]) -> bool:
    """Whether Inductor makes constants of the weights that Dynamo hands over as attributes of the graph."""
    from torch._inductor import config

    return bool(config_patches.get("freezing", config.freezing)) and not torch.is_grad_enabled()


def tunes_products(config_patches: Mapping[str, Any]) -> bool:
    """Whether Inductor times its own kernels of matrix products against a library's."""
    from torch._inductor import config

    names = ("max_autotune", "max_autotune_gemm")
    return any(bool(config_patches.get(name, getattr(config, name))) for name in names)


def generates_products(config_patches: Mapping[str, Any], device: torch.device) -> bool:
    """Whether Inductor generates the kernels of matrix products itself, each with the pointwise operations behind it.

    That is max-autotune with its own templates alone to choose from. Where ATen's kernels compete with them a
    measurement decides, product by product, and what stands behind one that loses gets a kernel of its own. Not
    before torch 2.13: on 2.11 a ViT of two layers took 26 launches with its scales behind the products, 24 without.
    """
    from torch._inductor import config

    def setting(name: str) -> Any:
        return config_patches.get(name, getattr(config, name))

    templates = {"cuda": {"TRITON"}, "cpu": {"CPP"}}.get(device.type)
    chosen = {backend.strip() for backend in setting("max_autotune_gemm_backends").upper().split(",")}
    tunes = tunes_products(config_patches)
    return bool(tunes and setting("epilogue_fusion") and chosen == templates and torch.__version__ >= "2.13")


def writes_products_as_sums(config_patches: Mapping[str, Any], device: torch.device) -> bool:
    """Whether Inductor itself writes products of one row that have no bias as sums (max-autotune, or by this option).

    Its decomposition of `mm` does so only then, because only then the sums reach a GPU's bandwidth.
    """
    from torch._inductor import config

    tunes = config_patches.get("coordinate_descent_tuning", config.coordinate_descent_tuning)
    return bool(tunes) and device.type == "cuda"


def without_freezing() -> Any:
    """Context in which Dynamo hands weights over as inputs, whatever Inductor's ``freezing`` says."""
    from torch._inductor import config

    return config.patch(freezing=False)


def inductor_reset(config_patches: dict[str, Any]) -> None:
    """Do what torch._dynamo.reset() asks of backend="inductor": drop CUDA-graph trees."""
    if uses_cuda_graphs(config_patches):
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()
