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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from graphs import Captured
from oracle_run import EXACT, ROUNDED, Direction, Run, Use, difference_of, is_narrow, is_parameter, tensors_in
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from lncompile.passes.norms.expand import expand_opaque_layers, find_opaque_layers
from lncompile.passes.norms.sites import NormSite, list_norms

_MOST_GROUPS = 12
_HOPS_TO_A_SCALE = 6


@dataclass(frozen=True)
class Verdict:
    """What the oracle found in one graph: its sites, which of them fold into parameters alone, how exact it was."""

    sites: tuple[NormSite, ...]
    foldable: tuple[NormSite, ...]
    invariant_uses: int
    tested: int
    error: float


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
    run = Run(module, captured.example_inputs)
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


def _normalised_sizes(run: Run, site: NormSite) -> tuple[int, ...]:
    shape = run.base[site.input].shape
    return tuple(shape[dimension] for dimension in site.axes.normalised_dimensions)


def _uses(run: Run, sites: Sequence[NormSite], model: nn.Module) -> list[Use]:
    """Every read of a floating-point parameter expression by a node that is none itself, or by a norm."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    known |= {id(value) for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)}
    norms = {user for site in sites for user in site.input.users}
    parametric: set[fx.Node] = set()
    for node in run.nodes:
        if node.op == "placeholder":
            if id(run.inputs[node]) in known or is_parameter(run.inputs[node]):
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


def _scaled(run: Run, uses: Sequence[Use], normalised: set[tuple[int, ...]]) -> Iterator[tuple[Use, Direction]]:
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


def _center(run: Run, found: dict[Use, list[Direction]]) -> float:
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
        return max((difference_of(a, b) for a, b in pairs if b.is_floating_point()), default=0.0)

    tolerance = _tolerance(run)
    worst = error(found)
    if worst <= tolerance:
        return worst
    kept: dict[Use, list[Direction]] = {}
    for use, directions in found.items():
        if error({**kept, use: directions}) <= tolerance:
            kept[use] = directions
    return error(kept)


def _tolerance(run: Run) -> float:
    narrow = any(is_narrow(tensor) for value in run.env.values() for tensor in tensors_in(value))
    return ROUNDED if narrow else EXACT


def _zero_mean(run: Run, site: NormSite) -> bool:
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
