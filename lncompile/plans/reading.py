"""Reading one program of a plan: which parameters it wants centered, which it reads as they are, which norms fold."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from lncompile.analysis import Analysis, analyse
from lncompile.lowering import torch_private
from lncompile.options import Options
from lncompile.passes.decisions import Verdict
from lncompile.passes.graph import provenance
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.graph.operands import CONSTANTS_STAY, KEPT
from lncompile.pipeline import uses_in
from lncompile.plans.absorbing import Readers, find_readers
from lncompile.plans.capture import Program
from lncompile.plans.holdings import Holdings, Slot
from lncompile.plans.norm_modules import NormModules, find_norm_modules, paths_in_bodies
from lncompile.plans.ways import Scalings, Way, find_scalings
from lncompile.transform import Transformed, transform

#: Centering alone: nothing at run time, and nothing that would need copies of further weights.
_OPTIONS = Options(assist="off", absorb_affine="off", defer="off", matrix_vector="off")


@dataclass(frozen=True)
class Reading:
    """What one program does with the parameters of the model.

    Attributes:
        verdicts: what becomes of each norm.
        wanted: what is to be done to each slot, in each way that the program wants it.
        raw: slots that it reads as they are, with where in words.
        inexpressible: slots that would be centered as a part of something else than one parameter.
        read: all slots that it reads.
        norm_modules: the modules that compute a folded norm, and what else was found in modules of norms.
        readers: what reads the norms, where that is asked for.
    """

    verdicts: tuple[Verdict, ...]
    wanted: Mapping[Slot, Collection[Way]]
    raw: Mapping[Slot, str]
    inexpressible: Mapping[Slot, str]
    read: Collection[Slot]
    norm_modules: NormModules
    readers: Readers | None = None

    @property
    def folded(self) -> int:
        """How many norms fold."""
        return sum(verdict.folded for verdict in self.verdicts)


def read(
    program: Program,
    holdings: Holdings,
    kept: Mapping[Slot, str],
    separate: Collection[Slot],
    with_readers: bool = False,
) -> Reading:
    """Analyse a program.

    Args:
        program: the program.
        holdings: what the model holds.
        kept: slots that stay as they are, with why.
        separate: embeddings whose look-up is read as if their table were their own.
        with_readers: whether it is asked for what reads the norms.
    """
    graph_module = copy_graph_module(program.graph_module)
    inputs = list(program.example_inputs)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    slots: list[Slot | None] = []
    for placeholder, value in zip(placeholders, inputs, strict=True):
        held = holdings.find(value)
        slots.append(None if held is None else Slot(held.names[0]))
        is_weight = isinstance(value, nn.Parameter) or torch_private.is_static_input(placeholder)
        if held is None and isinstance(value, Tensor) and is_weight:
            placeholder.meta[KEPT] = "is not in the model's state dict"
    for position, slot in enumerate(list(slots)):
        for lookup in (s for s in separate if slot is not None and s.name == slot.name):
            _separate(graph_module.graph, placeholders[position], holdings, lookup, inputs, slots)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for placeholder, slot in zip(placeholders, slots, strict=True):
        if slot is not None and slot in kept:
            placeholder.meta[KEPT] = kept[slot]
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    output.meta[CONSTANTS_STAY] = True  # the model's code adds what it adds
    analysis = analyse(graph_module, inputs, _OPTIONS)
    norm_modules = find_norm_modules(analysis, inputs, holdings)
    readers = find_readers(analysis, inputs, slots, holdings) if with_readers else None
    scalings = find_scalings(analysis, slots)
    transformed = None if analysis.placement is None else transform(analysis, _OPTIONS)
    reading = _reading(graph_module, analysis, transformed, slots, norm_modules, scalings)
    return dataclasses.replace(reading, readers=readers)


def lookups_of(program: Program, holdings: Holdings) -> set[Slot]:
    """The embeddings that look up in a parameter of their own as modules of ``nn.Embedding`` do."""
    found: set[Slot] = set()
    for placeholder, value in zip(_placeholders(program.graph_module), program.example_inputs, strict=True):
        held = holdings.find(value)
        if held is not None:
            found.update(Slot(held.names[0], path) for path in _lookups(placeholder, held.tensor, holdings))
    return found


def reads_beside_lookups(program: Program, holdings: Holdings, table: Tensor, paths: Collection[str]) -> bool:
    """Whether a program reads a table otherwise than by look-ups of the embeddings at some paths.

    Args:
        program: the program.
        holdings: what the model holds.
        table: the table.
        paths: the first paths of the embeddings.
    """
    for placeholder, value in zip(_placeholders(program.graph_module), program.example_inputs, strict=True):
        if value is table:
            found = _lookups(placeholder, table, holdings)
            looked_up = {node for path, nodes in found.items() if path in paths for node in nodes}
            if set(placeholder.users) - looked_up:
                return True
    return False


def odd_lookups(program: Program, holdings: Holdings) -> set[str]:
    """The embeddings that do something else than look up in their table, or do it where it cannot be separated."""
    looked_up: dict[str, set[fx.Node]] = defaultdict(set)
    for placeholder, value in zip(_placeholders(program.graph_module), program.example_inputs, strict=True):
        held = holdings.find(value)
        for path, nodes in _lookups(placeholder, held.tensor, holdings).items() if held is not None else ():
            looked_up[path].update(nodes)
    odd = paths_in_bodies(program.graph_module)
    for node in program.graph_module.graph.nodes:
        operation = canonicalise(node) if node.op in ("call_function", "call_method") else None
        path = provenance.module_path(node)
        if operation is not None and operation.name == "embedding" and path in holdings.modules:
            path = holdings.paths_of(path)[0]
            if node not in looked_up[path]:
                odd.add(path)
    return {holdings.paths_of(path)[0] for path in odd if path in holdings.modules}


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]


def _lookups(placeholder: fx.Node, table: Tensor, holdings: Holdings) -> dict[str, list[fx.Node]]:
    """The look-ups in a table, by the path of the embedding that does them."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for user in placeholder.users:
        operation = canonicalise(user)
        if operation is None or operation.name != "embedding" or operation["weight"] is not placeholder:
            continue
        path = provenance.module_path(user)
        module = holdings.modules.get(path)
        if isinstance(module, nn.Embedding) and module.weight is table and _only_looks_up(user, path):
            found[holdings.paths_of(path)[0]].append(user)
    return found


