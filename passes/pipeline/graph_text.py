"""A graph as text that people read: Python that says what is computed, where in the model, and in what shapes.

For example, of a linear layer and a norm behind it::

    def forward(
        x,  # f64[5, 16]
        linear_weight,  # f64[16, 16]  linear.weight
        norm_weight,  # f64[16]  norm.weight
    ):
        # linear (model.py:12)
        linear = torch._C._nn.linear(x, linear_weight, None)  # f64[5, 16]
        # norm (model.py:13)
        norm = torch.nn.functional.layer_norm(linear, (16,), norm_weight, None, 1e-05)  # f64[5, 16]
        return (norm,)

What our passes have put in stands under ``# lncompile``. It depends on nothing but the graph, so that texts of a graph
before and after a pass can be compared.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.graph import magic_methods

from lncompile.lowering import torch_private
from lncompile.passes.graph.canonical import value_of
from lncompile.passes.graph.provenance import location, module_path, parameter_name

_DTYPES = {"bfloat": "bf", "float": "f", "uint": "u", "int": "i", "complex": "c"}


def graph_text(graph: fx.Graph, locations: bool = True) -> str:
    """Return a graph as text.

    Args:
        graph: any graph.
        locations: whether to say at which lines of the model's source its operations stand.
    """
    lines = ["def forward("]
    lines += [_input(node) for node in graph.nodes if node.op == "placeholder"]
    lines.append("):")
    heading = ""
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            lines.append(f"    return {_argument(node.args[0])}")
            continue
        place = _place(node, locations)
        if place != heading:
            lines.append(f"    # {place}")
            heading = place
        lines.append(f"    {_with_comment(f'{node.name} = {_expression(node)}', described(value_of(node)))}")
    return "\n".join(lines) + "\n"


def described(value: Any) -> str:
    """Return dtype and sizes of a value: ``f64[5, 16]``; ``""`` for what is neither a tensor nor several.

    Example:
        >>> described(torch.zeros(5, 16))
        'f32[5, 16]'
    """
    if isinstance(value, Tensor):
        return f"{_dtype(value.dtype)}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
        return f"({', '.join(described(item) for item in value)})"
    return ""


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    for long, short in _DTYPES.items():
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def _with_comment(line: str, comment: str) -> str:
    return f"{line}  # {comment}" if comment else line


def _input(placeholder: fx.Node) -> str:
    name = parameter_name(placeholder)
    words = [described(value_of(placeholder)), "" if name == placeholder.name else name]
    return f"    {_with_comment(f'{placeholder.name},', '  '.join(word for word in words if word))}"


def _place(node: fx.Node, locations: bool) -> str:
    """Where an operation stands in the model."""
    if not node.meta.get("stack_trace") and not node.meta.get("nn_module_stack") and node.op != "get_attr":
        return "lncompile"
    path = module_path(node) or "the model"
    line = location(node) if locations else ""
    return f"{path} ({line})" if line else path


def _expression(node: fx.Node) -> str:
    arguments = [_argument(argument) for argument in node.args]
    keywords = [f"{name}={_argument(value)}" for name, value in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join([*arguments[1:], *keywords])})"
    if node.op == "call_module":
        return f"self.{node.target}({', '.join([*arguments, *keywords])})"
    name, module = getattr(node.target, "__name__", str(node.target)), getattr(node.target, "__module__", None) or ""
    if node.target is operator.getitem:
        return f"{arguments[0]}[{_index(node.args[1])}]"
    if module in ("_operator", "operator") and name in magic_methods and not keywords:
        return magic_methods[name].format(*arguments)
    return f"{_function(node.target, name, module)}({', '.join([*arguments, *keywords])})"


def _function(target: Any, name: str, module: str) -> str:
    if isinstance(target, torch_private.OpOverload | torch_private.OpOverloadPacket):
        return f"torch.ops.{target}"
    if module in ("_operator", "operator"):
        return f"operator.{name}"
    if module == "builtins":
        return name
    # The functions of torch's C++ bindings have no module, or an internal one.
    return f"torch.{name}" if getattr(torch, name, None) is target else f"{module}.{name}"


def _index(index: Any) -> str:
    """An index as it stands between brackets: ``:, None, 1:``."""
    if isinstance(index, tuple) and index:
        return ", ".join(_index(item) for item in index)
    if isinstance(index, slice):
        start, stop, step = ("" if part is None else _argument(part) for part in (index.start, index.stop, index.step))
        return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"
    return "..." if index is Ellipsis else _argument(index)


def _argument(value: Any) -> str:
    """An argument as it would be written. Dynamic sizes are written as their symbols."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, tuple):
        items = [_argument(item) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(_argument(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_argument(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_argument(value.start)}, {_argument(value.stop)}, {_argument(value.step)})"
    if callable(value):
        return getattr(value, "__name__", str(value))
    return repr(value)
