"""What the oracle runs: a graph with some uses of parameters replaced, and what counts as a difference."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

EXACT, ROUNDED = 1e-8, 1e-4
_MASKED = 1e30

Use = tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class Direction:
    """How the normalised axis lies in a parameter: ``shape`` is a view of it in which ``dims`` are the axis.

    ``group`` picks one index of the dimension beside a single axis, None all of them; ``scale`` is LayerScale's γ.
    """

    shape: tuple[int, ...]
    dims: tuple[int, ...]
    group: tuple[int, int] | None = None
    scale: Tensor | None = field(default=None, compare=False)

    def _part(self, view: Tensor) -> Tensor:
        return view if self.group is None else view.narrow(self.group[0], self.group[1], 1)

    def _weights(self, like: Tensor) -> Tensor:
        if self.scale is None:
            return like.new_ones(())
        shape = [1] * like.dim()
        shape[self.dims[0]] = -1
        return self.scale.reshape(shape)

    def shifted(self, value: Tensor, generator: torch.Generator) -> Tensor:
        """The parameter plus a random shift along the axis, of the parameter's own size."""
        moved = value.clone(memory_format=torch.contiguous_format)
        part = self._part(moved.view(self.shape))
        size = [1 if index in self.dims else n for index, n in enumerate(part.shape)]
        shift = torch.randn(size, generator=generator, dtype=torch.float64) + 0.5
        scale = float(value.double().square().mean().sqrt()) or 1.0
        part.add_((scale * shift / self._weights(part)).to(value.dtype))
        return moved

    def centered(self, value: Tensor) -> Tensor:
        """The parameter centered along the axis."""
        moved = value.clone(memory_format=torch.contiguous_format)
        part = self._part(moved.view(self.shape))
        weights = self._weights(part)
        part.sub_((part * weights).mean(self.dims, keepdim=True) / weights)
        return moved


