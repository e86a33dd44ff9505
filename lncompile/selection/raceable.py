"""Whether a graph can be called several times while it is compiled, with nobody noticing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import rms_norm, torch_private
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.graph.effects import examples_of, storages_of, written_arguments

# Operators of these namespaces do what their schemas say and nothing else. (What a custom operator keeps to itself, a
# cache of keys and values for one, is not to be seen.)
_KNOWN_NAMESPACES = frozenset({"aten", "prims", "prim", "lncompile", "quantized", "quantized_decomposed"})
# Operators that run graphs, which are looked at as well.
_RUN_GRAPHS = frozenset(
    {
        "wrap",
        "wrap_with_autocast",
        "wrap_with_set_grad_enabled",
        "tag_activation_checkpoint",
        "invoke_subgraph",
        "cond",
        "while_loop",
        "scan",
        "flex_attention",
    }
)
_KNOWN_MODULES = frozenset({"torch", "_operator", "operator", "math", "_VariableFunctions", ""})
_PLAIN = (int, float, complex, bool, str, type(None), torch.dtype, torch.device)


def why_not(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> str:
    """Return why a graph cannot be raced with its inputs, in words; "" if it can.

    Args:
        graph_module: as Dynamo hands it to the backend. Not changed.
        example_inputs: the value of each placeholder.
    """
    tensors = [value for value in example_inputs if isinstance(value, Tensor)]
    if torch_private.fake_mode_of(tensors) is not None:
        return "its inputs have no values yet"
    if any(
        _is_dynamic(node.meta.get("example_value")) for node in graph_module.graph.nodes if node.op == "placeholder"
    ):
        return "its sizes are dynamic"
    if any(not isinstance(value, (*_PLAIN, Tensor)) for value in example_inputs):
        return "it takes something else than tensors and numbers"
    if torch.is_grad_enabled() and any(value.requires_grad for value in tensors):
        return "gradients are recorded (call the model under torch.no_grad())"
    for value in tensors:
        if torch_private.is_opaque_tensor(value) or value.layout is not torch.strided:
            return f"it takes a tensor that is not a plain one ({type(value).__name__})"
        if value.device.type == "meta":
            return "its inputs are on the meta device"
        if value.is_conj() or value.is_neg():
            return "it takes a tensor that is a view of another's conjugate or negative"
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return _unknown_effect(graph_module)


def written_inputs(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> frozenset[int] | None:
    """Return the positions of the inputs on whose memory a graph writes; None where it may write elsewhere.

    Args:
        graph_module: as Dynamo hands it to the backend. Not changed.
        example_inputs: the value of each placeholder.
    """
    graph = copy_graph_module(graph_module).graph
    storages = storages_of(graph, examples_of(graph, example_inputs))
    written: set[object] = set()
    for node in graph.nodes:
        for target in written_arguments(node):
            if target not in storages and target.op != "placeholder":
                if isinstance(target.meta.get("example_value"), Tensor):
                    return None
                continue  # a list or a tuple of the graph's own
            written.add(storages.get(target, target))
    if any(node.op == "get_attr" and storages.get(node, node) in written for node in graph.nodes):
        return None
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return frozenset(n for n, node in enumerate(placeholders) if storages.get(node, node) in written)


def _is_dynamic(value: Any) -> bool:
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return True
    if not isinstance(value, Tensor):
        return False
    return any(isinstance(size, torch.SymInt) for size in (*value.shape, *_strides(value)))


def _strides(value: Tensor) -> Collection[Any]:
    return value.stride() if value.layout is torch.strided else ()


def _unknown_effect(graph_module: fx.GraphModule) -> str:
    """What a graph calls that may do more than compute and write into its operands, in words; "" for nothing."""
    for module in graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            if node.op == "call_module" and not isinstance(module.get_submodule(str(node.target)), fx.GraphModule):
                return f"it calls a module whose effects are not known ({node.target})"
            if node.op == "call_function" and not _is_known(node.target):
                return f"it calls something whose effects are not known ({_name(node.target)})"
    return ""


def _is_known(target: Any) -> bool:
    if isinstance(target, torch_private.OpOverload | torch_private.OpOverloadPacket):
        return _namespace(target) in _KNOWN_NAMESPACES
    if isinstance(target, torch_private.HigherOrderOperator):
        return _name(target) in _RUN_GRAPHS
    module = getattr(target, "__module__", None) or ""
    if module.startswith("torch.distributed"):
        return False
    return target is rms_norm or module.split(".")[0] in _KNOWN_MODULES or _is_builtin(target)


def _is_builtin(target: Any) -> bool:
    """Whether it is a function of Python's that computes (``getattr``, ``max``), and not one that acts (``print``)."""
    return target in (getattr, max, min, abs, sum, len, int, float, bool, round, pow, slice, divmod, tuple, list)


def _namespace(target: Any) -> str:
    return str(target).partition(".")[0]  # "aten.add.Tensor", "aten.add"


def _name(target: Any) -> str:
    is_operator = isinstance(target, torch_private.OpOverload | torch_private.OpOverloadPacket)
    return str(target if is_operator else getattr(target, "__name__", target))
