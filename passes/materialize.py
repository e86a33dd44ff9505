"""Weights are centered once, not per call: parameter expressions leave the graph and become extra inputs.

Each centered parameter expression of the graph is cut out into a small graph of its own (:class:`Expression`), and a
placeholder takes its place. At each call a :class:`Materializer` supplies the values, computed under
``torch.no_grad()`` from the parameters *that arrive in this call* and cached by the identity and version of these
tensors. Nothing is baked in: Dynamo reuses one compiled graph for several parameter sets, and in-place updates,
``load_state_dict`` or a swapped Parameter cause no recompile.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.passes.optimizer_steps import watch_optimizers

version_of = torch_private.version_of


class Expression:
    """A function of parameters, cut out of a graph.

    Attributes:
        code: its source; two graphs that center one parameter in the same way have equal code and share the result.
        leaves: positions of its parameters among the graph's placeholders.
    """

    def __init__(self, root: fx.Node, placeholders: Sequence[fx.Node]) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        position = {node: index for index, node in enumerate(placeholders)}
        leaves = [node for node in _closure(root) if node.op == "placeholder"]
        for index, leaf in enumerate(leaves):
            copies[leaf] = graph.placeholder(f"parameter_{index}")
        for index, node in enumerate(n for n in _closure(root) if n.op != "placeholder"):
            copies[node] = graph.create_node(
                node.op,
                node.target,
                torch.fx.map_arg(node.args, copies.__getitem__),
                torch.fx.map_arg(node.kwargs, copies.__getitem__),
                name=f"value_{index}",
            )
        graph.output(copies[root])
        graph.lint()
        self._module = fx.GraphModule(torch.nn.Module(), graph)
        self.code: str = self._module.code
        self.leaves = tuple(position[leaf] for leaf in leaves)

    def evaluate(self, leaves: Sequence[Tensor]) -> Tensor:
        """Compute the value from the parameters' tensors; it shares no storage with them."""
        # Out of inference mode as well: the value may later serve a call that records gradients for its inputs.
        with torch.inference_mode(False), torch.no_grad():
            value: Tensor = self._module(*leaves)
        return value


def _closure(root: fx.Node) -> list[fx.Node]:
    """Everything ``root`` is computed from, itself last, operands before their users."""
    order: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(node: fx.Node) -> None:
        if node not in seen:
            seen.add(node)
            for source in node.all_input_nodes:
                visit(source)
            order.append(node)

    visit(root)
    return order


class _Entry:
    """One materialised tensor and the state of the parameters it was made from. Kept alive by its materializers."""

    def __init__(self, leaves: Sequence[Tensor], value: Tensor) -> None:
        self.references = tuple(weakref.ref(leaf) for leaf in leaves)
        self.versions = tuple(version_of(leaf) for leaf in leaves)
        self.value = value

    def is_current(self, leaves: Sequence[Tensor]) -> bool:
        return all(
            reference() is leaf and version == version_of(leaf)
            for reference, version, leaf in zip(self.references, self.versions, leaves, strict=True)
        )


class _Store:
    """Materialised tensors of the process: one per (expression, parameters), however many graphs use it."""

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[tuple[Any, ...], _Entry] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def get(self, expression: Expression, leaves: Sequence[Tensor]) -> _Entry:
        key = (expression.code, *(id(leaf) for leaf in leaves))
        with self._lock:
            entry = self._entries.get(key)
            # Identity is checked on the live object: an id() is used again after its owner is freed.
            if entry is None or not entry.is_current(leaves):
                # The state is read before the value is computed: a change in between makes the entry outdated.
                entry = _Entry(leaves, expression.evaluate(leaves))
                self._entries[key] = entry
                torch_private.count("materialized")
            return entry

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()


_store = _Store()


def forget_all() -> None:
    """Forget every materialised tensor: the next look-up computes it anew."""
    _store.clear()


