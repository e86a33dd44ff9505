"""What must be known of a graph before anything is decided: whose values are parameters, and what is written to.

Everything here errs on the side of "not a parameter" and "written to": a site then stays a LayerNorm.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from lncompile.lowering import rms_norm, torch_private
from lncompile.passes.graph import sharding
from lncompile.passes.graph.bodies import Call, call_of, counterparts
from lncompile.passes.graph.canonical import canonicalise, tensor_of, value_of
from lncompile.passes.graph.operands import KEPT, WRITTEN
from lncompile.passes.graph.parameter_expressions import Kind, find_autocast, is_settled, kind_of
from lncompile.passes.graph.provenance import parameter_name


class GraphFacts:
    """Facts about one graph, computed once.

    Args:
        graph: any graph of Dynamo's.
        example_inputs: the value of each placeholder.
        can_be_read: whether a node that writes into another can be read as a part of how that one is made
            (``rules.writes.can_be_read``).
        training: whether the graph computes gradients.

    Attributes:
        examples: the real tensor of each placeholder.
        parametric: nodes whose value is a function of parameters and buffers only.
        trained: those of them whose gradient is wanted; empty where the graph computes no gradients.
        unsupported: parameters that cannot be rewritten, with why.
        written: why a node's storage is written to so that the order of reads matters, by node.
        assigned: the nodes that write into a tensor, by the tensor, where they can be read as a part of its making.
        writers: the tensor that each of them writes into.
        storages: storage of each node that has one, the same for all its names.
        writes: position of every write into each storage, plain updates included.
    """

    def __init__(
        self,
        graph: fx.Graph,
        example_inputs: Sequence[Any],
        can_be_read: Callable[[fx.Node, fx.Node], bool],
        training: bool = False,
    ) -> None:
        self._training = training
        self._can_be_read = can_be_read
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.examples: dict[fx.Node, Any] = dict(zip(placeholders, example_inputs, strict=True))
        self.unsupported: dict[fx.Node, str] = {}
        self.parametric: set[fx.Node] = set()
        self.trained: set[fx.Node] = set()
        self.written: dict[fx.Node, str] = {}
        self.assigned: dict[fx.Node, list[fx.Node]] = {}
        self.writers: dict[fx.Node, fx.Node] = {}
        self.storages = storages_of(graph, self.examples)
        self.writes: dict[object, list[int]] = defaultdict(list)
        self._find_writes(graph)
        self._find_parameters(graph)

    def is_written_after(self, node: fx.Node, moment: fx.Node) -> bool:
        """Whether the storage of a node is written to behind another node of the graph."""
        written = self.writes.get(self.storages.get(node, node), ())
        return any(position > self.position[moment] for position in written)

    # --- writes ---

    def _find_writes(self, graph: fx.Graph) -> None:
        storages = self.storages
        aliases: dict[object, list[fx.Node]] = defaultdict(list)
        for node, storage in storages.items():
            aliases[storage].append(node)
        writes: dict[object, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        for node in graph.nodes:
            for target in written_arguments(node):
                storage = storages.get(target)
                self.writes[target if storage is None else storage].append(self.position[node])
                group = [target] if storage is None else aliases[storage]
                if not self._is_plain_update(node, target, group):
                    writes[target if storage is None else storage].append((node, target))
        for storage, written in writes.items():
            group = aliases.get(storage) or [target for _, target in written]
            owner, (node, _) = group[0], written[0]
            for alias in group:
                alias.meta[WRITTEN] = True
            if owner.op not in ("placeholder", "get_attr") and all(
                target is owner and self._can_be_read(writer, owner) for writer, target in written
            ):
                self.assigned[owner] = [writer for writer, _ in written]
                self.writers.update((writer, owner) for writer, _ in written)
                continue
            for alias in group:
                self.written[alias] = f"{node.name} writes into its storage"

    def _is_plain_update(self, node: fx.Node, target: fx.Node, group: Sequence[fx.Node]) -> bool:
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
        here = self.position[node]
        for alias in group:
            if alias.op in ("placeholder", "get_attr"):
                return False
            if self.position[alias] < here and any(self.position[user] > here for user in alias.users):
                return False
        return True

    # --- parameters ---

    def _find_parameters(self, graph: fx.Graph) -> None:
        # Known are also masks and numbers, which cannot be centered themselves: buffers of integers, constants.
        # What was enlarged is better centered before that than kept in a copy.
        known: set[fx.Node] = set()
        from_parameters: set[fx.Node] = set()
        enlarged: set[fx.Node] = set()
        autocast = find_autocast(graph, list(self.examples.values()))
        for node in graph.nodes:
            if node.op == "placeholder":
                example = self.examples[node]
                is_parameter = isinstance(example, torch.nn.Parameter) or torch_private.is_static_input(node)
                if not (isinstance(example, Tensor) and is_parameter):
                    continue
                if self._training and example.requires_grad:
                    self.trained.add(node)
                problem = self._problem_with(node, example)
                if problem:
                    self.unsupported[node] = problem
                else:
                    self.parametric.add(node)
                if not problem or self._is_mask(node, example):
                    known.add(node)
                    from_parameters.add(node)
            elif node.op in ("call_function", "call_method") and not node.meta.get(WRITTEN):
                kind = kind_of(node)
                if kind is None or not all(source in known for source in node.all_input_nodes):
                    continue
                operands = [tensor for source in node.all_input_nodes if (tensor := tensor_of(source)) is not None]
                if written_arguments(node) or not is_settled(kind, operands, node in autocast):
                    continue
                known.add(node)
                if any(source in self.trained for source in node.all_input_nodes):
                    self.trained.add(node)
                if not any(source in from_parameters for source in node.all_input_nodes):
                    continue
                from_parameters.add(node)
                tensor = tensor_of(node)
                if kind is Kind.ENLARGING or self._is_enlarged(node, enlarged):
                    enlarged.add(node)
                elif tensor is None or tensor.is_floating_point():
                    self.parametric.add(node)  # a tuple of pieces is as good as its pieces

    @staticmethod
    def _is_enlarged(node: fx.Node, enlarged: set[fx.Node]) -> bool:
        """Whether an expression's value is larger than all it reads, by way of an expanded parameter."""
        tensor = tensor_of(node)
        if tensor is None or enlarged.isdisjoint(node.all_input_nodes):
            return False
        others = [operand for n in node.all_input_nodes if n not in enlarged and (operand := tensor_of(n)) is not None]
        return tensor.numel() > max((operand.numel() for operand in others), default=0)

    def _is_mask(self, node: fx.Node, example: Tensor) -> bool:
        """Whether a buffer of integers or booleans may be read by a parameter expression."""
        plain = example.layout is torch.strided and example.device.type != "meta" and not example.is_inference()
        whole = not example.is_floating_point() and not torch_private.is_opaque_tensor(example)
        return plain and whole and node not in self.written

    def _problem_with(self, node: fx.Node, example: Tensor) -> str | None:
        name = parameter_name(node)
        if node.meta.get(KEPT):
            return f"parameter '{name}' {node.meta[KEPT]}"
        if node in self.written:
            return f"parameter '{name}' is written to in the graph: {self.written[node]}"
        if torch_private.is_gathered_for_the_call(node):
            return f"parameter '{name}' is gathered anew for each call (FSDP): a centered copy would be outdated unseen"
        if sharding.is_sharded(example):
            problem = sharding.problem_with(example)
            if problem is not None:
                return f"parameter '{name}' {problem}"
            if node in self.trained:
                return f"parameter '{name}' is sharded and trained: it would have to be centered at every step"
        elif torch_private.is_opaque_tensor(example):
            return f"parameter '{name}' is a {type(example).__name__}, whose values cannot be centered"
        if not example.is_floating_point():
            return f"parameter '{name}' has dtype {example.dtype}, whose values cannot be centered"
        if example.is_inference():
            return (
                f"parameter '{name}' was made under torch.inference_mode(), where changes of its value cannot be seen; "
                "make or load the model outside of it"
            )
        if node in self.trained and any(_has_sparse_gradient(user) for user in node.users):
            return f"parameter '{name}' gets a sparse gradient, which that of a centered copy would not be"
        if example.layout is not torch.strided or example.device.type == "meta":
            return f"parameter '{name}' has no plain dense values ({example.layout}, {example.device})"
        return None


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


