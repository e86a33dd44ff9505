"""Which modules compute exactly one norm, read from the program: RMSNorm can take their place when their norms fold."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lncompile.analysis import Analysis
from lncompile.nn import RMSNorm
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.norms.calls import LAYER_NORMS, WITH_STATISTICS
from lncompile.passes.norms.sites import NormSite
from lncompile.plans.entries import ReplacedNorm, class_name
from lncompile.plans.holdings import Holdings

# What may stand beside the norm in its module: casts, and questions about a shape or dtype.
_CASTS = frozenset({"cast", "to", "type_as", "identity"})
_HARMLESS = _CASTS | {"metadata"}


@dataclass(frozen=True)
class NormModules:
    """What one program computes in modules of norms.

    Attributes:
        replaceable: what would take the place of each module all of whose calls fold, by its first path.
        obstacles: why RMSNorm cannot take the place of a module with a norm, by its first path.
        called: the modules that compute something, by their first paths, in graphs that operators run as well.
    """

    replaceable: Mapping[str, ReplacedNorm]
    obstacles: Mapping[str, str]
    called: Collection[str]


def find_norm_modules(analysis: Analysis, inputs: Sequence[Any], holdings: Holdings) -> NormModules:
    """Look at every module in which a program computes a norm.

    Args:
        analysis: of the program, before it is carried out.
        inputs: the value of each placeholder.
        holdings: what the model holds.
    """
    graph = analysis.graph_module.graph
    nodes: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        path = provenance.module_path(node) if node.op in ("call_function", "call_method") else ""
        if path in holdings.modules:
            nodes[holdings.paths_of(path)[0]].append(node)
    sites: dict[str, list[NormSite]] = defaultdict(list)
    for site in analysis.sites:
        path = provenance.module_path(site.node)
        if path in holdings.modules and not site.folded_before:
            sites[holdings.paths_of(path)[0]].append(site)
    in_bodies = {
        holdings.paths_of(path)[0] for path in paths_in_bodies(analysis.graph_module) if path in holdings.modules
    }
    folded = set() if analysis.placement is None else {site.node for site in analysis.placement.folded}
    examples = dict(zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True))
    replaceable: dict[str, ReplacedNorm] = {}
    obstacles: dict[str, str] = {}
    for path, found in sites.items():
        try:
            if not all(site.node in folded for site in found):
                raise _Obstacle("another call of it does not fold")
            if path in in_bodies:
                raise _Obstacle("another call of it is inside of an operator that runs a graph")
            replacements = {_replacement(site, path, nodes[path], examples, holdings) for site in found}
            if len(replacements) > 1:
                raise _Obstacle("its calls differ")
            replaceable[path] = replacements.pop()
        except _Obstacle as obstacle:
            obstacles[path] = str(obstacle)
    return NormModules(replaceable, obstacles, {*nodes, *in_bodies})


def paths_in_bodies(graph_module: fx.GraphModule) -> set[str]:
    """The paths of the modules that compute something in graphs that operators of a graph run (a checkpoint, a cond).

    Args:
        graph_module: the graph. Graphs that nothing of it runs do not count.
    """
    paths: set[str] = set()
    for node in graph_module.graph.nodes:
        body = getattr(graph_module, str(node.target), None) if node.op == "get_attr" and node.users else None
        if isinstance(body, fx.GraphModule):
            paths |= {provenance.module_path(inner) for inner in body.graph.nodes} | paths_in_bodies(body)
    return paths - {""}


class _Obstacle(Exception):
    """Why RMSNorm cannot take a module's place."""