class Run(fx.Interpreter):
    """Runs a graph with some uses of parameters replaced, from the start or only what depends on one of them."""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes = list(self.module.graph.nodes)
        self.sources = {node: tuple(node.all_input_nodes) for node in self.nodes}
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.last_reader = {node: max(map(self.position.__getitem__, node.users), default=0) for node in self.nodes}
        self.inputs = dict(zip([n for n in self.nodes if n.op == "placeholder"], inputs, strict=True))
        self.replaced: dict[Use, Tensor] = {}
        self.env = {}
        self.written: set[int] = set()
        self.output = next(n for n in self.nodes if n.op == "output")
        self.returned = set(self.output.all_input_nodes)
        self.sizes: dict[int, float | None] = {}
        self.meeting: dict[fx.Node, bool] = {}
        self.base: dict[fx.Node, Any] = {}
        seeded = torch.manual_seed(0).get_state()
        self.full({}, find_writes=True)
        self.random = not torch.equal(torch.get_rng_state(), seeded)
        self.base = dict(self.env)
        self.expected = self.results()

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def value(argument: fx.Node) -> Any:
            return self.replaced.get((argument, n), self.env[argument])

        return fx.node.map_arg(n.args, value), fx.node.map_arg(n.kwargs, value)

    def _evaluate(self, node: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return getattr(self, node.op)(node.target, args, kwargs)

    def full(self, replaced: dict[Use, Tensor], find_writes: bool = False) -> None:
        """Run everything, on copies of the inputs; the first run finds out which storages the graph writes into."""
        self.replaced, self.env = replaced, {}
        torch.manual_seed(0)
        for node in self.nodes:
            if node.op == "placeholder":
                given = self.inputs[node]
                self.env[node] = given.detach().clone() if isinstance(given, Tensor) else given
            elif node is not self.output:
                tensors = [t for n in self.sources[node] for t in tensors_in(self.env[n])] if find_writes else []
                before = [(tensor, tensor._version) for tensor in tensors]
                self.env[node] = self._evaluate(node)
                self.written.update(_storage(tensor) for tensor, version in before if tensor._version != version)

    def results(self) -> list[Tensor]:
        """What the caller sees: the outputs, and inputs that are no parameters (written-to caches)."""
        seen = [tensor for node in self.output.all_input_nodes for tensor in tensors_in(self.env[node])]
        if self.written:
            seen += [t for n, given in self.inputs.items() if not is_parameter(given) for t in tensors_in(self.env[n])]
        return [tensor.clone() for tensor in seen]

    def changes(self, use: Use, value: Tensor) -> bool:
        """Whether an output changes if one use of a parameter reads another value."""
        if self.written and (self.random or self._meets_a_write(use[1])):
            self.full({use: value})
            rounded = any(is_narrow(t) for v in self.env.values() for t in tensors_in(v))
            return not all(self._same(a, b, rounded) for a, b in zip(self.results(), self.expected, strict=True))
        self.replaced, self.env = {use: value}, dict(self.base)
        dirty: set[fx.Node] = set()
        rounded = False
        last = start = self.position[use[1]]
        for index in range(start, len(self.nodes)):
            if index > last:
                return False
            node = self.nodes[index]
            if index > start and dirty.isdisjoint(self.sources[node]):
                continue
            if node is self.output:
                return True
            try:
                result = self._evaluate(node)
            except (RuntimeError, ValueError, IndexError):
                return True  # a parameter that steers shapes
            rounded = rounded or any(is_narrow(tensor) for tensor in tensors_in(result))
            if self._same(result, self.base[node], rounded):
                continue
            if node in self.returned:
                return True
            dirty.add(node)
            self.env[node] = result
            last = max(last, self.last_reader[node])
        return False

    def _meets_a_write(self, reader: fx.Node) -> bool:
        """Whether a node, or anything computed from it, reads or makes a tensor in a storage that is written to.

        Then the values kept are not those that it read: they are what the storage held in the end.
        """
        if reader not in self.meeting:
            self.meeting[reader] = self._find_write_behind(reader)
        return self.meeting[reader]

    def _find_write_behind(self, reader: fx.Node) -> bool:
        behind = {reader}
        for node in self.nodes[self.position[reader] + 1 :]:
            if not behind.isdisjoint(self.sources[node]):
                behind.add(node)
        touched = {source for node in behind for source in (node, *self.sources[node]) if source is not self.output}
        return any(_storage(t) in self.written for node in touched for t in tensors_in(self.base[node]))

    def _same(self, value: Any, expected: Any, rounded: bool) -> bool:
        """Whether a value is what it was in the first run."""
        if isinstance(expected, tuple | list):
            pairs = zip(value, expected, strict=True) if len(value) == len(expected) else [(False, True)]
            return all(self._same(a, b, rounded) for a, b in pairs)
        if not isinstance(expected, Tensor):
            return bool(value == expected)
        if value.shape != expected.shape:
            return False
        if not expected.is_floating_point() and not expected.is_complex():
            return torch.equal(value, expected)
        return self._difference(value, expected) <= (ROUNDED if rounded else EXACT)

    def _difference(self, value: Tensor, expected: Tensor) -> float:
        """As :func:`difference_of`; the size of what is expected is computed once."""
        if id(expected) not in self.sizes:
            self.sizes[id(expected)] = _size(expected)
        size = self.sizes[id(expected)]
        if size is None:
            return difference_of(value, expected)
        difference = float((value - expected).abs().max())
        return math.inf if math.isnan(difference) else difference / size


def is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


def is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def _size(expected: Tensor) -> float | None:
    """The size of a tensor's elements; None where they are not all ordinary numbers in double precision."""
    if expected.dtype != torch.float64 or not expected.numel() or not bool((expected.abs() < _MASKED).all()):
        return None
    return float(expected.square().mean().sqrt()) or 1.0


def difference_of(value: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors relative to the size of the expected one; mask values (-1e38) apart."""
    if expected.is_complex():
        value, expected = torch.view_as_real(value), torch.view_as_real(expected)
    value, expected = value.double(), expected.double()
    ordinary = expected.abs() < _MASKED
    if not torch.equal(value[~ordinary].nan_to_num(), expected[~ordinary].nan_to_num()):
        return math.inf
    value, expected = value[ordinary], expected[ordinary]
    if not expected.numel():
        return 0.0
    size = float(expected.square().mean().sqrt())
    difference = float((value - expected).abs().max())
    return difference / size if size > 0 else difference
