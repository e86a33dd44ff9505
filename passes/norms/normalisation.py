"""Whether a difference from a mean is normalised: scaled, row by row, by a function of the difference alone.

    d * rsqrt(var(x) + ε)    d / (std(x) + ε)    d / norm(d)    normalize(d)    rms_norm(d)    d / mean(|d|)

Which function does not matter: it stays as the author wrote it. What matters is that it reads ``x`` through nothing but
the difference, or through statistics that do not notice a shift (variance and deviation, unbiased ones too).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import fx

from lncompile.passes.decisions import Blocked
from lncompile.passes.graph.axes import Axes, PartlyConstant
from lncompile.passes.graph.canonical import Operation, canonicalise, value_of
from lncompile.passes.graph.operands import dimensions_of, result_shape, shape
from lncompile.passes.graph.traits import Trait, has
from lncompile.passes.norms.calls import LAYER_NORMS
from lncompile.passes.norms.moments import Moment, same_shape

# What hands a difference on, element by element, to what may scale it.
_CARRIERS = Trait.CASTS | Trait.NEGATES | Trait.PASSES | Trait.DROPS | Trait.RESHAPES


@dataclass
class Normalisation:
    """How one difference is scaled.

    Attributes:
        quotients: the nodes in which it, or its product with weights, is scaled by a function of the difference.
        products: the products on the way there.
        raw: a node that scales it by something that reads ``x`` itself; None where there is none.
        layer_norm: a LayerNorm of the difference, which subtracts its mean once more; None where there is none.
    """

    quotients: list[fx.Node] = field(default_factory=list)
    products: list[fx.Node] = field(default_factory=list)
    raw: fx.Node | None = None
    layer_norm: fx.Node | None = None


class Dependence:
    """Says how values of one graph depend on a tensor."""

    def __init__(self, graph: fx.Graph) -> None:
        self._position = {node: index for index, node in enumerate(graph.nodes)}

    def normalisation_of(self, difference: fx.Node, moment: Moment, shiftless: Collection[fx.Node]) -> Normalisation:
        """Follow a difference forwards to what scales it.

        Args:
            difference: the node that holds it.
            moment: the mean: of what, over which axes.
            shiftless: the nodes that read ``x`` and do not notice a shift: all differences, variances, deviations.
        """
        found = Normalisation()
        waiting, seen = [(difference, moment.axes)], {difference}
        while waiting:
            current, axes = waiting.pop()
            for user in current.users:
                operation = canonicalise(user)
                if operation is None or user in seen:
                    continue
                seen.add(user)
                if _is_normalisation(operation, current, axes):
                    found.quotients.append(user)
                    continue
                if operation.name in LAYER_NORMS and operation["input"] is current:
                    found.layer_norm = user
                scale = _scale_of(operation, current)
                if isinstance(scale, fx.Node) and has_one_value_along(scale, axes):
                    reads_difference, reads_source = self._dependence(scale, moment.source, shiftless)
                    if reads_source:
                        found.raw = found.raw or user
                    elif reads_difference:
                        found.quotients.append(user)
                        continue
                moved = _moved(operation, axes) if scale is not None or has(operation, _CARRIERS) else None
                if moved is not None:
                    waiting.append((user, moved))
                    found.products += [user] if scale is not None else []
        return found

    def _dependence(self, node: fx.Node, source: fx.Node, shiftless: Collection[fx.Node]) -> tuple[bool, bool]:
        """Whether a value is computed from nodes that do not notice a shift, and whether it is from ``x`` otherwise."""
        sources = _casts_behind(source)
        first = min(self._position[cast] for cast in sources)
        reads_difference = False
        waiting, seen = [node], {node}
        while waiting:
            current = waiting.pop()
            if current in shiftless:
                reads_difference = True
                continue
            if current in sources:
                return reads_difference, True
            operation = canonicalise(current)
            if self._position[current] < first or (operation is not None and operation.name == "metadata"):
                continue
            values = current.all_input_nodes
            if operation is not None and has(operation, Trait.RESEMBLES):
                values = [operation["input"]]
            for operand in values:
                if operand not in seen:
                    seen.add(operand)
                    waiting.append(operand)
        return reads_difference, False


def _casts_behind(node: fx.Node) -> set[fx.Node]:
    """A tensor, and those that it is a cast of."""
    found = {node}
    operation = canonicalise(node)
    while operation is not None and has(operation, Trait.CASTS):
        found.add(operation["input"])
        operation = canonicalise(operation["input"])
    return found


def _is_normalisation(operation: Operation, value: fx.Node, axes: Axes) -> bool:
    """Whether a call normalises the value over exactly A, and subtracts nothing."""
    if operation.name not in ("normalize", "rms_norm") or operation["input"] is not value or not axes.whole:
        return False
    normalised = set(axes.normalised_dimensions)
    if operation.name == "rms_norm":
        sizes = operation["normalized_shape"]
        sizes = value_of(sizes) if isinstance(sizes, fx.Node) else sizes
        count = len(sizes) if isinstance(sizes, tuple | list) else 1
        return normalised == set(range(axes.rank - count, axes.rank))
    try:
        return normalised == set(dimensions_of(operation["dim"], axes.rank))
    except Blocked:
        return False


def _moved(operation: Operation, axes: Axes) -> Axes | None:
    """``A`` on the result of an operation that keeps the elements and their order; None where it cannot be told."""
    try:
        result = result_shape(operation)
    except Blocked:
        return None
    if has(operation, Trait.RESHAPES):
        return axes.reshape(result)
    # What broadcasts the difference has more elements than it.
    value = next((node for _, node in operation.operands() if len(shape(node)) == axes.rank), None)
    return axes if value is not None and same_shape(shape(value), result) else None


def _scale_of(operation: Operation, value: fx.Node) -> object:
    """What an operation multiplies a value with, or divides it by; None where it does neither."""
    if operation.name == "div":
        return operation["other"] if operation["input"] is value and operation["rounding_mode"] is None else None
    if operation.name == "addcdiv":
        return operation["tensor2"] if operation["tensor1"] is value else None
    if operation.name == "addcmul" and operation["input"] is not value:
        return operation["tensor2"] if operation["tensor1"] is value else operation["tensor1"]
    if operation.name != "mul":
        return None
    return operation["other"] if operation["input"] is value else operation["input"]


def has_one_value_along(node: fx.Node, axes: Axes) -> bool:
    """Whether an operand that broadcasts against a tensor has one value for all elements that share a mean."""
    operation = canonicalise(node)
    if operation is not None and has(operation, Trait.EXPANDS) and isinstance(operation["input"], fx.Node):
        node = operation["input"]
    try:
        sizes = shape(node)
        return len(sizes) <= axes.rank and axes.broadcast_operand(sizes) is None
    except (Blocked, PartlyConstant):
        return False


def varying_dimensions(parameter: fx.Node, moment: Moment) -> set[int]:
    """The dimensions of ``x`` along which a parameter varies that broadcasts against it."""
    sizes = shape(parameter)
    first = moment.axes.rank - len(sizes)
    return {first + index for index, size in enumerate(sizes) if size != 1}


def factors(operation: Operation, value: fx.Node) -> Iterator[object]:
    """What is multiplied with a value, or added to it: γ and β, where they are parameters."""
    if operation.name in ("mul", "add"):
        yield operation["other"] if operation["input"] is value else operation["input"]
    elif operation.name == "rms_norm":
        yield operation["weight"]
