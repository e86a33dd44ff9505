"""γ and β of a folded norm in the layers that read it: what a program says about that, and what a plan makes of it.

    W (γ ⊙ x̂ + β) + b = (W diag(γ)) x̂ + (b + Wβ)

β goes into a bias, which must be read by nothing but products of that norm's output; where a layer has none, one is
added. γ goes into the weight, of which the same must hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lncompile.analysis import Analysis
from lncompile.passes.decisions import Blocked
from lncompile.passes.graph import provenance
from lncompile.passes.graph.effects import examples_of, find_writes
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.operands import KEPT
from lncompile.passes.rewrites.consumers import Consumer, find_consumers
from lncompile.passes.rules.writes import can_be_read
from lncompile.plans.entries import AbsorbedNorm, AbsorbingLayer, ReplacedNorm
from lncompile.plans.holdings import Holdings, Slot
from lncompile.plans.norm_modules import paths_in_bodies

# Stands for the nodes of graphs that operators run.
_IN_A_BODY = "in a body"


@dataclass(frozen=True)
class Product:
    """A product that reads a norm's output.

    Attributes:
        node: its name in the program.
        path: of the module it is computed in.
        weight: what it multiplies with; None where that is not a parameter itself.
        dimension: which dimension of the weight is the norm's features.
        bias: what it adds, or None.
        has_bias: whether it adds something.
    """

    node: str
    path: str
    weight: Slot | None
    dimension: int
    bias: Slot | None
    has_bias: bool


@dataclass(frozen=True)
class Readers:
    """What one program does with the outputs of norms.

    Attributes:
        products: what reads the output of each module of a norm, by its path.
        obstacles: why γ and β of a module cannot be absorbed, by its path.
        users: the nodes that read each slot.
        computed: the nodes that each module computes, by its path.
    """

    products: Mapping[str, Sequence[Product]]
    obstacles: Mapping[str, str]
    users: Mapping[Slot, Collection[str]]
    computed: Mapping[str, Collection[str]]


def find_readers(
    analysis: Analysis, inputs: Sequence[Any], slots: Sequence[Slot | None], holdings: Holdings
) -> Readers:
    """Look at what reads each folded norm.

    Args:
        analysis: of the program, before it is carried out.
        inputs: the value of each placeholder.
        slots: what each placeholder is in the model.
        holdings: what the model holds.
    """
    graph = analysis.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    slot_of = {node: slot for node, slot in zip(placeholders, slots, strict=True) if slot is not None}
    users: dict[Slot, set[str]] = defaultdict(set)
    for node, slot in slot_of.items():
        users[slot].update(user.name for user in node.users)
    computed: dict[str, set[str]] = defaultdict(set)
    for node in graph.nodes:
        path = provenance.module_path(node) if node.op in ("call_function", "call_method") else ""
        if path in holdings.modules:
            computed[holdings.paths_of(path)[0]].add(node.name)
    for node in slot_of:
        node.meta.pop(KEPT, None)  # that it is not to be centered says nothing of what it can absorb
    for path in paths_in_bodies(analysis.graph_module) & holdings.modules.keys():
        computed[holdings.paths_of(path)[0]].add(_IN_A_BODY)
    facts = GraphFacts(graph, inputs, find_writes(graph, examples_of(graph, inputs), can_be_read))
    products: dict[str, list[Product]] = defaultdict(list)
    obstacles: dict[str, str] = {}
    for site in () if analysis.placement is None else analysis.placement.folded:
        path = provenance.module_path(site.node)
        if path not in holdings.modules:
            continue
        path = holdings.paths_of(path)[0]
        try:
            products[path] += [_product(consumer, slot_of, holdings) for consumer in find_consumers(site, facts)]
        except Blocked as blocked:
            obstacles[path] = blocked.sentence
    return Readers(products, obstacles, users, computed)


def _product(consumer: Consumer, slot_of: Mapping[fx.Node, Slot], holdings: Holdings) -> Product:
    path = provenance.module_path(consumer.operation.node)
    bias = consumer.bias
    return Product(
        consumer.operation.node.name,
        holdings.paths_of(path)[0] if path in holdings.modules else path,
        slot_of.get(consumer.weight),
        consumer.operands.incoming,
        None if bias is None else slot_of.get(bias),
        bias is not None,
    )


def plan_absorptions(
    mode: str,
    replace: Mapping[str, ReplacedNorm],
    readers: Sequence[Readers],
    holdings: Holdings,
    own_tables: Collection[Slot],
) -> tuple[tuple[AbsorbedNorm, ...], dict[str, str]]:
    """Decide for each norm whether the layers behind it take its γ and β.

    Args:
        mode: ``"bias"``: β; ``"affine"``: γ as well.
        replace: the norms that become RMSNorms, by path.
        readers: of all programs.
        holdings: what the model holds.
        own_tables: embeddings that get a table of their own.

    Returns:
        What is absorbed, and of other norms why not, by path.
    """
    absorbed: list[AbsorbedNorm] = []
    stays: dict[str, str] = {}
    for path, norm in replace.items():
        prefix = f"{path}." if path else ""
        gamma = None if norm.weight is None or mode != "affine" else prefix + norm.weight
        beta = None if norm.bias is None else prefix + norm.bias
        if gamma is None and beta is None:
            continue
        try:
            _require_known_readers(path, readers)
            layers = _layers(path, readers, holdings)
            if beta is not None:
                _require_own(path, beta, readers, holdings)
                _require_biases(path, layers, readers)
        except _Stays as reason:
            stays[path] = str(reason)
            continue
        if gamma is not None:
            try:
                _require_own(path, gamma, readers, holdings)
                _require_weights(path, layers, readers, own_tables)
            except _Stays as reason:
                stays[path] = f"its weight: {reason}"
                gamma = None
        if gamma is not None or beta is not None:
            absorbed.append(AbsorbedNorm(path, gamma, beta, layers if beta else _without_biases(layers)))
    return tuple(absorbed), stays


class _Stays(Exception):
    """Why γ or β stays with its norm."""


def _without_biases(layers: Sequence[AbsorbingLayer]) -> tuple[AbsorbingLayer, ...]:
    return tuple(AbsorbingLayer(layer.path, layer.weight, layer.dimension, None, False) for layer in layers)


def _require_known_readers(path: str, readers: Sequence[Readers]) -> None:
    for program in readers:
        if path in program.obstacles:
            raise _Stays(program.obstacles[path])


def _require_own(path: str, name: str, readers: Sequence[Readers], holdings: Holdings) -> None:
    """γ and β must be read by their norm alone."""
    held = holdings.named(name)
    attribute = name.rpartition(".")[2]
    own = {f"{own_path}.{attribute}".lstrip(".") for own_path in holdings.paths_of(path)}
    others = [other for other in held.names if other not in own]
    if others:
        raise _Stays(f"'{name}' is tied to '{others[0]}'")
    if held.obstacle:
        raise _Stays(f"'{name}' {held.obstacle}")
    for program in readers:
        if set(program.users.get(Slot(held.names[0]), ())) - set(program.computed.get(path, ())):
            raise _Stays(f"'{name}' is also read outside of its norm")


def _layers(path: str, readers: Sequence[Readers], holdings: Holdings) -> tuple[AbsorbingLayer, ...]:
    """The layers that read a norm, each once; all calls in all programs have the same."""
    found: list[dict[str, AbsorbingLayer]] = []
    for program in readers:
        if path not in program.products:
            continue
        layers: dict[str, AbsorbingLayer] = {}
        for product in program.products[path]:
            layer = _layer(product, holdings)
            if layers.setdefault(layer.weight, layer) != layer:
                raise _Stays(f"'{layer.weight}' is read in several ways")
        found.append(layers)
    if any(layers != found[0] for layers in found):
        raise _Stays("its calls are read by different layers")
    return tuple(found[0].values())


def _layer(product: Product, holdings: Holdings) -> AbsorbingLayer:
    if product.weight is None or (product.has_bias and product.bias is None):
        raise _Stays(f"the weight or bias of {product.path or product.node} is not a parameter itself")
    for slot in (product.weight, product.bias):
        held = None if slot is None else holdings.named(slot.name)
        if held is not None and held.obstacle:
            raise _Stays(f"'{held.names[0]}' {held.obstacle}")
    if product.bias is not None:
        return AbsorbingLayer(product.path, product.weight.name, product.dimension, product.bias.name, False)
    module = holdings.modules.get(product.path)
    if type(module) is not nn.Linear:
        raise _Stays(f"{product.path or product.node} has no bias, and none can be added to it")
    return AbsorbingLayer(product.path, product.weight.name, product.dimension, f"{product.path}.bias", True)


def _require_biases(path: str, layers: Sequence[AbsorbingLayer], readers: Sequence[Readers]) -> None:
    """Each bias, and each layer that gets one, must have no other part in any program."""
    biases = [layer.bias for layer in layers]
    if len(set(biases)) < len(biases):
        raise _Stays("layers behind it share a bias, and each would need its own")
    for program in readers:
        nodes = {product.node for product in program.products.get(path, ())}
        for layer in layers:
            assert layer.bias is not None  # those of β have one
            if layer.adds_bias and set(program.computed.get(layer.path, ())) - nodes:
                raise _Stays(f"'{layer.path}' also reads something else")
            if set(program.users.get(Slot(layer.bias), ())) - nodes:
                raise _Stays(f"'{layer.bias}' is also read otherwise")


def _require_weights(
    path: str, layers: Sequence[AbsorbingLayer], readers: Sequence[Readers], own_tables: Collection[Slot]
) -> None:
    for program in readers:
        nodes = {product.node for product in program.products.get(path, ())}
        for layer in layers:
            if set(program.users.get(Slot(layer.weight), ())) - nodes:
                raise _Stays(f"'{layer.weight}' is also read otherwise")
            looked_up = [slot for slot in program.users if slot.lookup and slot.name == layer.weight]
            if any(slot not in own_tables for slot in looked_up):
                raise _Stays(f"'{layer.weight}' is also looked up in")
