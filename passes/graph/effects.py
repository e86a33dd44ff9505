"""What a graph writes to: which operations write into which tensors, and where the order of reads and writes matters.

Everything here errs on the side of "written to": a site then stays a LayerNorm.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lncompile.lowering import rms_norm, torch_private
from lncompile.passes.graph.bodies import Call, call_of, counterparts
from lncompile.passes.graph.canonical import canonicalise, tensor_of, value_of
from lncompile.passes.graph.operands import WRITTEN


@dataclass(frozen=True)
class Writes:
    """What a graph writes to. Where there is one, the graph's nodes are marked (``meta[WRITTEN]``), which rules read.

    Attributes:
        marked: nodes whose storage is written to, other than by plain updates.
        written: those of them that must not be rewritten, because the order of reads and writes matters, with why.
        assigned: the nodes that write into a tensor, by the tensor, where they can be read as a part of its making.
        writers: the tensor that each of them writes into.
        storages: storage of each node that has one, the same for all its names.
        positions: position of every write into each storage, plain updates included.
        order: position of each node in the graph.
    """

    marked: frozenset[fx.Node]
    written: Mapping[fx.Node, str]
    assigned: Mapping[fx.Node, Sequence[fx.Node]]
    writers: Mapping[fx.Node, fx.Node]
    storages: Mapping[fx.Node, object]
    positions: Mapping[object, Sequence[int]]
    order: Mapping[fx.Node, int]

    def is_written_after(self, node: fx.Node, moment: fx.Node) -> bool:
        """Whether the storage of a node is written to behind another node of the graph."""
        written = self.positions.get(self.storages.get(node, node), ())
        return any(position > self.order[moment] for position in written)


def examples_of(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[fx.Node, Any]:
    """Return the value of each placeholder of a graph, by its node."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    return dict(zip(placeholders, example_inputs, strict=True))


def _is_read_as_it_is(writer: fx.Node, owner: fx.Node) -> bool:
    return False


