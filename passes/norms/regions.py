"""Regions compiled once and called often (``torch.compiler.nested_compile_region``), written out where norms fold.

A stream that goes through a region enters it as an argument and leaves it as a result, so nothing in it can be centered
without its callers. The pipeline therefore looks at a graph with its regions written out, each call with the weights it
has. A call that has no part in what folds is a call of the region again when the graph goes to Inductor::

    y = invoke_subgraph(body, "subgraph_0", x, γ, W)[0]     ⇄     n = layer_norm(x, (16,), γ); y = x + linear(n, W)

What it costs is the compilation of each call that was written out, as without the region.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.bodies import Call, body_at, call_of, counterparts
from lncompile.passes.graph.canonical import value_of
from lncompile.passes.graph.provenance import dotted, parameter_name
from lncompile.passes.norms.expand import EXPANDED_FROM

_REGION: Any = torch.ops.higher_order.invoke_subgraph
# What changes how all that follows is computed, and cannot be tried out on fake tensors.
_MODES = (torch_private.SET_GRAD_ENABLED, torch_private.ENTER_AUTOCAST, torch_private.EXIT_AUTOCAST)
_UNKNOWN_SIZE = -1


def find_regions(graph: fx.Graph) -> list[fx.Node]:
    """Return the calls of regions that can be written out."""
    return [node for node in graph.nodes if node.target is _REGION and _can_be_written_out(node)]


def _can_be_written_out(node: fx.Node) -> bool:
    call = call_of(node)
    if call is None or any(user.target is not operator.getitem for user in node.users):
        return False
    return all(_can_stand_elsewhere(inner) for inner in call.bodies[0].graph.nodes)


def _can_stand_elsewhere(node: fx.Node) -> bool:
    """Whether an operation of a region can stand in another graph, with other operands."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "get_attr":
        return body_at(node) is not None
    if node.target is _REGION:
        return _can_be_written_out(node)
    if node.op not in ("call_function", "call_method") or node.target in _MODES:
        return False
    # A size that data decides has a symbol, which would be given a second time.
    return not isinstance(node.target, torch_private.HigherOrderOperator) and _sizes_are_known(value_of(node))


def _sizes_are_known(value: Any) -> bool:
    leaves = torch_private.tree_leaves(value)
    numbers = itertools.chain.from_iterable(leaf.shape if isinstance(leaf, Tensor) else [leaf] for leaf in leaves)
    sizes = [number for number in numbers if isinstance(number, int | torch.SymInt)]
    return all(torch_private.size_hint(size, _UNKNOWN_SIZE) != _UNKNOWN_SIZE for size in sizes)


def write_out_regions(graph: fx.Graph, names: Collection[str]) -> None:
    """Write out the calls of regions with these node names, regions within them included.

    Args:
        graph: changed in place.
        names: which of :func:`find_regions` to write out.
    """
    for node in find_regions(graph):
        call = call_of(node)
        if node.name not in names or call is None:
            continue
        with graph.inserting_before(node):
            results = _write_out(graph, call, node.name)
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        body = node.all_input_nodes[0]
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _write_out(graph: fx.Graph, call: Call, origin: str) -> Any:
    """Append what a call of a region computes; returns its results."""
    (body,) = call.bodies
    copies: dict[fx.Node, Any] = counterparts(call, body)
    move = _move(graph, copies)
    mode = torch_private.fake_mode_of([value_of(v) for v in copies.values() if isinstance(v, fx.Node)])
    for node in body.graph.nodes:
        args, kwargs = (fx.map_arg(part, copies.get) for part in (node.args, node.kwargs))
        inner = call_of(node)
        if node.op == "output":
            return args[0]
        if inner is not None:
            operands = fx.map_arg(inner.operands, copies.__getitem__)
            copies[node] = _write_out(graph, Call(inner.bodies, operands), origin)
        elif node.target is operator.getitem and isinstance(copies[node.args[0]], tuple | list):
            copies[node] = copies[node.args[0]][node.args[1]]  # one of the results of a region within
        elif node.target == "item" and not isinstance(_operand(args[0]), Tensor):
            # A number that Dynamo has read already where the region was traced with the tensor that holds it.
            copies[node] = args[0]
        elif node.op in ("call_function", "call_method"):
            copy = copies[node] = graph.create_node(node.op, node.target, args, kwargs, name=node.name)
            copy.meta = {key: node.meta[key] for key in ("stack_trace", "source_fn_stack") if key in node.meta}
            copy.meta |= {EXPANDED_FROM: origin, "nn_module_stack": _moved(node, move)}
            copy.meta["example_value"] = _value(copy, mode)
    raise AssertionError("a graph ends in its output")


def _operand(value: Any) -> Any:
    return value_of(value) if isinstance(value, fx.Node) else value


def _value(node: fx.Node, mode: Any) -> Any:
    """The fake value of a node with the operands it has now: of their storages, where it is a view of one."""
    args: Any = fx.map_arg(node.args, value_of)
    kwargs: Any = fx.map_arg(dict(node.kwargs), value_of)
    target: Any = node.target
    with torch.no_grad(), mode:
        return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _move(graph: fx.Graph, counterparts: Mapping[fx.Node, Any]) -> tuple[str, str]:
    """The module that a region was traced in, and the one that another call of it stands for, by their paths.

    The names of the weights tell: ``h.0.norm.weight`` and ``h.3.norm.weight`` are of ``h.0`` and ``h.3``. A placeholder
    of a region has the name of the weight it was traced with.
    """
    inputs = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    for placeholder, operand in counterparts.items():
        one = inputs.get(placeholder.name)
        if one is not None and isinstance(operand, fx.Node) and operand.op == "placeholder":
            was, becomes = parameter_name(one).split("."), parameter_name(operand).split(".")
            while was and becomes and was[-1] == becomes[-1]:
                was.pop()
                becomes.pop()
            if was and becomes:
                return ".".join(was), ".".join(becomes)
    return "", ""


def _moved(node: fx.Node, move: tuple[str, str]) -> dict[str, tuple[str, Any]]:
    """The modules a node was traced in, as those of the call that it is written out for."""
    was, becomes = move
    moved = {}
    for key, (path, kind) in (node.meta.get("nn_module_stack") or {}).items():
        name = dotted(path)
        inside = was and f"{name}.".startswith(f"{was}.")
        moved[key] = (becomes + name[len(was) :] if inside else path, kind)
    return moved