def _has_sparse_gradient(node: fx.Node) -> bool:
    """Whether a look-up gives its table a gradient of the rows it read alone (``sparse=True``)."""
    operation = canonicalise(node)
    if operation is None or operation.name not in ("embedding", "embedding_bag"):
        return False
    return operation["sparse"] is not False


def trained_parameter(graph: fx.Graph, example_inputs: Sequence[Any]) -> str | None:
    """Name of a parameter whose gradient is wanted by a graph that computes gradients, or None.

    Args:
        graph: a graph that is being compiled under the grad mode of its calls (Dynamo guards it).
        example_inputs: the value of each placeholder.
    """
    if not torch.is_grad_enabled():
        return None
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, example_inputs, strict=True):
        if isinstance(example, Tensor) and example.requires_grad and (
            isinstance(example, torch.nn.Parameter) or torch_private.is_static_input(node)
        ):  # fmt: skip
            return parameter_name(node)
    return None


def turns_gradients_on(graph: fx.Graph) -> bool:
    """Whether a graph that is called without gradients turns them on inside (``with torch.enable_grad()``).

    What is put at its beginning, where parameters and inputs are, would be computed without.
    """
    return not torch.is_grad_enabled() and any(
        node.op == "call_function" and node.target is torch_private.SET_GRAD_ENABLED and node.args == (True,)
        for node in graph.nodes
    )


def is_in_evaluation(graph: fx.Graph) -> bool:
    """Whether Dynamo is compiling this graph for modules that are all in evaluation mode (``model.eval()``).

    They are those that the graph's parameters are reached through: ``self``, or what a function calls ``model``.
    False where none is known.
    """
    scope = torch_private.scope_being_compiled()
    modules = []
    for placeholder in (node for node in graph.nodes if node.op == "placeholder"):
        root = re.match(r"([LG])\[(['\"])(\w+)\2\]", torch_private.source_name(placeholder) or "")
        value = scope.get(root.group(1), {}).get(root.group(3)) if root is not None else None
        if isinstance(value, torch.nn.Module):
            modules.append(value)
    frame = torch_private.frame_being_compiled()
    if frame is not None and isinstance(frame.receiver, torch.nn.Module):
        modules.append(frame.receiver)
    return bool(modules) and not any(module.training for module in modules)


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
