"""The identities of the rule table, checked number by number on every operation of a graph.

A rule promises two things of an operation, for every set of axes ``A`` of its result:

* *upwards*: with each carrier centered along the axes that ``backward`` names (or zero where it names none), the
  operation puts out its result centered along ``A``;
* *downwards*: a shift of one carrier that is constant along an axis set ``B`` shifts the result by something constant
  along ``forward(B)``, and by nothing where that is None.

Here both are computed for all axes, whole dimensions and parts of them, and compared. Nothing is folded and no case
says what to expect: the table is the specification and the test.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from graphs import Captured
from torch import Tensor, fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise
from lncompile.passes.graph.effects import find_writes
from lncompile.passes.graph.factors import Factor
from lncompile.passes.graph.operands import WRITTEN
from lncompile.passes.norms.differences import difference_of
from lncompile.passes.norms.totals import summed
from lncompile.passes.rewrites.arithmetic import center_weight
from lncompile.passes.rules import INVARIANCES, RULES, ZERO_MEANS
from lncompile.passes.rules.readings import follow_reading, resolve_reading
from lncompile.passes.rules.writes import can_be_read


class Values(fx.Interpreter):
    """The value of every node, as it was when the node was computed."""

    def __init__(self, captured: Captured) -> None:
        super().__init__(captured.graph_module, garbage_collect_values=False)
        self.known: dict[fx.Node, Any] = {}
        self.run(*[self._copied(value) for value in captured.example_inputs])

    @staticmethod
    def _copied(value: Any) -> Any:
        return value.detach().clone() if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.known[n] = self._copied(value) if isinstance(value, Tensor) else value
        return value

    def again(self, node: fx.Node, replaced: dict[Key, Tensor | float], operation: Operation) -> Any:
        """Compute a node once more with other operands, on copies of them."""
        scratch = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        values: dict[str, Any] = {}

        def placeholder(value: Any) -> fx.Node:
            new = scratch.placeholder(f"value_{len(values)}")
            values[new.name] = self._copied(value)
            return new

        for source in node.all_input_nodes:
            copies[source] = placeholder(self.known[source])
        copy = scratch.node_copy(node, copies.__getitem__)
        copied = canonicalise_like(operation, copy)
        with scratch.inserting_before(next(iter(scratch.nodes))):
            replacements = {key: placeholder(v) if isinstance(v, Tensor) else v for key, v in replaced.items()}
        copied.replace(replacements)
        # Node by node: to make a module of so small a graph takes longer than to compute it.
        computed: dict[fx.Node, Any] = {}
        for new in scratch.nodes:
            if new.op == "placeholder":
                computed[new] = values[new.name]
            else:
                args, kwargs = (
                    fx.node.map_arg(arguments, computed.__getitem__) for arguments in (new.args, new.kwargs)
                )
                computed[new] = getattr(self, new.op)(new.target, args, kwargs)
        return computed[copy]


def canonicalise_like(operation: Operation, node: fx.Node) -> Operation:
    """The same operation, of a copy of its node."""
    return Operation(node, operation.name, operation.arguments, operation.places, operation.in_place)


def axis_sets(shape: tuple[int, ...]) -> Iterator[Axes]:
    """Every non-empty set of whole dimensions, and of each dimension its divisors, inside, outside, and chosen."""
    dimensions = [index for index, size in enumerate(shape) if size > 1]
    for count in range(1, len(dimensions) + 1):
        for chosen in itertools.combinations(dimensions, count):
            yield Axes.of(shape, chosen)
    for index in dimensions:
        size = shape[index]
        for inner in (n for n in range(2, size) if size % n == 0):
            for factors in (
                (Factor(size // inner, False), Factor(inner, True)),
                (Factor(size // inner, True), Factor(inner, False)),
                (Factor(size // inner, False, (0,)), Factor(inner, True)),
            ):
                own = list(Axes.of(shape, ()).dimensions)
                own[index] = factors
                yield Axes(tuple(own))
            # As a group norm has it: a part of this dimension with all that follow.
            behind = range(index + 1, len(shape))
            if any(shape[other] > 1 for other in behind):
                own = list(Axes.of(shape, behind).dimensions)
                own[index] = (Factor(size // inner, False), Factor(inner, True))
                yield Axes(tuple(own))


def shift_along(value: Tensor, axes: Axes, generator: torch.Generator) -> Tensor:
    """Something constant along ``A`` and random elsewhere, zero where nothing is chosen."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return noise - center_weight(noise, axes)