class _ParameterSet:
    """The values for one set of parameters that a graph was called with."""

    def __init__(self, checks: Sequence[tuple[int, Any, int]], entries: Sequence[_Entry]) -> None:
        self.checks = checks
        self.entries = entries
        self.values = [entry.value for entry in entries]

    def is_current(self, arguments: Sequence[Any]) -> bool:
        # A plain loop: this runs at every call of the compiled model.
        for index, reference, version in self.checks:
            tensor = arguments[index]
            if reference() is not tensor or version_of(tensor) != version:
                return False
        return True


class Materializer:
    """Supplies the values of a graph's expressions for the arguments of one call.

    Example:
        >>> values = materializer(arguments)      # arguments: what Dynamo passes to the compiled graph
        >>> outputs = compiled(*arguments, *values)

    Args:
        expressions: of the graph.
        check: whether every call looks if a parameter has changed since its values were computed. Without, a set of
            parameters is recognised by its first one alone.
    """

    def __init__(self, expressions: Sequence[Expression], check: bool = True) -> None:
        self.expressions = tuple(expressions)
        self._check = check
        self._leaves = tuple(sorted({leaf for expression in expressions for leaf in expression.leaves}))
        if self._leaves and check:
            watch_optimizers()
        # By the id of the first parameter: one compiled graph may serve many equal blocks in turn.
        self._sets: dict[int, _ParameterSet] = {}

    def __call__(self, arguments: Sequence[Any]) -> list[Tensor]:
        """Return the value of each expression for these arguments.

        Args:
            arguments: the values of the original placeholders, in order.
        """
        if not self._leaves:
            return []
        known = self._sets.get(id(arguments[self._leaves[0]]))
        if known is not None and (not self._check or known.is_current(arguments)):
            return known.values
        return self._refresh(arguments)

    def seen(self) -> set[int]:
        """Ids of the living parameters that values were supplied for."""
        references = (check[1] for known in list(self._sets.values()) for check in known.checks)
        return {id(tensor) for reference in references if (tensor := reference()) is not None}

    def refresh(self) -> None:
        """Forget all values, so that the next call computes them anew."""
        self._sets.clear()

    def _refresh(self, arguments: Sequence[Any]) -> list[Tensor]:
        leaves = [arguments[index] for index in self._leaves]
        if any(leaf.is_inference() for leaf in leaves):
            # Their changes cannot be seen, so nothing may be kept.
            return [e.evaluate([arguments[index] for index in e.leaves]) for e in self.expressions]
        first = id(leaves[0])
        sets = self._sets

        def forget(reference: object) -> None:
            # A later owner of the same id may have put its own set there.
            known = sets.get(first)
            if known is not None and any(reference is check[1] for check in known.checks):
                del sets[first]

        checks = [(i, weakref.ref(arguments[i], forget), version_of(arguments[i])) for i in self._leaves]
        entries = [_store.get(e, [arguments[index] for index in e.leaves]) for e in self.expressions]
        fresh = _ParameterSet(checks, entries)
        sets[first] = fresh
        return fresh.values


def hoist(graph: fx.Graph, roots: Sequence[fx.Node]) -> tuple[list[Expression], list[fx.Node]]:
    """Cut the parameter expressions out of the graph and put placeholders in their place.

    Args:
        graph: changed in place. New placeholders stand behind the old ones, in the order of the expressions.
        roots: the nodes whose values are to be computed outside, functions of placeholders only.

    Returns:
        The expressions, and the new placeholders.
    """
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    expressions = [Expression(root, placeholders) for root in roots]
    new: list[fx.Node] = []
    insertion_point = next(node for node in graph.nodes if node.op != "placeholder")
    for root in roots:
        with graph.inserting_before(insertion_point):
            placeholder = graph.placeholder(f"{root.name}_materialized")
        torch_private.mark_static_input(placeholder)
        placeholder.meta["example_value"] = root.meta.get("example_value")
        root.replace_all_uses_with(placeholder)
        new.append(placeholder)
    for root in roots:
        for node in reversed(_closure(root)):
            if node.op != "placeholder" and not node.users:
                graph.erase_node(node)
    return expressions, new
