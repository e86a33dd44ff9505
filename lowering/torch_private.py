"""Every private torch name this project uses, in one place, each with what it is for.

Nothing outside this module may import or spell a name of torch that starts with an underscore (a test checks it), so
that a new torch release is ported by reading this file. It imports nothing of ours.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx
from torch.utils import _pytree

# --- Dynamo's graph -------------------------------------------------------------------------------------------------

# What Dynamo writes where nn.Linear and friends call ATen's own bindings instead of torch.nn.functional.
NN_BINDINGS: Any = torch._C._nn

# The one opaque operator that nn.TransformerEncoderLayer becomes in eval mode under no_grad ("fast path").
TRANSFORMER_ENCODER_LAYER_FORWARD: Any = torch._transformer_encoder_layer_fwd

# Nodes that switch autocast on and off inside a graph (`with torch.autocast` in a model's forward).
AUTOCAST_REGION_NAMES = ("_enter_autocast", "_exit_autocast")


def symbolic_expression(size: torch.SymInt) -> Any:
    """Return the sympy expression of a dynamic size, without guarding on its value."""
    return size.node.expr


def size_hint(size: Any, fallback: int) -> int:
    """Return the value a dynamic size had when the graph was traced (no guard), or ``fallback`` where unknown."""
    if isinstance(size, int):
        return size
    node = size.node
    return int(node.hint) if node.has_hint() else fallback


def storage_identity(value: Tensor) -> int | None:
    """Return a number that two tensors share exactly when they share storage; None where there is no storage."""
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        # Tensor subclasses without a storage of their own, sparse and mkldnn tensors.
        return None


def is_static_input(placeholder: fx.Node) -> bool:
    """Whether Dynamo marked a placeholder as a parameter or buffer of a module (the same object at each call)."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def mark_static_input(placeholder: fx.Node) -> None:
    """Mark a new placeholder as one whose tensor is a weight, so that CUDA graphs neither copy nor guard it."""
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    placeholder._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd reads it of every placeholder


def copy_placeholder_source(old: fx.Node, new: fx.Node) -> None:
    """Carry over what Graph.graph_copy drops: the source Dynamo keeps on a placeholder."""
    new._dynamo_source = getattr(old, "_dynamo_source", None)  # type: ignore[attr-defined]


def copy_graph_module_attributes(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Carry over what AOTAutograd reads from the graph module Dynamo made."""
    new.meta = dict(old.meta)
    for name in ("_param_name_to_source", "_backend_id", "_compiled_fn_id"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))


def source_name(placeholder: fx.Node) -> str | None:
    """Return the Python expression of a placeholder (``L['self']._modules['h']...``), or None."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source.name
    return str(name() if callable(name) else name)


def is_tensor_subclass(value: Any) -> bool:
    """Whether a tensor is neither a plain Tensor nor Parameter nor Buffer (quantized weights, DTensor, ...)."""
    from torch._subclasses.fake_tensor import FakeTensor

    return type(value) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor)


# --- Inductor -------------------------------------------------------------------------------------------------------


def inductor_compile(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], config_patches: dict[str, Any]
) -> Callable[..., Any]:
    """Make the Inductor call that backend="inductor" makes."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Callable[..., Any] = compile_fx(graph_module, list(example_inputs), config_patches=config_patches)
    return compiled


def inductor_config(mode: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Resolve ``mode`` and ``options`` as backend="inductor" does, with its own errors for what it does not know."""
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def inductor_option_names() -> list[str]:
    """Names of all Inductor options."""
    from torch._inductor import config

    return list(config.get_config_copy())


def inductor_reset(config_patches: dict[str, Any]) -> None:
    """Do what torch._dynamo.reset() asks of backend="inductor": drop CUDA-graph trees."""
    from torch._inductor import config

    if config_patches.get("triton.cudagraphs", config.triton.cudagraphs):
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


# --- Dynamo as seen from outside ------------------------------------------------------------------------------------


def innermost_backend(compiled: Any) -> Any:
    """Return the object torch.compile made for (backend, mode, options) of a compiled callable, or None."""
    from torch._dynamo.eval_frame import innermost_backend as innermost

    callback = getattr(compiled, "dynamo_ctx", compiled)
    callback = getattr(callback, "callback", None) or getattr(compiled, "_torchdynamo_orig_backend", None)
    return None if callback is None else innermost(callback)


def original_callable(compiled: Any) -> Any:
    """Return what a torch.compile'd module or function was compiled from; anything else as it is."""
    if isinstance(compiled, torch.nn.Module) and hasattr(compiled, "_orig_mod"):
        return compiled._orig_mod
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


def many_recompiles() -> Any:
    """Context in which Dynamo compiles one code object as often as it must (explaining many models of one class)."""
    return torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)


def count(key: str, amount: int = 1) -> None:
    """Add to ``torch._dynamo.utils.counters["lnfold"][key]``."""
    from torch._dynamo.utils import counters

    counters["lnfold"][key] += amount


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write a JSON artifact into torch's structured trace, where tlparse shows it beside the graph."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


# --- What an operator may write to ------------------------------------------------------------------------------------

# An ATen or custom operator with one schema, a packet of them, and operators that take graphs (checkpoint, cond, ...).
OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
HigherOrderOperator = torch._ops.HigherOrderOperator


def schema_of(overload: Any) -> Any:
    """Return the schema of an operator overload, which says which arguments it writes to."""
    return overload._schema


# --- Tensors --------------------------------------------------------------------------------------------------------

# Counts the in-place writes to a tensor that autograd can see (not those through `.data`).
version_of: Callable[[Tensor], int] = operator.attrgetter("_version")


def fake_mode_of(value: Any) -> Any:
    """Return the mode in which operations on this fake tensor are traced, to be entered as a context."""
    return value.fake_mode


def make_static(values: Sequence[Tensor], example_inputs: Sequence[Any]) -> None:
    """Tell the tracer that these weights have fixed shapes, whatever ``dynamic=True`` says of the other inputs."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None and context.fake_mode.shape_env is not None:
        for value in values:
            # Remembered by the mode: AOTAutograd gets this fake tensor when it converts the same value.
            context.fake_mode.from_tensor(value, static_shapes=True)


# Base class of what Dynamo raises to itself (start again with other assumptions, give this frame up, ...).
DynamoException: type[Exception] = torch._dynamo.exc.TorchDynamoException


def code_being_compiled() -> Any:
    """Return the code object whose frame Dynamo is compiling; None outside of Dynamo (a backend called by hand)."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx.f_code
    except AttributeError:
        return None


def tree_map(function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply a function to every leaf of nested containers, model outputs included."""
    return _pytree.tree_map(function, tree)


def leaves_with_path(tree: Any) -> list[tuple[str, Any]]:
    """Return every leaf of nested containers with where it stands, as an expression: ``".logits"``, ``"[0]"``."""
    return [(_pytree.keystr(path), leaf) for path, leaf in _pytree.tree_flatten_with_path(tree)[0]]
