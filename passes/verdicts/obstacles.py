"""Which of all that stands in the way to name: what has to go so that a site folds.

Around a site stand several blockers, and the nearest is often not the one that matters. CLIP's image encoder starts
from the output of a norm, which can be centered at each call and then serves all norms behind it; but the model also
returns the last hidden state, and so shifts of the stream would be seen::

    pre_layrnorm ─┬─ attn ─┬─ mlp ─┬─ ... ─┬─ last_hidden_state, returned
                  ln1      ln2     ln1     post_layernorm

So each obstacle is taken away in thought, and placement asked again. Of those without which a site folds, the one that
lets most sites fold is named, among equals the nearest. Where it takes more than one, the nearest blocker is named.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from lncompile.passes.decisions import Blocker, Reason, ReturnedTensor
from lncompile.passes.graph.facts import GraphFacts
from lncompile.passes.graph.provenance import describe
from lncompile.passes.norms.sites import NormSite
from lncompile.passes.placement.costs import NOTHING, CostModel
from lncompile.passes.placement.cut import Placement, place
from lncompile.passes.placement.streams import build_streams
from lncompile.passes.placement.variables import Variable, VariableKey

#: How many obstacles of one site, and of the sites of one stream, are tried. Each takes a placement of that stream.
PER_SITE, PER_STREAM = 4, 12


@dataclass(frozen=True)
class Named:
    """What to say of a site that stays.

    Attributes:
        blocker: the blocker to name.
        returned: where it is that tensors are returned, those to leave out.
    """

    blocker: Blocker
    returned: tuple[ReturnedTensor, ...] = ()


@dataclass(frozen=True)
class _Obstacle:
    """Blockers that go together.

    Attributes:
        sources: of these variables a centered version would be there for nothing.
        readers: of these variables, those readers would not notice a shift that are the graph's results
            (``is_result``), or all others.
        is_result: see there.
    """

    sources: frozenset[VariableKey] = frozenset()
    readers: frozenset[VariableKey] = frozenset()
    is_result: bool = False


def name_obstacles(
    sites: Sequence[NormSite], placement: Placement, facts: GraphFacts, assist: bool, costs: CostModel
) -> dict[fx.Node, Named]:
    """Find, for sites that do not fold, what has to go so that they do.

    Args:
        sites: all sites of the graph.
        placement: what was decided.
        facts: the facts of the graph.
        assist: whether activations may be centered at run time.
        costs: what was weighed.

    Returns:
        What to name, by the norm's node; nothing of a site where no single obstacle is the reason.
    """
    folded = {site.node for site in placement.folded}
    sites = [site for site in sites if not site.folded_before]
    if all(site.node in folded for site in sites):
        return {}
    variables = build_streams(sites, facts, costs, beyond_readers=True)
    results: dict[VariableKey, list[int]] = defaultdict(list)
    positions = _positions_of_results(sites[0].node.graph)
    for key, variable in variables.items():
        if any(blocker.reason is Reason.GRAPH_OUTPUT for blocker in variable.reader_blockers):
            results[key] = positions[key[0]]
    named: dict[fx.Node, Named] = {}
    for stream, members in _streams(sites, variables):
        left = [site for site in members if site.node not in folded]
        if left:
            named |= _Stream(stream, members, left, results, assist, costs).named()
    return named


def _positions_of_results(graph: fx.Graph) -> dict[fx.Node, list[int]]:
    """At which places of a graph's results each node stands."""
    positions: dict[fx.Node, list[int]] = defaultdict(list)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    results = output.args[0]
    for position, result in enumerate(results if isinstance(results, tuple | list) else [results]):
        if isinstance(result, fx.Node):
            positions[result].append(position)
    return positions


def _streams(
    sites: Sequence[NormSite], variables: Mapping[VariableKey, Variable]
) -> Iterable[tuple[dict[VariableKey, Variable], list[NormSite]]]:
    """Cut variables and sites into parts of which none has to do with another, in the order of the sites."""
    near: dict[VariableKey, set[VariableKey]] = defaultdict(set)
    for key, variable in variables.items():
        for other in (*variable.needs.items(), *variable.successors):
            if other in variables:
                near[key].add(other)
                near[other].add(key)
    seen: set[VariableKey] = set()
    for site in sites:
        start = (site.input, site.axes)
        if start in seen:
            continue
        part: dict[VariableKey, Variable] = {}
        queue = deque([start])
        while queue:
            key = queue.popleft()
            if key not in seen:
                seen.add(key)
                part[key] = variables[key]
                queue.extend(near[key])
        yield part, [site for site in sites if (site.input, site.axes) in part]