def find_writes(
    graph: fx.Graph,
    examples: Mapping[fx.Node, Any] = MappingProxyType({}),
    can_be_read: Callable[[fx.Node, fx.Node], bool] = _is_read_as_it_is,
) -> Writes:
    """Find what a graph writes to, and mark the nodes whose storage is written to (``meta[WRITTEN]``).

    Args:
        graph: any graph of Dynamo's; its nodes are marked, and nothing else of it is changed.
        examples: the real tensor of each placeholder, where there is one.
        can_be_read: whether a node that writes into another can be read as a part of how that one is made
            (``rules.writes.can_be_read``); by default none can.
    """
    storages = storages_of(graph, examples)
    order = {node: index for index, node in enumerate(graph.nodes)}
    aliases: dict[object, list[fx.Node]] = defaultdict(list)
    for node, storage in storages.items():
        aliases[storage].append(node)
    positions: dict[object, list[int]] = defaultdict(list)
    writes: dict[object, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node in graph.nodes:
        for target in written_arguments(node):
            storage = storages.get(target)
            positions[target if storage is None else storage].append(order[node])
            group = [target] if storage is None else aliases[storage]
            if not _is_plain_update(node, target, group, order):
                writes[target if storage is None else storage].append((node, target))
    marked: set[fx.Node] = set()
    reasons: dict[fx.Node, str] = {}
    assigned: dict[fx.Node, list[fx.Node]] = {}
    writers: dict[fx.Node, fx.Node] = {}
    for storage, written in writes.items():
        group = aliases.get(storage) or [target for _, target in written]
        owner, (node, _) = group[0], written[0]
        marked.update(group)
        if owner.op not in ("placeholder", "get_attr") and all(
            target is owner and can_be_read(writer, owner) for writer, target in written
        ):
            assigned[owner] = [writer for writer, _ in written]
            writers.update((writer, owner) for writer, _ in written)
            continue
        for alias in group:
            reasons[alias] = f"{node.name} writes into its storage"
    for node in marked:
        node.meta[WRITTEN] = True
    return Writes(frozenset(marked), reasons, assigned, writers, storages, positions, order)


def _is_plain_update(node: fx.Node, target: fx.Node, group: Sequence[fx.Node], order: Mapping[fx.Node, int]) -> bool:
    """Whether ``x += y`` can be read as ``x' = x + y``: nothing that saw the old x is read again under its name."""
    operation = canonicalise(node)
    if operation is None or not operation.in_place or operation.name not in ("add", "sub", "mul", "div"):
        return False
    if operation["input"] is not target:
        return False
    tensor, other = tensor_of(target), operation["other"]
    other = value_of(other) if isinstance(other, fx.Node) else other
    if tensor is None or torch.result_type(tensor, other) != tensor.dtype:
        return False  # x + y would have another dtype than x += y has
    here = order[node]
    for alias in group:
        if alias.op in ("placeholder", "get_attr"):
            return False
        if order[alias] < here and any(order[user] > here for user in alias.users):
            return False
    return True


def storages_of(graph: fx.Graph, examples: Mapping[fx.Node, Any] = MappingProxyType({})) -> dict[fx.Node, object]:
    """Storage of each node, where several that Dynamo's fake tensors take for distinct are really one.

    Those are placeholders of one real storage (two Parameters on one tensor), and dropout in evaluation, which returns
    its very operand. Views of either are views of the one storage.

    Args:
        graph: any graph of Dynamo's.
        examples: the real tensor of each placeholder, where there is one.
    """
    identity: dict[fx.Node, object] = {}
    same_as: dict[object, object] = {}
    real: dict[int, object] = {}
    for node in graph.nodes:
        tensor = tensor_of(node)
        fake: object = None if tensor is None else torch_private.storage_identity(tensor)
        if fake is None:
            continue
        storage = same_as.get(fake, fake)
        operation = canonicalise(node)
        example = examples.get(node)
        if operation is not None and operation.name == "dropout" and operation["input"] in identity:
            storage = identity[operation["input"]]
        elif isinstance(example, Tensor) and (held := torch_private.storage_identity(example)) is not None:
            storage = real.setdefault(held, storage)
        same_as[fake] = identity[node] = storage
    return identity


_IN_PLACE_OPERATORS = frozenset(
    "iadd iand iconcat ifloordiv ilshift imod imul imatmul ior ipow irshift isub itruediv ixor setitem delitem".split()
)
# Operations that write to some operands when asked: the parameter that asks, its position, its default, and the value
# that does not ask.
_WRITERS_IF_ASKED: dict[Any, tuple[str, int, object, object]] = {
    functional.embedding: ("max_norm", 3, None, None),
    functional.embedding_bag: ("max_norm", 3, None, None),
    functional.batch_norm: ("training", 5, False, False),
    torch.batch_norm: ("training", 5, True, False),
    torch.native_batch_norm: ("training", 5, True, False),
    functional.instance_norm: ("use_input_stats", 5, True, False),
    torch.instance_norm: ("use_input_stats", 5, True, False),
}
_TORCH_MODULES = ("torch", "_operator", "operator", "builtins", "math", "_VariableFunctions")


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """Return the arguments that a node writes into. What is not known to be pure is taken to write into everything."""
    first = _nodes(node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self")))
    if node.op == "call_method":
        name = str(node.target)
        in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
        return first if in_place and name not in ("__invert__", "__index__", "__int__") else _out(node)
    if node.op != "call_function":
        return list(node.all_input_nodes) if node.op == "call_module" else []
    target: Any = node.target
    if isinstance(target, torch_private.OpOverload):
        return _written_by_schema(node, torch_private.schema_of(target))
    name = getattr(target, "__name__", "")
    module = getattr(target, "__module__", None) or ""
    if module in ("_operator", "operator"):
        return first if name in _IN_PLACE_OPERATORS else []
    call = call_of(node)
    if call is not None:
        return _written_by_bodies(node, call)
    if target is rms_norm:
        return []  # what norms that are folded already are gathered into
    # An operator whose overload is not known (see canonical.name_overloads) may write to anything.
    if isinstance(target, torch_private.OpOverloadPacket | torch_private.HigherOrderOperator) or not (
        module.split(".")[0] in _TORCH_MODULES or module == ""
    ):
        return list(node.all_input_nodes)
    if name.endswith("_") and not name.endswith("__"):
        return first
    if target in _WRITERS_IF_ASKED:
        # Running statistics, a table renormalised: all but the first operand count as written, whatever their order.
        flag, position, default, quiet = _WRITERS_IF_ASKED[target]
        asked = node.kwargs.get(flag, node.args[position] if len(node.args) > position else default)
        return [] if asked is quiet else [other for other in node.all_input_nodes if other not in first]
    operation = canonicalise(node)
    if operation is not None and operation.name == "dropout" and operation["training"] is False:
        return []  # `nn.Dropout(inplace=True)` in evaluation gives back what it gets
    return (first if _asks_in_place(node, target) else []) + _out(node)


def _written_by_bodies(node: fx.Node, call: Call) -> list[fx.Node]:
    """What the graphs that an operator runs write into; everything where one of them hands out what it was given."""
    written: dict[fx.Node, None] = {}
    for body in call.bodies:
        storages = storages_of(body.graph)
        places: dict[object, list[Any]] = defaultdict(list)
        for placeholder, operand in counterparts(call, body).items():
            places[storages.get(placeholder, placeholder)].append(operand)
        results = next(inner for inner in body.graph.nodes if inner.op == "output").all_input_nodes
        for result in results:
            if storages.get(result, result) in places and tensor_of(result) is not None:
                return list(node.all_input_nodes)
        for inner in body.graph.nodes:
            for target in written_arguments(inner):
                if target not in storages and target.op != "placeholder":
                    return list(node.all_input_nodes)
                written.update(dict.fromkeys(_nodes(places.get(storages.get(target, target), []))))
    return list(written)


def _out(node: fx.Node) -> list[fx.Node]:
    return _nodes(node.kwargs.get("out"))


def _nodes(argument: Any) -> list[fx.Node]:
    items = argument if isinstance(argument, tuple | list) else [argument]
    return [item for item in items if isinstance(item, fx.Node)]


def _asks_in_place(node: fx.Node, target: Any) -> bool:
    if node.kwargs.get("inplace"):
        return True
    if not inspect.isfunction(target):
        return False
    names = list(inspect.signature(target).parameters)
    return "inplace" in names and names.index("inplace") < len(node.args) and bool(node.args[names.index("inplace")])


def _written_by_schema(node: fx.Node, schema: Any) -> list[fx.Node]:
    written: list[fx.Node] = []
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            items = value if isinstance(value, tuple | list) else [value]
            written += [item for item in items if isinstance(item, fx.Node)]
    return written