def _only_looks_up(lookup: fx.Node, path: str) -> bool:
    """Whether an embedding does nothing else with the rows than scaling them by a number: what it returns is them."""
    node = lookup
    while True:
        inside = [user for user in node.users if provenance.module_path(user) == path]
        if not inside:
            return True
        operation = canonicalise(inside[0])
        if len(node.users) != 1 or operation is None or operation.name not in ("mul", "cast", "to", "dropout"):
            return False
        others = [operand for _, operand in operation.operands() if operand is not node]
        if others:
            return False
        node = inside[0]


def _separate(
    graph: fx.Graph,
    placeholder: fx.Node,
    holdings: Holdings,
    lookup: Slot,
    inputs: list[Any],
    slots: list[Slot | None],
) -> None:
    """Let the look-ups of one embedding read an input of their own."""
    nodes = _lookups(placeholder, holdings.named(lookup.name).tensor, holdings).get(lookup.lookup, [])
    if not nodes:
        return
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        own = graph.placeholder(f"{placeholder.name}_of_lookup_{len(slots)}")
    own.meta = dict(placeholder.meta)
    torch_private.copy_placeholder_source(placeholder, own)
    for node in nodes:
        node.replace_input_with(placeholder, own)
    inputs.append(inputs[slots.index(Slot(lookup.name))])
    slots.append(lookup)


def _reading(
    graph_module: fx.GraphModule,
    analysis: Analysis,
    transformed: Transformed | None,
    slots: list[Slot | None],
    norm_modules: NormModules,
    scalings: Scalings,
) -> Reading:
    uses = uses_in(graph_module, transformed)
    wanted: dict[Slot, set[Way]] = defaultdict(set)
    inexpressible: dict[Slot, str] = {}
    scaled: set[int] = set()
    for expression in transformed.expressions if transformed is not None else ():
        centered = [slots[leaf] for leaf in expression.leaves]
        ways = scalings.get(frozenset(expression.leaves), {})
        scaled.update(expression.leaves if ways else ())
        for slot in centered:
            if slot is not None and expression.centered_along is not None:
                wanted[slot].add(Way(expression.centered_along))
            elif slot is not None and slot in ways:
                wanted[slot].add(ways[slot])
            elif slot is not None:
                others = [other.name for other in centered if other is not None and other != slot]
                inexpressible[slot] = _goes_with(others)
    rewritten = graph_module if transformed is None else transformed.graph_module
    raw: dict[Slot, str] = {}
    for placeholder, (position, use) in zip(
        (_placeholders(rewritten)[position] for position in uses), uses.items(), strict=True
    ):
        slot = slots[position]
        if slot is not None and use is None and not (position in scaled and not placeholder.users):
            users = [user for user in placeholder.users if user.op != "output"]
            raw[slot] = (
                provenance.describe(users[0]) if users else "what the model returns" if placeholder.users else ""
            )
    read_slots = {slot for position in uses if (slot := slots[position]) is not None}
    return Reading(analysis.verdicts, wanted, raw, inexpressible, read_slots, norm_modules)


def _goes_with(others: list[str]) -> str:
    if not others:
        return "is read through an operation that centering it does not pass"
    return f"goes into the stream only together with {', '.join(repr(name) for name in others)}"