class _Stream:
    """The sites and variables of one stream, and its obstacles."""

    def __init__(
        self,
        variables: Mapping[VariableKey, Variable],
        sites: Sequence[NormSite],
        left: Sequence[NormSite],
        results: Mapping[VariableKey, Sequence[int]],
        assist: bool,
        costs: CostModel,
    ) -> None:
        self._variables, self._sites, self._left = variables, sites, left
        self._positions = results
        self._results = _Obstacle(readers=frozenset(key for key in variables if key in results), is_result=True)
        self._assist, self._costs = assist, costs

    def named(self) -> dict[fx.Node, Named]:
        """What to name, by the node of each site that stays."""
        near = {site.node: self._near((site.input, site.axes)) for site in self._left}
        tried = list(dict.fromkeys(obstacle for found in near.values() for obstacle in found))[:PER_STREAM]
        without = {obstacle: self._place_without(obstacle) for obstacle in tried}
        gains = {
            obstacle: sum(site in placement.folded for site in self._left) for obstacle, placement in without.items()
        }
        named = {}
        for site in self._left:
            best: _Obstacle | None = None
            for obstacle in near[site.node]:
                if obstacle not in without or site not in without[obstacle].folded:
                    continue
                if best is None or gains[obstacle] > gains[best]:
                    best = obstacle
            if best is not None:
                named[site.node] = self._say(site, best, near[site.node][best], without[best])
        return named

    def _near(self, start: VariableKey) -> dict[_Obstacle, Blocker]:
        """The obstacles around a variable, nearest first, each with the blocker by which it is met."""
        found: dict[_Obstacle, Blocker] = {}
        queue: deque[tuple[VariableKey, bool]] = deque([(start, True)])
        seen = {(start, True)}
        while queue:
            key, is_centered = queue.popleft()
            variable = self._variables[key]
            if is_centered and not variable.centered_at_run_time:
                continue
            obstacles = self._at(key, is_centered)
            for obstacle, blocker in obstacles.items():
                if len(found) < PER_SITE or obstacle == self._results:
                    found.setdefault(obstacle, blocker)
            needs = [(need, True) for need in variable.needs.items()] if is_centered else []
            for following in (*needs, *((successor, False) for successor in variable.successors)):
                if following not in seen and following[0] in self._variables:
                    seen.add(following)
                    queue.append(following)
        return found

    def _at(self, key: VariableKey, is_centered: bool) -> dict[_Obstacle, Blocker]:
        variable, found = self._variables[key], {}
        sources = frozenset([key]) if is_centered and variable.source_blocker is not None else frozenset()
        if variable.reader_blocker is not None and not variable.reader_blockers:
            # One thing is wrong with the tensor itself, and no reader could know better.
            return {_Obstacle(frozenset([key]), frozenset([key])): variable.reader_blocker}
        if variable.source_blocker is not None and sources:
            found[_Obstacle(sources)] = variable.source_blocker
        for blocker in variable.reader_blockers:
            is_result = blocker.reason is Reason.GRAPH_OUTPUT
            obstacle = self._results if is_result else _Obstacle(readers=frozenset([key]))
            found.setdefault(obstacle, blocker)
        return found

    def _place_without(self, obstacle: _Obstacle) -> Placement:
        variables = dict(self._variables)
        for key in obstacle.readers:
            variables[key] = _without_readers(variables[key], obstacle)
        for key in obstacle.sources:
            variables[key] = dataclasses.replace(variables[key], centering_cost=NOTHING, is_zero_mean=True)
        return place(self._sites, variables, self._assist, self._costs)

    def _say(self, site: NormSite, obstacle: _Obstacle, blocker: Blocker, without: Placement) -> Named:
        if not obstacle.is_result:
            return Named(blocker)
        # A site may fold because it shares the price of a centering with others: then their results are in the way.
        for starts in ([(site.input, site.axes)], [(other.input, other.axes) for other in without.folded]):
            shifted = self._shifted_with(starts, without)
            keys = [key for key in self._variables if key in self._positions and key in shifted]
            if keys:
                break
        if not keys:
            return Named(blocker)
        nodes = list(dict.fromkeys(key[0] for key in keys))
        nearest = next((node for node in nodes if node is blocker.node), nodes[0])
        returned = tuple(
            ReturnedTensor(position, describe(node))
            for node in dict.fromkeys((nearest, *nodes))
            for position in self._positions[next(key for key in keys if key[0] is node)]
        )
        return Named(dataclasses.replace(blocker, node=nearest), returned)

    def _shifted_with(self, starts: Sequence[VariableKey], placement: Placement) -> Collection[VariableKey]:
        """The variables that are shifted so that these are there centered."""
        centered, queue = set(starts), deque(starts)
        while queue:
            key = queue.popleft()
            if key in placement.streams or self._variables[key].is_recomputed:
                for need in self._variables[key].needs.items():
                    if need not in centered:
                        centered.add(need)
                        queue.append(need)
        shifted = {key for key in centered if key in placement.streams}
        queue = deque(shifted)
        while queue:
            for successor in self._variables[queue.popleft()].successors:
                if successor in self._variables and successor not in shifted:
                    shifted.add(successor)
                    queue.append(successor)
        return shifted


def _without_readers(variable: Variable, obstacle: _Obstacle) -> Variable:
    left = tuple(
        blocker
        for blocker in variable.reader_blockers
        if (blocker.reason is Reason.GRAPH_OUTPUT) is not obstacle.is_result
    )
    return dataclasses.replace(variable, reader_blocker=left[0] if left else None, reader_blockers=left)