def _replacement(
    site: NormSite, path: str, nodes: Sequence[fx.Node], examples: Mapping[fx.Node, Any], holdings: Holdings
) -> ReplacedNorm:
    module = holdings.modules[path]
    if site.handwritten is not None or site.operation.name not in LAYER_NORMS - WITH_STATISTICS:
        raise _Obstacle("its module does not call layer_norm")
    operations = {node: canonicalise(node) for node in nodes}
    for node, operation in operations.items():
        is_norm = operation is not None and operation.name in LAYER_NORMS
        if not is_norm and (operation is None or operation.name not in _HARMLESS):
            raise _Obstacle(f"its module computes something else as well ({provenance.describe(node)})")
    inside = set(nodes)
    start, cast_first = _before_casts(site.input, inside)
    end, cast_last = _behind_casts(site.node, inside)
    if start in inside or any(user in inside and _is_norm(user) for user in end.users):
        raise _Obstacle("its module computes two norms")
    if cast_first and not cast_last:
        raise _Obstacle("its result has another dtype than its input may have")
    if not isinstance(site.eps, float | int):
        raise _Obstacle("its ε is not a number")
    sizes = site.normalized_shape
    if not all(isinstance(size, int) for size in sizes):
        raise _Obstacle("the size it normalises is not a number")
    argument = _argument(module)
    weight, bias = (_own_name(node, inside, module, examples) for node in (site.weight, site.bias))
    paths = holdings.paths_of(path)
    entry = ReplacedNorm(paths[0], paths[1:], class_name(module), sizes, float(site.eps), weight, bias, argument)
    try:
        rms_norm_of(entry, module)
    except ValueError as error:
        raise _Obstacle(str(error)) from error
    return entry


def _argument(module: nn.Module) -> str:
    """What a module calls the tensor that it normalises."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
        # What it does with further ones, no example may have shown.
        raise _Obstacle("its module can be called with several arguments")
    return parameters[0].name


def rms_norm_of(entry: ReplacedNorm, module: nn.Module) -> RMSNorm:
    """What takes the place of a module.

    Raises:
        ValueError: where something of the module would be lost.
    """
    for name in ("eps", "variance_epsilon", "epsilon"):
        eps = getattr(module, name, None)
        if isinstance(eps, float) and eps != entry.eps:
            raise ValueError(f"its {name} is {eps}, and the plan was made for {entry.eps}")
    norm = RMSNorm.in_place_of(
        module,
        normalized_shape=entry.normalized_shape,
        eps=entry.eps,
        weight=entry.weight or "weight",
        bias=entry.bias or "bias",
        argument=entry.argument,
    )
    for name, own in (("weight", entry.weight), ("bias", entry.bias)):
        if own is None and getattr(norm, name, None) is not None:
            raise ValueError(f"{entry.path} holds a {name} that its norm does not use")
    return norm


def _is_norm(node: fx.Node) -> bool:
    operation = canonicalise(node)
    return operation is not None and operation.name in LAYER_NORMS


def _before_casts(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, bool]:
    """What a module was given, where the norm in it reads a cast of that; and whether it does."""
    was_cast = False
    while node in inside:
        operation = canonicalise(node)
        source = operation.arguments.get("input") if operation is not None and operation.name in _CASTS else None
        if not isinstance(source, fx.Node):
            break
        node, was_cast = source, True
    return node, was_cast


def _behind_casts(node: fx.Node, inside: set[fx.Node]) -> tuple[fx.Node, bool]:
    """What a module hands out, where that is a cast of the norm in it; and whether it is."""
    was_cast = False
    while True:
        operations = {user: canonicalise(user) for user in node.users if user in inside}
        casts = [user for user, operation in operations.items() if operation is not None and operation.name in _CASTS]
        if not casts:
            return node, was_cast
        if len(casts) > 1 or any(user not in inside for user in node.users):
            raise _Obstacle("its module hands out several tensors")
        node, was_cast = casts[0], True


def _own_name(node: Any, inside: set[fx.Node], module: nn.Module, examples: Mapping[fx.Node, Any]) -> str | None:
    """Under which name a module holds γ or β; None for a norm without."""
    if node is None:
        return None
    source, _ = _before_casts(node, inside)
    value = examples.get(source)
    tensors = {**vars(module)["_buffers"], **vars(module)["_parameters"]}
    for name, held in tensors.items():
        if isinstance(value, Tensor) and held is value:
            return str(name)
    raise _Obstacle("its γ or β is not a parameter of its module")
