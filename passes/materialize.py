"""Weights are centered once, not per call: parameter expressions leave the graph and become extra inputs.

Each centered parameter expression of the graph is cut out into a small graph of its own (:class:`Expression`), and a
placeholder takes its place. At each call a :class:`Materializer` supplies the values, computed under
``torch.no_grad()`` from the parameters *that arrive in this call* and kept while these are the same tensors and nobody
writes to them (``parameter_state``). A parameter that holds its centered weight itself, because it was written there
(``in_place``) or came centered, is passed as it is. Nothing is baked in: Dynamo reuses one compiled graph for several
parameter sets, and in-place updates, ``load_state_dict`` or a swapped Parameter cause no recompile.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import has_torch_function

from lncompile.lowering import torch_private
from lncompile.passes import in_place
from lncompile.passes.axes import Axes
from lncompile.passes.centering import is_centered
from lncompile.passes.operands import CENTERED_ALONG
from lncompile.passes.ownership import Ownership, Survey
from lncompile.passes.parameter_state import ParameterState, version_of
from lncompile.passes.sharding import local_bytes

log = logging.getLogger("lncompile")


class Expression:
    """A function of parameters, cut out of a graph.

    Attributes:
        code: its source; two graphs that center one parameter in the same way have equal code and share the result.
        leaves: positions of its parameters among the graph's placeholders.
        centered_along: where it is the centering of one parameter in its own dtype, and nothing else: along which axes.
    """

    def __init__(self, root: fx.Node, placeholders: Sequence[fx.Node]) -> None:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        position = {node: index for index, node in enumerate(placeholders)}
        leaves = [node for node in closure(root) if node.op == "placeholder"]
        for index, leaf in enumerate(leaves):
            copies[leaf] = graph.placeholder(f"parameter_{index}")
        for index, node in enumerate(n for n in closure(root) if n.op != "placeholder"):
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
        along: tuple[Axes, ...] | None = root.meta.get(CENTERED_ALONG)
        self.centered_along = along if along is not None and in_place.can_be_kept(along) else None

    def evaluate(self, leaves: Sequence[Tensor]) -> Tensor:
        """Compute the value from the parameters' tensors; it shares no storage with them."""
        # Out of inference mode as well: the value may later serve a call that records gradients for its inputs.
        with torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
            value: Tensor = self._module(*leaves)
        return value


def closure(root: fx.Node) -> list[fx.Node]:
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

    def __init__(self, expression: Expression, leaves: tuple[Tensor, ...]) -> None:
        # The state is read before the value is computed: a write in between makes the entry outdated, not wrong.
        self.state = ParameterState(leaves)
        self.value = expression.evaluate(leaves)

    def is_current(self, leaves: tuple[Tensor, ...]) -> bool:
        return self.state.is_current(leaves) and self.state.has_storages_of(leaves)


@dataclass(frozen=True)
class Stored:
    """How the value of an expression is kept.

    Attributes:
        storage: ``"copy"`` beside the model, ``"inplace"`` in the parameter, ``"centered"``: the parameter as it came.
        bytes: what that takes of memory; in place it is what undoing it takes.
        detail: in words, why there is a copy where the parameter was to be written to.
        version: of the parameter, where that is what holds the value.
    """

    storage: str
    bytes: int
    detail: str = ""
    version: int | None = None


class _Store:
    """Materialised tensors of the process: one per (expression, parameters), however many graphs use it."""

    def __init__(self) -> None:
        self._entries: weakref.WeakValueDictionary[tuple[Any, ...], _Entry] = weakref.WeakValueDictionary()

    def get(self, expression: Expression, leaves: tuple[Tensor, ...]) -> tuple[_Entry, bool]:
        """The value of an expression, and whether another graph's value of it turned out to be outdated unnoticed.

        It is always computed, and then shared with the graphs that have the same one: a graph that is new, or that was
        not called for a while, is not to inherit what others made before a write that torch did not count.
        """
        key = (expression.code, *(id(leaf) for leaf in leaves))
        with in_place.lock:
            fresh = _Entry(expression, leaves)
            torch_private.count("materialized")
            # An id() is used again after its owner is freed; the entry's state knows.
            known = self._entries.get(key)
            believed = known is not None and known.is_current(leaves)
            if known is not None and believed and torch.equal(known.value, fresh.value):
                return known, False
            self._entries[key] = fresh
            return fresh, believed

    def clear(self) -> None:
        with in_place.lock:
            self._entries.clear()


_store = _Store()


_materializers: weakref.WeakSet[Materializer] = weakref.WeakSet()


def forget_all() -> None:
    """Forget every materialised tensor: the next call of each compiled graph computes its own anew."""
    in_place.allow_again()
    _forget_sets()
    _store.clear()