def is_exact(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


def operand_of(operation: Operation, key: Key) -> Any:
    name, index = key
    return operation[name] if index is None else operation[name][index]


def check(values: Values, operation: Operation) -> bool:
    """Check all that the table says of one operation; whether a rule of its own said anything."""
    checked = False
    node = operation.node
    result = values.known[node]
    is_alone = is_exact(result)
    generator = torch.Generator().manual_seed(0)
    if is_alone and operation.name in ZERO_MEANS:
        for axes in axis_sets(tuple(result.shape)):
            if ZERO_MEANS[operation.name](operation, axes):
                torch.testing.assert_close(center_weight(result, axes), result, rtol=1e-9, atol=1e-9)
    if is_alone and operation.name in RULES:
        for axes in axis_sets(tuple(result.shape)):
            checked |= check_upwards(values, operation, axes)
    for operand in {operand for _, operand in operation.operands()}:
        value = values.known[operand]
        if is_alone and is_exact(value):
            for axes in axis_sets(tuple(value.shape)):
                check_downwards(values, operation, operand, axes, generator)
    return checked


def readings_of(operation: Operation) -> list[Any]:
    try:
        return list(RULES[operation.name](operation))
    except Blocked:
        return []


def check_upwards(values: Values, operation: Operation, axes: Axes) -> bool:
    """Whether some reading holds for the axes, and if so check that it keeps its promise."""
    checked = False
    result = values.known[operation.node]
    for reading in readings_of(operation):
        try:
            resolved = resolve_reading(operation, reading, axes)
        except Blocked:
            continue
        if not all(is_exact(values.known[need]) for need in resolved.needs):
            continue  # a tuple of pieces (checked where it was cut), or a cast from another dtype
        replaced: dict[Key, Tensor | float] = {}
        for key in reading.carriers:
            operand = operand_of(operation, key)
            if operand is None:
                continue
            if key in resolved.zeros:
                tensor = values.known[operand] if isinstance(operand, fx.Node) else None
                replaced[key] = torch.zeros_like(tensor) if isinstance(tensor, Tensor) else 0.0
            else:
                replaced[key] = center_weight(values.known[operand], resolved.needs[operand])
        actual = values.again(operation.node, replaced, operation)
        torch.testing.assert_close(actual, center_weight(result, axes), rtol=1e-9, atol=1e-9)
        checked = True
    return checked


def check_downwards(
    values: Values, operation: Operation, operand: fx.Node, axes: Axes, generator: torch.Generator
) -> None:
    keys = [key for key, other in operation.operands() if other is operand]
    result = values.known[operation.node]
    shift = shift_along(values.known[operand], axes, generator)
    shifted: dict[Key, Tensor | float] = dict.fromkeys(keys, values.known[operand] + shift)
    if operation.name in INVARIANCES and isinstance(result, Tensor):
        try:
            unnoticed = all(INVARIANCES[operation.name](operation, key, axes) for key in keys)
        except Blocked:
            unnoticed = False
        # A mean and the difference from it are invariant together only: that is what test_handwritten.py checks.
        if unnoticed and summed(operation) is None and difference_of(operation) is None:
            actual = values.again(operation.node, shifted, operation)
            torch.testing.assert_close(actual, result, rtol=1e-9, atol=1e-9, equal_nan=True)
    if operation.name not in RULES or not isinstance(result, Tensor):
        return
    for reading in readings_of(operation):
        if not all(key in reading.carriers for key in keys):
            continue
        try:
            moved = follow_reading(operation, reading, keys, axes)
        except Blocked:
            continue
        change = values.again(operation.node, shifted, operation) - result
        expected = torch.zeros_like(change) if moved is None else change - center_weight(change, moved)
        torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-8)


def operations_checked(captured: Captured) -> set[str]:
    """Check every operation of a graph; return those about which a rule of their own says something.

    Raises:
        AssertionError: where an operation does not do what its rule says.
    """
    # Marks what is written to.
    find_writes(captured.graph_module.graph, can_be_read=can_be_read)
    values = Values(captured)
    checked: set[str] = set()
    for node in captured.graph_module.graph.nodes:
        operation = canonicalise(node)
        # What is written to has other values than those it was made with: test_streams is about that.
        written = any(other.meta.get(WRITTEN) for other in (node, *node.all_input_nodes))
        if operation is not None and not written:
            checked |= {operation.name} if check(values, operation) else set()
    return checked
