"""The identities of the rule table, checked number by number on every operation of every case of ``test_rules``.

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
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import randomise
from graphs import Captured, capture
from rule_case import Around
from test_rules import CASES, OF_SEVERAL_PROCESSES, extra_inputs
from torch import Tensor, fx
from torch.nn import functional

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import Key, Operation, canonicalise
from lncompile.passes.graph.effects import examples_of, find_writes
from lncompile.passes.graph.factors import Factor
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import WRITTEN
from lncompile.passes.norms.differences import difference_of
from lncompile.passes.norms.totals import summed
from lncompile.passes.placement.streams import build_streams
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
        scratch.output(copy)
        order = [n.name for n in scratch.nodes if n.op == "placeholder"]
        return fx.Interpreter(fx.GraphModule(self.module, scratch)).run(*[values[name] for name in order])


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
        # A mean and the difference from it are invariant together only: that is what test_handwritten checks.
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


# Their pieces are checked where they are taken.
TUPLES = frozenset({"split", "chunk", "unbind", "multi_head_attention"})


@pytest.mark.parametrize("name", CASES)
def test_identities(name: str) -> None:
    case = CASES[name]
    module = randomise(Around(case.operation, case.norm).double())
    captured = capture(module, torch.randn(2, 5, 7, dtype=torch.float64), extra_inputs())
    find_writes(captured.graph_module.graph, can_be_read=can_be_read)  # marks what is written to
    values = Values(captured)
    checked: set[str] = set()
    for node in captured.graph_module.graph.nodes:
        operation = canonicalise(node)
        # What is written to has other values than those it was made with: test_streams is about that.
        written = any(other.meta.get(WRITTEN) for other in (node, *node.all_input_nodes))
        if operation is not None and not written:
            checked |= {operation.name} if check(values, operation) else set()
    named = set(case.rules.split())
    assert case.reason is not None or named & TUPLES or named <= checked


# What does not notice a shift: functions of a tensor [4, 6, 6], by the names of the invariances they show.
SINKS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "layer_norm": ("layer_norm", lambda x: functional.layer_norm(x, (6,))),
    "layer_norm_of_two": ("layer_norm", lambda x: functional.layer_norm(x, (6, 6))),
    "native": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0]),
    "native_root": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[2]),
    "native_mean": ("native_layer_norm", lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[1]),
    "group_norm": ("group_norm", lambda x: functional.group_norm(x, 2)),
    "group_norm_of_rows": ("group_norm", lambda x: functional.group_norm(x.flatten(0, 1), 3)),
    "native_group": ("native_group_norm", lambda x: torch.native_group_norm(x, None, None, 4, 6, 6, 3, 1e-5)[0]),
    "softmax": ("softmax", lambda x: torch.softmax(x, 1)),
    "log_softmax": ("log_softmax", lambda x: functional.log_softmax(x, dim=-1)),
    "cross_entropy": ("cross_entropy", lambda x: functional.cross_entropy(x, torch.arange(24).view(4, 6) % 6)),
    "cross_entropy_of_one": ("cross_entropy", lambda x: functional.cross_entropy(x[0, 0], torch.tensor(2))),
    "var": ("var", lambda x: x.var(-1)),
    "var_of_two": ("var", lambda x: torch.var(x, (0, 2), correction=0)),
    "std": ("std", lambda x: x.std(1, keepdim=True)),
    "difference": ("mean sub", lambda x: x - x.mean(-1, keepdim=True)),
    "difference_from_sum": ("sum sub", lambda x: x - x.sum(-1, keepdim=True) / 6),
    "negative_mean_added": ("mean add", lambda x: x + -x.mean(-1, keepdim=True)),
    "reversed_subtraction": ("mean rsub", lambda x: torch.rsub(x.mean(-1, keepdim=True), x)),
    "subtracted_from_the_mean": ("mean sub", lambda x: x.mean(1, keepdim=True) - x),
    "difference_from_einsum": ("einsum sub", lambda x: x - torch.einsum("abc->ab", x)[..., None] / 6),
    "difference_from_labels": (
        "einsum",
        lambda x: x - torch.einsum("abc,bd->ac", x, torch.full((6, 1), 1 / 6, dtype=x.dtype))[:, None],
    ),
    "difference_from_product": ("matmul", lambda x: x - x @ torch.full((6, 1), 1 / 6, dtype=x.dtype)),
    "difference_from_left": ("matmul", lambda x: x - torch.full((1, 6), 1 / 6, dtype=x.dtype) @ x),
    "difference_from_linear": ("linear", lambda x: x - functional.linear(x, torch.ones(1, 6, dtype=x.dtype) / 6)),
    "difference_from_pool": ("average_pool_1d", lambda x: x - functional.adaptive_avg_pool1d(x, 1)),
    "var_and_mean": ("var_mean", lambda x: x - torch.var_mean(x, -1, keepdim=True)[1]),
    "std_and_mean": ("std_mean", lambda x: x - torch.std_mean(x, (1, 2), keepdim=True)[1]),
    "moments": ("mul", lambda x: (x * x).mean(-1) - x.mean(-1) ** 2),
    "moments_of_squares": ("square", lambda x: x.square().mean(-1) - x.mean(-1).square()),
    "moments_of_powers": ("pow", lambda x: (x**2).mean(-1, True) - x.mean(-1, True) ** 2),
    "shape": ("metadata", lambda x: torch.ones(2) * x.size(0) + torch.ones_like(x).sum()),
    "zeros": ("zeros", lambda x: torch.zeros_like(x) + 1),
    "half_the_mean": ("", lambda x: x - 0.5 * x.mean(-1, keepdim=True)),
    "mean_added": ("", lambda x: x + x.mean(-1, keepdim=True)),
    "product_alone": ("", lambda x: x @ torch.full((6, 1), 1 / 6, dtype=x.dtype)),
    "product_and_mean_of_others": ("", lambda x: x - x @ torch.full((6, 1), 1 / 5, dtype=x.dtype)),
    "pool_of_halves": ("", lambda x: x.view(4, 12, 3) - functional.avg_pool1d(x, 3).view(4, 12, 1) * 2),
    "mean_alone": ("", lambda x: x.mean(-1)),
    "square_alone": ("", lambda x: (x * x).sum(-1)),
    "maximum": ("", lambda x: x.amax(-1)),
}


def is_unseen(captured: Captured, start: fx.Node, axes: Axes) -> bool:
    """Whether the passes say that nobody sees a shift of a tensor: not its readers, not what is computed from it."""
    site = SimpleNamespace(input=start, axes=axes, handwritten=None)
    graph, inputs = captured.graph_module.graph, captured.example_inputs
    writes = find_writes(graph, examples_of(graph, inputs), can_be_read)
    variables = build_streams([site], GraphFacts(graph, inputs, writes))  # type: ignore[list-item]
    queue, seen = [(start, axes)], {(start, axes)}
    while queue:
        variable = variables[queue.pop()]
        if variable.reader_blocker is not None:
            return False
        queue += [key for key in variable.successors if key not in seen]
        seen.update(variable.successors)
    return True


@pytest.mark.parametrize("name", SINKS)
def test_what_does_not_notice_a_shift(name: str) -> None:
    """For every set of axes: what the passes say is not seen changes nothing, and some shift is not seen."""
    names, function = SINKS[name]
    value = torch.randn(4, 6, 6, dtype=torch.float64) + 0.5
    captured = capture(lambda x: function(x * 1.0), value)
    graph = captured.graph_module.graph
    start = next(node for node in graph.nodes if node.op != "placeholder")
    generator = torch.Generator().manual_seed(0)
    unseen = 0
    for axes in axis_sets(tuple(value.shape)):
        if is_unseen(captured, start, axes):
            unseen += 1
            shifted = function(value + shift_along(value, axes, generator))
            torch.testing.assert_close(shifted, function(value), rtol=1e-8, atol=1e-8)
    assert bool(unseen) == (bool(names) and name != "native_mean")
    found = {operation.name for node in graph.nodes if (operation := canonicalise(node)) is not None}
    assert set(names.split()) <= found


def test_every_invariance_and_every_rule_is_checked() -> None:
    """A rule that nothing above can exercise would be a rule without a test."""
    assert set(INVARIANCES) - {"getitem"} <= {each for names, _ in SINKS.values() for each in names.split()}
    in_cases = {rule for case in CASES.values() for rule in case.rules.split()}
    assert set(RULES) - OF_SEVERAL_PROCESSES <= in_cases
    assert in_cases >= TUPLES