def give_back(uses: Iterable[tuple[Any, tuple[Axes, ...] | None]]) -> None:
    """Restore what a new graph is about to read in another way than it was written (``in_place.give_back``)."""
    if in_place.give_back(uses):
        _forget_sets()


def _forget_sets() -> None:
    for materializer in list(_materializers):
        materializer.refresh()


class _ParameterSet:
    """The values for one set of parameters that a graph was called with.

    Args:
        state: of the parameters.
        values: for each expression the copy that holds its value, or the position of the parameter that does. Of
            parameters no reference is kept: that they are freed ends the state.
        stored: how each is kept.
        arguments: how many the graph is called with.
        plain: whether no parameter's class has a ``__torch_function__`` of its own, which would be asked at every call.
    """

    def __init__(
        self,
        state: ParameterState,
        values: Sequence[_Entry | int],
        stored: Sequence[Stored],
        arguments: int,
        plain: bool,
    ) -> None:
        self.state = state
        self.is_current = state.is_current if plain else _asked_plainly(state.is_current)
        self.stored = tuple(stored)
        self._entries = [value for value in values if isinstance(value, _Entry)]
        self.values = [entry.value for entry in self._entries]
        copies = itertools.count(arguments)
        places = tuple(value if isinstance(value, int) else next(copies) for value in values)
        self._choose = None if len(self.values) == len(places) else chooser(places)

    def take(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """The values, some of which may be among the arguments."""
        return self.values if self._choose is None else self._choose((*arguments, *self.values))


def _asked_plainly(is_current: Callable[[tuple[Tensor, ...]], bool]) -> Callable[[tuple[Tensor, ...]], bool]:
    def ask(tensors: tuple[Tensor, ...]) -> bool:
        with torch_private.as_plain_tensors():
            return is_current(tensors)

    return ask


class Materializer:
    """Supplies the values of a graph's expressions for the arguments of one call.

    Example:
        >>> values = materializer(arguments)      # arguments: what Dynamo passes to the compiled graph
        >>> outputs = compiled(*arguments, *values)

    Args:
        expressions: of the graph.
        check: whether every call looks if a parameter has changed since its values were computed. Without, a set of
            parameters is recognised by its first one alone.
        ownership: where parameters are to be overwritten with their centered weights, says which may be.
    """

    def __init__(
        self, expressions: Sequence[Expression], check: bool = True, ownership: Ownership | None = None
    ) -> None:
        self.expressions = tuple(expressions)
        self._check = check
        self._ownership = ownership
        self._leaves = tuple(sorted({leaf for expression in expressions for leaf in expression.leaves}))
        self._choose_leaves = chooser(self._leaves)
        # By the id of the first parameter: one compiled graph may serve many equal blocks in turn.
        self._sets: dict[int, _ParameterSet] = {}
        _materializers.add(self)

    def __call__(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """Return the value of each expression for these arguments.

        Args:
            arguments: the values of the original placeholders, in order.
        """
        if not self._leaves:
            return []
        known = self._sets.get(id(arguments[self._leaves[0]]))
        if known is not None and (not self._check or known.is_current(self._choose_leaves(arguments))):
            return known.take(arguments)
        leaves = self._choose_leaves(arguments)
        if any(leaf.is_inference() for leaf in leaves):
            # Their changes cannot be seen, so nothing may be kept.
            return [e.evaluate([arguments[index] for index in e.leaves]) for e in self.expressions]
        return self._refresh(arguments).take(arguments)

    def begin(self, arguments: Sequence[Any]) -> tuple[Sequence[Tensor], tuple[Stored, ...]]:
        """Return the values for the arguments that a graph is compiled with, and how each is kept."""
        if not self._leaves:
            return (), ()
        known = self._refresh(arguments)
        return known.take(arguments), known.stored

    def seen(self) -> set[int]:
        """Ids of the living parameters that values were supplied for."""
        return {parameter for known in list(self._sets.values()) for parameter in known.state.living()}

    def refresh(self) -> None:
        """Forget all values, so that the next call computes them anew."""
        self._sets.clear()

    def forget(self, parameters: set[int]) -> None:
        """Forget the values made from any of these, given by their ids; none if changes are not to be looked for."""
        for first, known in list(self._sets.items()) if self._check else ():
            if not parameters.isdisjoint(known.state.living()):
                self._sets.pop(first, None)

    def _refresh(self, arguments: Sequence[Any]) -> _ParameterSet:
        leaves = self._choose_leaves(arguments)
        first = id(leaves[0])
        own = weakref.ref(self)

        def forget(ended: ParameterState) -> None:
            materializer = own()
            known = None if materializer is None else materializer._sets.get(first)
            # A later owner of the same id may have put its own set there.
            if materializer is not None and known is not None and known.state is ended:
                materializer._sets.pop(first, None)

        values: list[_Entry | int] = []
        kept: list[Stored] = []
        survey = Survey()
        anything_outdated = False
        with in_place.lock, torch_private.as_plain_tensors():
            state = ParameterState(leaves, forget)  # before the values are computed, see _Entry
            for index, expression in enumerate(self.expressions):
                stored = self._in_parameter(index, arguments, survey)
                if stored.version is not None:
                    (leaf,) = expression.leaves
                    values.append(leaf)
                    state.expect(self._leaves.index(leaf), stored.version)
                else:
                    entry, outdated = _store.get(expression, tuple(arguments[leaf] for leaf in expression.leaves))
                    values.append(entry)
                    anything_outdated |= outdated
                    stored = dataclasses.replace(stored, bytes=local_bytes(entry.value))
                kept.append(stored)
        if anything_outdated:
            log.debug("a weight was written to through .data: every compiled graph computes its centered weights anew")
            _forget_sets()
        fresh = _ParameterSet(state, values, kept, len(arguments), not has_torch_function(leaves))
        self._sets[first] = fresh
        return fresh

    def plan(self, arguments: Sequence[Any]) -> tuple[Stored, ...]:
        """Say how the values would be kept for these arguments, without computing or writing any.

        The bytes of copies are left out: nothing is computed that has any.
        """
        survey = Survey()
        planned = []
        for index, expression in enumerate(self.expressions):
            first = arguments[expression.leaves[0]]
            with in_place.lock:
                held = self._held(index, arguments)
                obstacle = None if held is not None else self._obstacle(index, arguments, survey)
            if held is not None:
                planned.append(held)
            elif obstacle is None:
                planned.append(Stored("inplace", in_place.bytes_kept(first, expression.centered_along or ())))
            else:
                planned.append(Stored("copy", 0, obstacle))
        return tuple(planned)

    def _in_parameter(self, index: int, arguments: Sequence[Any], survey: Survey) -> Stored:
        """Have a parameter hold the value of an expression, if it does already or may; else it is to be a copy."""
        held = self._held(index, arguments)
        if held is not None:
            return held
        for parameter in (arguments[leaf] for leaf in self.expressions[index].leaves):
            if in_place.written(parameter) is not None:
                # For another graph, in another way than this one needs it, which was not known when that was compiled.
                in_place.restore_for_good([parameter], survey.owners(parameter))
        obstacle = self._obstacle(index, arguments, survey)
        if obstacle is not None:
            return Stored("copy", 0, obstacle)
        expression = self.expressions[index]
        record = in_place.write(arguments[expression.leaves[0]], expression.centered_along or ())
        if record is None:
            return Stored("copy", 0, "somebody else wrote to it at the same time")
        return Stored("inplace", record.nbytes, version=record.version)

    def _held(self, index: int, arguments: Sequence[Any]) -> Stored | None:
        """How a parameter holds the value of an expression; None if it does not."""
        axes = self.expressions[index].centered_along
        # Without the check a copy outlives changes of the parameter, which holds nothing but the latest.
        if axes is None or (self._ownership is None and not self._check):
            return None
        parameter = arguments[self.expressions[index].leaves[0]]
        if torch_private.is_opaque_tensor(parameter) or torch_private.fake_mode_of([parameter]) is not None:
            return None
        record = in_place.written(parameter)
        if record is not None:
            # Centered in another way for another graph, it is a weight like any other here.
            return Stored("inplace", record.nbytes, version=record.version) if record.axes == axes else None
        with torch_private.as_plain_tensors():
            version = version_of(parameter)
            return Stored("centered", 0, version=version) if is_centered(parameter, axes) else None

    def _obstacle(self, index: int, arguments: Sequence[Any], survey: Survey) -> str | None:
        """Why a parameter may not be overwritten with the value of an expression; "" where nobody asked for it."""
        if self._ownership is None:
            return ""
        expression = self.expressions[index]
        if expression.centered_along is None:
            return "it is no parameter in its own dtype, but computed from parameters"
        leaf = expression.leaves[0]
        return self._ownership.obstacle(leaf, arguments[leaf], survey)


def _forget_after_step(optimizer: Optimizer, *_: object) -> None:
    """Fused optimizers count no write (torch 2.13), and others may not: what an optimizer stepped is outdated."""
    if torch.compiler.is_compiling():
        return  # a compiled step: what AOTAutograd compiles does count
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for materializer in list(_materializers):
        materializer.forget(stepped)


register_optimizer_step_post_hook(_forget_after_step)


def chooser(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the items at some indices out of a sequence, always as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)


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
        for node in reversed(closure(root)):
            if node.op != "placeholder" and not node.users:
                graph.erase_node(node)
    return expressions, new
