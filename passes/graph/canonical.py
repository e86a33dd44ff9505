"""One name and one argument list for each operation, however it is spelled.

A graph says ``x + y`` as ``operator.add``, ``torch.add``, ``x.add(y)``, ``x += y``, ``x.add_(y)`` or
``aten.add.Tensor``. The stubs in :mod:`.spellings` give each operation its name and its parameters. Rules are looked up
by the name and read the parameters by their names, so a new spelling is one more entry there and no change anywhere
else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes.graph.registry import KEYWORD_ALIASES, Spelling
from lncompile.passes.graph.sharding import FROM_LOCAL
from lncompile.passes.graph.spellings import FUNCTIONS, METHODS

# Where an operand stands: the parameter's name, and its index where the parameter is a list of tensors.
Key = tuple[str, int | None]


@dataclass(frozen=True)
class Operation:
    """The canonical form of one FX node: the operation's name and its arguments by parameter name."""

    node: fx.Node
    name: str
    arguments: Mapping[str, Any]
    # Where each argument stands in the node: ("args", 2), ("kwargs", "dim"), or ("rest", 1) for args[1:].
    places: Mapping[str, tuple[str, Any]]
    in_place: bool = False

    def __getitem__(self, parameter: str) -> Any:
        return self.arguments[parameter]

    def operands(self) -> Iterator[tuple[Key, fx.Node]]:
        """Every node among the arguments, with where it stands."""
        for name, value in self.arguments.items():
            if isinstance(value, fx.Node):
                yield (name, None), value
            elif isinstance(value, list | tuple):
                for index, item in enumerate(value):
                    if isinstance(item, fx.Node):
                        yield (name, index), item

    def replace(self, replacements: Mapping[Key, Any]) -> None:
        """Replace arguments of the node in place, at the given keys."""
        if not replacements:
            return
        args = list(self.node.args)
        kwargs = dict(self.node.kwargs)
        changed: dict[str, Any] = {}
        for (name, index), value in replacements.items():
            if index is None:
                changed[name] = value
            else:
                items = list(changed.get(name, self._current(name)))
                items[index] = value
                changed[name] = items
        for name, value in changed.items():
            # A parameter that the call leaves at its default is given by its name.
            kind, place = self.places.get(name, ("kwargs", name))
            if kind == "args":
                original = args[place]
                args[place] = tuple(value) if isinstance(original, tuple) else value
            elif kind == "rest":
                args[place:] = list(value)
            else:
                kwargs[place] = value
        self.node.args = tuple(args)
        self.node.kwargs = kwargs

    def _current(self, name: str) -> Any:
        """The argument as it stands in the node now: the node may have changed since it was read."""
        kind, place = self.places[name]
        if kind == "rest":
            return self.node.args[place:]
        return self.node.args[place] if kind == "args" else self.node.kwargs[place]


_METADATA_ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim", "is_cuda", "layout", "requires_grad", "itemsize"})


def name_overloads(graph: fx.Graph) -> None:
    """Name the overload that each call of an operator without one runs: ``aten.mT(x)`` is ``aten.mT.default(x)``.

    Args:
        graph: with the (fake) values that Dynamo computed, which choose the overload; changed in place. A call whose
            arguments have no known value stays as it is.
    """
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch_private.OpOverloadPacket):
            if any(value_of(source) is None for source in node.all_input_nodes):
                continue
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
            node.target = torch_private.overload_for(node.target, args, kwargs) or node.target


def canonicalise(node: fx.Node) -> Operation | None:
    """Return the canonical form of a node, or None for an operation the tables do not know.

    Args:
        node: any node of a Dynamo graph.

    Returns:
        The operation, or None: placeholders, outputs, unknown functions, and calls that do not bind to the stub.
    """
    if node.op == "call_function" and node.target is getattr:
        return _attribute(node)
    if node.op == "call_function":
        spelling = FUNCTIONS.get(node.target)
        if spelling is None and (closed := torch_private.call_in_closure(node.target)) is not None:
            return _bind_closed(node, *closed)
    elif node.op == "call_method":
        spelling = METHODS.get(str(node.target))
    else:
        return None
    return None if spelling is None else _bind(node, spelling)


def _attribute(node: fx.Node) -> Operation | None:
    name = node.args[1]
    if name in _METADATA_ATTRIBUTES:
        return Operation(node, "metadata", {"input": node.args[0]}, {"input": ("args", 0)})
    tensor = value_of(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if name in ("T", "mT") or (name in ("H", "mH") and isinstance(tensor, Tensor) and not tensor.is_complex()):
        return Operation(node, "t" if name in ("T", "H") else "mT", {"input": node.args[0]}, {"input": ("args", 0)})
    return None


def _bind_closed(node: fx.Node, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Operation | None:
    """What a closure of Dynamo's calls: its tensor is an operand, the constants in it have no place in the graph."""
    spelling = METHODS.get(name) or FUNCTIONS[FROM_LOCAL]
    operation = _bind(node, spelling)
    try:
        constants = spelling.signature.bind_partial(None, *args, **kwargs).arguments
    except TypeError:
        return None
    constants.pop("input")
    return None if operation is None else replace(operation, arguments={**operation.arguments, **constants})


def _bind(node: fx.Node, spelling: Spelling) -> Operation | None:
    parameters = spelling.signature.parameters
    arguments: dict[str, Any] = {}
    places: dict[str, tuple[str, Any]] = {}
    positional = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    rest = next((p for p in parameters.values() if p.kind is p.VAR_POSITIONAL), None)
    keyword_only = [p for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    # Functions of old signature take keyword-only parameters by position too (torch.sub(x, y, alpha) does not).
    for index, value in enumerate(node.args):
        if index < len(positional):
            arguments[positional[index].name] = value
            places[positional[index].name] = ("args", index)
        elif rest is not None:
            values = node.args[index:]
            if len(values) == 1 and isinstance(values[0], list | tuple):
                arguments[rest.name], places[rest.name] = values[0], ("args", index)
            else:
                arguments[rest.name], places[rest.name] = tuple(values), ("rest", index)
            break
        else:
            return None
    accepts_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for key, value in node.kwargs.items():
        name = key if key in parameters else KEYWORD_ALIASES.get(key, key)
        if name not in parameters and not accepts_any:
            return None
        arguments[name] = value
        places[name] = ("kwargs", key)
    for parameter in (*positional, *keyword_only):
        if parameter.name not in arguments:
            if parameter.default is parameter.empty:
                return None
            arguments[parameter.name] = parameter.default
    if rest is not None and rest.name not in arguments:
        arguments[rest.name] = ()
    if spelling.name == "view" and any(isinstance(size, torch.dtype) for size in arguments["shape"]):
        return None  # the same bits read as another dtype: no view in the sense of the rules
    in_place = spelling.in_place or bool(arguments.get("inplace", False))
    return Operation(node, spelling.name, arguments, places, in_place)


def function_name(node: fx.Node) -> str:
    """Name of the function or method that a node calls, known or not; "" where it has none."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def value_of(node: fx.Node) -> Any:
    """Return the (fake) value Dynamo computed for a node: a tensor, a tuple of tensors, a number, or None."""
    return node.meta.get("example_value", node.meta.get("val"))


def tensor_of(node: fx.Node) -> Tensor | None:
    """Return the (fake) tensor of a node, or None if its value is not one tensor."""
    value = value_of(node)
    return value if isinstance(value, Tensor) else None
