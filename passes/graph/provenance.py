"""Where a node comes from, in the user's words: module paths, parameter names, source lines."""

from __future__ import annotations

import functools
import re

from torch import fx

from lncompile.lowering import torch_private, torch_private_dynamo

# A forward that a decorator wraps (`def wrapper(*args, **kwargs)`) is called with the module as its first argument.
_WRAPPED_SELF = re.compile(r"^L\[(['\"])args\1\]\[0\](?=\.)")
_ROOT = re.compile(r"^(L|G)\[(['\"])(\w+)\2\]\.?")
_CONTAINER = re.compile(r"\._(?:modules|parameters|buffers)\[(['\"])(.*?)\1\]")
_HELD = re.compile(r"\.__dict__\._modules(?=\.|$)")
_ITEM = re.compile(r"\[(['\"]?)([^\]'\"]+)\1\]")
_LIBRARIES = ("/torch/nn/", "/torch/_", "/lncompile/nn.py")
_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


@functools.lru_cache(maxsize=65536)
def dotted(source: str) -> str:
    """Turn Dynamo's source expression into the dotted name of ``named_parameters()``.

    Example:
        >>> dotted("L['self']._modules['h']._modules['0']._parameters['weight']")
        'h.0.weight'
    """
    name = _CONTAINER.sub(r".\2", _WRAPPED_SELF.sub("L['self']", source))
    root = _ROOT.match(name)
    if root:
        # A module compiled as such is `self`; anything else keeps its variable's name.
        rest = name[root.end() :]
        name = rest if root.group(3) == "self" and rest else f"{root.group(3)}{'.' if rest else ''}{rest}"
    name = _HELD.sub("", _ITEM.sub(r".\2", name))
    return name.replace("..", ".").strip(".")


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the innermost module whose forward made the node, or ``""``."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    path = re.sub(r"@\d+$", "", str(path))
    name = dotted(path)
    return "" if name == "self" else name


def is_made_by(node: fx.Node, class_name: str) -> bool:
    """Whether the innermost module whose forward made the node is of a class, or of one derived from it.

    What the forward makes that Dynamo is compiling names no module: that one is meant.

    Args:
        node: of a graph of Dynamo's.
        class_name: ``"package.module.Class"``.
    """
    stack = node.meta.get("nn_module_stack")
    if stack:
        kind = list(stack.values())[-1][1]
    else:
        frame = torch_private_dynamo.frame_being_compiled()
        kind = type(None if frame is None else frame.receiver)
    names = [kind] if isinstance(kind, str) else [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]
    return class_name in names


def parameter_name(placeholder: fx.Node) -> str:
    """Return the dotted name of a parameter's placeholder."""
    source = torch_private.source_name(placeholder)
    return dotted(source) if source else placeholder.name


def parameter_names(node: fx.Node) -> list[str]:
    """Return the names of the placeholders that a node is computed from, each once."""
    names: dict[str, None] = {}
    pending, seen = [node], {node}
    while pending:
        source = pending.pop()
        if source.op == "placeholder":
            names[parameter_name(source)] = None
        for other in reversed(source.all_input_nodes):
            if other not in seen:
                seen.add(other)
                pending.append(other)
    return list(names)


def location(node: fx.Node) -> str:
    """Return ``file.py:line`` of the source line of the model that made the node.

    Lines inside torch itself (``nn/modules/linear.py``) and of our own modules say nothing: the innermost line outside
    of them is given.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    outside = [frame for frame in frames if not any(inside in frame[0] for inside in _LIBRARIES)]
    path, line = (outside or frames)[-1]
    return f"{path.rsplit('/', 1)[-1]}:{line}"


def describe(node: fx.Node) -> str:
    """Return a short description of an operation for messages: ``gelu (h.0.mlp.act, modeling_gpt2.py:231)``."""
    if node.op == "placeholder":
        return f"input '{parameter_name(node)}'"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    places = [place for place in (module_path(node), location(node)) if place]
    return f"{target} ({', '.join(places)})" if places else str(target)
