"""A numeric oracle for foldability, which knows no rules: it moves parameters and looks at what changes.

A LayerNorm is foldable into parameters if parameters can be replaced, each at the place where the graph reads it, so
that no output of the graph changes and the norm's input has zero mean along the normalised axes. The oracle searches
for such replacements without any knowledge of operations:

1. It runs the graph once in float64 with an ``fx.Interpreter`` and keeps every value.
2. For each *use* of a parameter expression (a node computed from a model's own tensors alone) by another node, and each
   way in which an axis of normalised size ``d`` can lie in its shape, it adds random numbers that are constant along
   that axis. A use is *shift-invariant* if no graph output changes. Only what depends on the use is computed
   again, and the search stops where values are what they were, as behind a LayerNorm.
3. It centers every shift-invariant use along its axis, all at once, and runs the graph again. Outputs must be what
   they were (if they are not, uses are taken in one by one). A site is foldable if its input now has zero mean.

The ways an axis of size ``d`` can lie in a dimension of size ``n``: ``n = d``; ``n = k·d`` with the axis inside
(per-head norms of a projection) or outside; one of those k groups alone (the queries in a joint projection of queries,
keys and values). For a norm over several dimensions: the same trailing dimensions.

One thing it is told, because a shift of the weight alone cannot show it: ``γ ⊙ (Wh + b)`` (LayerScale). Behind a
multiplication by a parameter γ it also tries the uses that feed the product, shifted along ``1/γ`` in place of ones.

What it cannot see:

- Operands that are *constant* along the axis and would be replaced by zero (a number added to the stream, a
  ``masked_fill`` with a number, a tensor of size 1 there): it only replaces parameters, so it undercounts.
- Axes that lie in a parameter in other ways: ``n = a·d·b`` with both a and b above 1, over two dimensions that a
  later view merges, or (LayerScale) with anything but dropouts and views of one use between the two.
- What a run-time centering would free: it answers for ``assist="off"`` alone.
- Anything about other inputs, dtypes or shapes than those it is given: invariance is tested at one random point.
- LayerNorms that ``list_norms`` does not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from graphs import Captured
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lncompile.passes.norms.expand import expand_opaque_layers, find_opaque_layers
from lncompile.passes.norms.sites import NormSite, list_norms

EXACT, ROUNDED = 1e-8, 1e-4
_MASKED = 1e30
_MOST_GROUPS = 12
_HOPS_TO_A_SCALE = 6

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


@dataclass(frozen=True)
class Verdict:
    """What the oracle found in one graph: its sites, which of them fold into parameters alone, how exact it was."""

    sites: tuple[NormSite, ...]
    foldable: tuple[NormSite, ...]
    invariant_uses: int
    tested: int
    error: float


class _Run(fx.Interpreter):
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
                tensors = [t for n in self.sources[node] for t in _tensors(self.env[n])] if find_writes else []
                before = [(tensor, tensor._version) for tensor in tensors]
                self.env[node] = self._evaluate(node)
                self.written.update(_storage(tensor) for tensor, version in before if tensor._version != version)

    def results(self) -> list[Tensor]:
        """What the caller sees: the outputs, and inputs that are no parameters (written-to caches)."""
        seen = [tensor for node in self.output.all_input_nodes for tensor in _tensors(self.env[node])]
        if self.written:
            seen += [t for n, given in self.inputs.items() if not _is_parameter(given) for t in _tensors(self.env[n])]
        return [tensor.clone() for tensor in seen]

    def changes(self, use: Use, value: Tensor) -> bool:
        """Whether an output changes if one use of a parameter reads another value."""
        if self.written and (self.random or self._meets_a_write(use[1])):
            self.full({use: value})
            rounded = any(_is_narrow(t) for v in self.env.values() for t in _tensors(v))
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
            rounded = rounded or any(_is_narrow(tensor) for tensor in _tensors(result))
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
        return any(_storage(t) in self.written for node in touched for t in _tensors(self.base[node]))

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
        """As :func:`_difference`; the size of what is expected is computed once."""
        if id(expected) not in self.sizes:
            self.sizes[id(expected)] = _size(expected)
        size = self.sizes[id(expected)]
        if size is None:
            return _difference(value, expected)
        difference = float((value - expected).abs().max())
        return math.inf if math.isnan(difference) else difference / size


def _is_parameter(value: Any) -> bool:
    return isinstance(value, nn.Parameter)


def _is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _size(expected: Tensor) -> float | None:
    """The size of a tensor's elements; None where they are not all ordinary numbers in double precision."""
    if expected.dtype != torch.float64 or not expected.numel() or not bool((expected.abs() < _MASKED).all()):
        return None
    return float(expected.square().mean().sqrt()) or 1.0


def _difference(value: Tensor, expected: Tensor) -> float:
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


def judge(captured: Captured, model: nn.Module) -> Verdict:
    """Decide for every site of a graph whether it folds into parameters alone.

    Args:
        captured: the graph as Dynamo hands it to a backend, with its inputs in float64.
        model: its tensors (parameters, buffers, plain attributes) are what may be replaced.
    """
    module = fx.GraphModule(captured.graph_module, _copied(captured.graph_module.graph))
    opaque = find_opaque_layers(module.graph)
    if opaque:
        expand_opaque_layers(module.graph, {node.name for node in opaque})
    module.recompile()
    sites = tuple(list_norms(module.graph))
    if not sites:
        return Verdict((), (), 0, 0, 0.0)
    run = _Run(module, captured.example_inputs)
    generator = torch.Generator().manual_seed(0)
    shapes = {_normalised_sizes(run, site) for site in sites}
    found: dict[Use, list[Direction]] = {}
    tested = 0

    def invariant(use: Use, direction: Direction) -> bool:
        nonlocal tested
        tested += 1
        return not run.changes(use, direction.shifted(run.base[use[0]], generator))

    uses = _uses(run, sites, model)
    for use in uses:
        for whole, parts in _directions(tuple(run.base[use[0]].shape), shapes):
            if invariant(use, whole):
                found.setdefault(use, []).append(whole)
            else:
                found.setdefault(use, []).extend(part for part in parts if invariant(use, part))
    for use, direction in _scaled(run, uses, shapes):
        if not found.get(use) and invariant(use, direction):
            found.setdefault(use, []).append(direction)
    found = {use: directions for use, directions in found.items() if directions}
    error = _center(run, found)
    foldable = tuple(site for site in sites if _zero_mean(run, site))
    return Verdict(sites, foldable, len(found), tested, error)


