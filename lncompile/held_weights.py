"""Weights that a graph takes as placeholders become attributes of a module: each under one name, products as layers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lncompile.lowering import torch_private
from lncompile.passes.graph.canonical import canonicalise

# Names that a graph module, or any module, has for itself. What a dictionary's keys are called can be any of them.
_OF_A_GRAPH_MODULE = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_OF_A_MODULE = frozenset(dir(nn.Module()))


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor that a graph takes as a placeholder.

    Attributes:
        placeholder: where.
        value: the tensor; a copy of it is held.
        name: what it is to be called, as a dotted path.
        suffix: what is put behind its module where that name is another tensor's.
    """

    placeholder: fx.Node
    value: Tensor
    name: str
    suffix: str = ""


def hold_weights(graph: fx.Graph, weights: Sequence[Weight], attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Exchange placeholders for attributes. A product with one weight becomes a layer under the weight's name.

    Before::

        linear = torch.nn.functional.linear(x, up_weight, up_bias)
        y      = linear + position_weight

    After::

        up     = self.up(x)
        y      = up + self.position.weight

    Args:
        graph: changed in place.
        weights: what its placeholders hold. One that nothing reads is left out.
        attributes: what the graph has as attributes already, by path. These paths stay.

    Returns:
        All attributes by path, for ``fx.GraphModule``.
    """
    held = dict(attributes)
    names = _Names(attributes)
    layers = {layer.weight: layer for layer in _layers_of(weights)}
    biases = {layer.bias for layer in layers.values()}
    paths: dict[Weight, str] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for weight in weights:
        if weight in layers:
            path = weight.name.removesuffix(".weight")
            path = names.take(path if path != weight.name else f"{path}_linear", weight.suffix)
            held[path] = layers[weight].as_module()
            paths[weight] = path
        elif weight.placeholder.users and weight not in biases:
            path = names.take(weight.name, weight.suffix, weight.name.rpartition(".")[0])
            held[path] = _copied(weight.value)
            with graph.inserting_before(first):
                attribute = graph.create_node("get_attr", path)
            attribute.meta = {"example_value": weight.placeholder.meta.get("example_value")}
            weight.placeholder.replace_all_uses_with(attribute)
    # Behind the attributes: the first node, which these stand before, may be a product.
    for weight, path in paths.items():
        layers[weight].exchange(graph, path)
    for weight in weights:
        graph.erase_node(weight.placeholder)
    return held


def _copied(value: Tensor) -> Tensor:
    with torch_private.as_plain_tensors():
        copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(value, nn.Parameter) else copy


@dataclass(frozen=True, eq=False)
class _Layer:
    """Calls that all multiply by one weight and add one bias, and are all that read the two."""

    weight: Weight
    bias: Weight | None
    calls: tuple[fx.Node, ...]

    def as_module(self) -> nn.Linear:
        with torch.device("meta"):
            layer = nn.Linear(1, 1, self.bias is not None)
        layer.weight = nn.Parameter(_copied(self.weight.value), requires_grad=False)
        layer.out_features, layer.in_features = layer.weight.shape
        if self.bias is not None:
            layer.bias = nn.Parameter(_copied(self.bias.value), requires_grad=False)
        return layer.eval()

    def exchange(self, graph: fx.Graph, path: str) -> None:
        """Let the calls call the layer."""
        for node in self.calls:
            operation = canonicalise(node)
            assert operation is not None  # it is a product
            with graph.inserting_before(node):
                call = graph.create_node("call_module", path, (operation["input"],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            graph.erase_node(node)


def _layers_of(weights: Sequence[Weight]) -> list[_Layer]:
    by_node = {weight.placeholder: weight for weight in weights}
    layers = []
    for weight in weights:
        calls = tuple(weight.placeholder.users)
        if not calls or not _is_parameter(weight.value, 2) or not all(_reads_once(c, weight, "weight") for c in calls):
            continue
        # By the node: a bias of None is one too.
        biases = {operation["bias"] for call in calls if (operation := canonicalise(call)) is not None}
        bias = next(iter(biases))
        if len(biases) > 1 or (bias is not None and bias not in by_node):
            continue
        if bias is None:
            layers.append(_Layer(weight, None, calls))
        elif (
            _is_parameter(by_node[bias].value, 1)
            and set(bias.users) == set(calls)
            and all(_reads_once(call, by_node[bias], "bias") for call in calls)
        ):
            layers.append(_Layer(weight, by_node[bias], calls))
    return layers


def _reads_once(node: fx.Node, weight: Weight, parameter: str) -> bool:
    """Whether a node is a linear layer's product that reads a weight in this place and in no other."""
    operation = canonicalise(node)
    if operation is None or operation.name != "linear":
        return False
    return [name for (name, _), operand in operation.operands() if operand is weight.placeholder] == [parameter]


def _is_parameter(value: Tensor, rank: int) -> bool:
    return isinstance(value, nn.Parameter) and not torch_private.is_opaque_tensor(value) and value.dim() == rank


class _Names:
    """Paths in a tree of modules. None is given twice, and none is a part of another one.

    Args:
        taken: paths that are given already.
    """

    def __init__(self, taken: Sequence[str] | Mapping[str, Any]) -> None:
        self._taken: set[str] = set()
        self._inner: set[str] = set()
        for path in taken:
            self._add(path)

    def take(self, wanted: str, suffix: str, module: str = "") -> str:
        """Return a free path.

        Args:
            wanted: the path, if it is free.
            suffix: what is put behind its module otherwise, with a number from the second time on.
            module: the part of the path that is the module's; all of it where none is given.
        """
        wanted, module = _allowed(wanted), _allowed(module)
        place = next((prefix for prefix in _prefixes(wanted) if prefix in self._taken), module or wanted)
        endings = itertools.chain([suffix] if suffix else [], (f"{suffix}_{count}" for count in itertools.count(2)))
        others = (place + ending + wanted[len(place) :] for ending in endings)
        path = next(path for path in itertools.chain([wanted], others) if self._is_free(path))
        self._add(path)
        return path

    def _is_free(self, path: str) -> bool:
        return path not in self._taken and path not in self._inner and self._taken.isdisjoint(_prefixes(path))

    def _add(self, path: str) -> None:
        self._taken.add(path)
        self._inner.update(_prefixes(path))


def _prefixes(path: str) -> list[str]:
    """``a`` and ``a.b`` of ``a.b.c``."""
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


def _allowed(path: str) -> str:
    """A path with nothing in it that a module has already, or that cannot be written in code."""
    parts = [re.sub(r"\W", "_", part) for part in path.split(".") if part]
    return ".".join(
        f"{part}_" if part in (_OF_A_MODULE if index else _OF_A_GRAPH_MODULE) else part
        for index, part in enumerate(parts)
    )
