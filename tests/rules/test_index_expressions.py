"""Where the axes go through an index expression, checked against torch on tensors that number their elements."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

import torch
from each import check_each
from torch import Tensor, fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.rewrites.arithmetic import center_weight
from lncompile.passes.rules import RULES

SIZES = (2, 3, 5, 7)


def random_index(choose: random.Random) -> tuple[object, ...]:
    """An index expression of numbers, slices, new axes, an ellipsis, index tensors and masks."""
    items: list[object] = []
    dimension = 0
    tensor_length = choose.choice([1, 4])
    while dimension < len(SIZES) and choose.random() < 0.85:
        size = SIZES[dimension]
        kind = choose.choice("number slice whole new tensor matrix mask wide ellipsis".split())
        if kind == "ellipsis" and Ellipsis not in [i for i in items if not isinstance(i, Tensor)]:
            skipped = choose.randint(0, len(SIZES) - dimension)
            items.append(Ellipsis)
            # What follows stands for the last dimensions: exactly as many as are left.
            for left in SIZES[dimension + skipped :]:
                items.append(choose.choice([slice(None), torch.arange(tensor_length) % left]))
            return tuple(items)
        if kind == "new":
            items.append(None)
            continue
        if kind == "wide" and dimension + 1 < len(SIZES):
            mask = torch.zeros(size, SIZES[dimension + 1], dtype=torch.bool)
            mask.view(-1)[:tensor_length] = True
            items.append(mask)
            dimension += 2
            continue
        mask = torch.arange(size) < tensor_length
        items.append(
            {
                "number": choose.randrange(size),
                "slice": slice(1, None),
                "tensor": torch.arange(tensor_length) % size,
                "matrix": torch.arange(3 * tensor_length).view(3, tensor_length) % size,
                "mask": mask if int(mask.sum()) == tensor_length else torch.arange(tensor_length) % size,
            }.get(kind, slice(None))
        )
        dimension += 1
    return tuple(items)


def traced(index: tuple[object, ...], value: Tensor, result: Tensor) -> fx.Node:
    graph = fx.Graph()
    source = graph.placeholder("source")
    source.meta["example_value"] = value
    nodes: list[object] = []
    for number, item in enumerate(index):
        if isinstance(item, Tensor):
            nodes.append(graph.placeholder(f"index_{number}"))
            nodes[-1].meta["example_value"] = item  # type: ignore[attr-defined]
        else:
            nodes.append(item)
    node = graph.call_function(operator.getitem, (source, tuple(nodes)))
    node.meta["example_value"] = result
    return node


SEEDS = range(300)


def check_centered(
    value: Tensor, dimension: int, indexed: Callable[[Tensor], Tensor], result: Tensor, moved: Axes
) -> None:
    """Indexing what is centered along a dimension gives what is centered along the axes that it goes to."""
    centered = value - value.mean(dimension, keepdim=True)
    expected = result - result.mean(moved.normalised_dimensions, keepdim=True)
    torch.testing.assert_close(indexed(centered), expected)


def test_the_axes_go_where_torch_takes_them() -> None:
    check_each(SEEDS, check_axes)


def check_axes(seed: int) -> None:
    choose = random.Random(seed)
    index = random_index(choose)
    value = torch.randn(SIZES, dtype=torch.float64)
    result = value[index]
    operation = canonicalise(traced(index, value, result))
    assert operation is not None
    for dimension in range(len(SIZES)):
        axes = Axes.of(SIZES, [dimension])
        try:
            reading = next(reading for reading in RULES["getitem"](operation) if not reading.selective)
            moved = reading.carriers["input", None].forward(axes)
        except Blocked:
            continue
        assert moved is not None
        check_centered(value, dimension, lambda centered: centered[index], result, moved)
        assert reading.carriers["input", None].backward(moved) == axes


def test_the_axes_go_where_atens_index_takes_them() -> None:
    """In it None is a whole dimension, not a new one."""
    check_each(SEEDS, check_axes_of_aten)


def check_axes_of_aten(seed: int) -> None:
    choose = random.Random(seed)
    length = choose.choice([1, 4])
    indices = [
        choose.choice([None, torch.arange(length) % size, torch.arange(3 * length).view(3, length) % size])
        for size in SIZES[: choose.randint(1, 4)]
    ]
    if all(index is None for index in indices):
        return
    value = torch.randn(SIZES, dtype=torch.float64)
    result = torch.ops.aten.index.Tensor(value, indices)
    graph = fx.Graph()
    source = graph.placeholder("source")
    source.meta["example_value"] = value
    nodes: list[fx.Node | None] = []
    for number, item in enumerate(indices):
        nodes.append(None if item is None else graph.placeholder(f"index_{number}"))
        if item is not None:
            nodes[-1].meta["example_value"] = item  # type: ignore[union-attr]
    node = graph.call_function(torch.ops.aten.index.Tensor, (source, nodes))
    node.meta["example_value"] = result
    operation = canonicalise(node)
    assert operation is not None
    assert operation.name == "index"
    (reading,) = RULES["index"](operation)
    carried = reading.carriers["input", None]
    for dimension in range(len(SIZES)):
        indexed = dimension < len(indices) and indices[dimension] is not None
        axes = Axes.of(SIZES, [dimension])
        try:
            moved = carried.forward(axes)
        except Blocked:
            assert indexed, "a whole dimension stays one"
            continue
        assert moved is not None
        assert not indexed, "what is picked along the normalised axis has another mean"
        check_centered(value, dimension, lambda centered: torch.ops.aten.index.Tensor(centered, indices), result, moved)
        assert carried.backward(moved) == axes


def test_the_part_that_is_taken_can_be_centered_alone() -> None:
    """Centering just what is taken, in the source, centers the result; the rest of the source stays as it is."""
    check_each(SEEDS, check_part)


def check_part(seed: int) -> None:
    choose = random.Random(seed)
    index = random_index(choose)
    value = torch.randn(SIZES, dtype=torch.float64)
    result = value[index]
    operation = canonicalise(traced(index, value, result))
    assert operation is not None
    for dimension in range(result.dim()):
        axes = Axes.of(result.shape, [dimension])
        try:
            selective = [reading for reading in RULES["getitem"](operation) if reading.selective]
            if not selective or not axes.normalised_dimensions:
                continue
            (map_,) = selective[0].carriers.values()
            source_axes = map_.backward(axes)
            assert source_axes is not None
        except Blocked:
            continue
        centered = center_weight(value, source_axes)
        torch.testing.assert_close(centered[index], result - result.mean(dimension, keepdim=True))
        untouched = torch.ones(SIZES, dtype=torch.bool)
        untouched[index] = False
        assert torch.equal(centered[untouched], value[untouched])
        assert map_.forward(source_axes) == axes


def test_most_of_them_pass() -> None:
    passed = 0
    for seed in SEEDS:
        index = random_index(random.Random(seed))
        value = torch.randn(SIZES)
        operation = canonicalise(traced(index, value, value[index]))
        assert operation is not None
        try:
            passed += bool(RULES["getitem"](operation))
        except Blocked:
            continue
    assert passed > 200