def _copied(graph: fx.Graph) -> fx.Graph:
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    return copy


def _normalised_sizes(run: _Run, site: NormSite) -> tuple[int, ...]:
    shape = run.base[site.input].shape
    return tuple(shape[dimension] for dimension in site.axes.normalised_dimensions)


def _uses(run: _Run, sites: Sequence[NormSite], model: nn.Module) -> list[Use]:
    """Every read of a floating-point parameter expression by a node that is none itself, or by a norm."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    known |= {id(value) for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)}
    norms = {user for site in sites for user in site.input.users}
    parametric: set[fx.Node] = set()
    for node in run.nodes:
        if node.op == "placeholder":
            if id(run.inputs[node]) in known or _is_parameter(run.inputs[node]):
                parametric.add(node)
        elif node not in norms and node.all_input_nodes and parametric.issuperset(node.all_input_nodes):
            parametric.add(node)
    return [
        (node, user)
        for node in run.nodes
        if node in parametric and isinstance(run.base[node], Tensor) and run.base[node].is_floating_point()
        for user in node.users
        if user not in parametric and user is not run.output
    ]


def _directions(
    shape: tuple[int, ...], normalised: set[tuple[int, ...]]
) -> Iterator[tuple[Direction, Sequence[Direction]]]:
    """Ways an axis can lie in a parameter, each with its parts: the groups to try alone if all together fail."""
    for axes in sorted(normalised):
        if len(axes) > 1:
            if shape[-len(axes) :] == axes:
                yield Direction(shape, tuple(range(len(shape) - len(axes), len(shape)))), ()
            continue
        size = axes[0]
        for index, n in enumerate(shape):
            if n == size:
                yield Direction(shape, (index,)), ()
            elif size > 1 and n % size == 0:
                groups = n // size
                inside = (*shape[:index], groups, size, *shape[index + 1 :])
                parts = range(groups) if groups <= _MOST_GROUPS else ()
                yield (
                    Direction(inside, (index + 1,)),
                    [Direction(inside, (index + 1,), (index, group)) for group in parts],
                )
                yield Direction((*shape[:index], size, groups, *shape[index + 1 :]), (index,)), ()


def _scaled(run: _Run, uses: Sequence[Use], normalised: set[tuple[int, ...]]) -> Iterator[tuple[Use, Direction]]:
    """LayerScale: uses a few steps before a product with a parameter, with that parameter as the scale."""
    readers = {user for _, user in uses}
    for parameter, product in uses:
        name = getattr(product.target, "__name__", str(product.target))
        scale = run.base[parameter].squeeze()
        if name not in ("mul", "imul", "mul_", "multiply") or (scale.numel(),) not in normalised or scale.dim() != 1:
            continue
        sources = [node for node in product.all_input_nodes if node is not parameter]
        for _ in range(_HOPS_TO_A_SCALE):
            if len(sources) != 1 or len(sources[0].users) != 1:
                break
            node = sources[0]
            if node in readers:
                for use in uses:
                    if use[1] is node:
                        shape = tuple(run.base[use[0]].shape)
                        for index, n in enumerate(shape):
                            if n == scale.numel():
                                yield use, Direction(shape, (index,), scale=scale)
                break
            sources = list(node.all_input_nodes)


def _center(run: _Run, found: dict[Use, list[Direction]]) -> float:
    """Run with everything centered that was found; one by one if uses turn out not to be independent."""

    def values(chosen: dict[Use, list[Direction]]) -> dict[Use, Tensor]:
        answer = {}
        for use, directions in chosen.items():
            value = run.base[use[0]]
            for direction in directions:
                value = direction.centered(value)
            answer[use] = value
        return answer

    def error(chosen: dict[Use, list[Direction]]) -> float:
        run.full(values(chosen))
        pairs = zip(run.results(), run.expected, strict=True)
        return max((_difference(a, b) for a, b in pairs if b.is_floating_point()), default=0.0)

    tolerance = _tolerance(run)
    worst = error(found)
    if worst <= tolerance:
        return worst
    kept: dict[Use, list[Direction]] = {}
    for use, directions in found.items():
        if error({**kept, use: directions}) <= tolerance:
            kept[use] = directions
    return error(kept)


def _tolerance(run: _Run) -> float:
    narrow = any(_is_narrow(tensor) for value in run.env.values() for tensor in _tensors(value))
    return ROUNDED if narrow else EXACT


def _zero_mean(run: _Run, site: NormSite) -> bool:
    value = run.replaced.get((site.input, site.node), run.env[site.input]).double()
    size = float(value.square().mean().sqrt())
    return float(value.mean(site.axes.normalised_dimensions).abs().max()) <= _tolerance(run) * max(size, 1e-30)


class Wide(TorchFunctionMode):
    """Takes every cast to single precision as one to double precision, so that rounding hides nothing behind it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*(wide(a) for a in args), **{name: wide(value) for name, value in (kwargs or {}).items()})
