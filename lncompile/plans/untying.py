"""Which tied tables can be untied: an embedding gets a table of its own where nothing else reads it by its attribute.

What reads a table is not to be seen in a program, in which a tied table is one input, whatever attribute it was read
by. So it is tried: each embedding gets a parameter of its own, and the calls are captured once more.

    self.head(x)                               reads head.weight: the embedding can have another one
    functional.linear(x, self.embed.weight)    reads what the embedding has, and must not be given another one
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import nn

from lncompile.plans.capture import Call, Program, capture
from lncompile.plans.holdings import Holdings, Slot
from lncompile.plans.reading import reads_beside_lookups


def can_be_untied(
    model: nn.Module, calls: Sequence[Call], holdings: Holdings, lookups: Collection[Slot]
) -> frozenset[Slot]:
    """Find the embeddings that can have a table of their own.

    Args:
        model: ready to be captured.
        calls: the examples.
        holdings: what the model holds.
        lookups: embeddings by their tables.
    """
    candidates: dict[str, list[Slot]] = defaultdict(list)
    for lookup in sorted(lookups):
        if len(holdings.named(lookup.name).names) > 1:
            candidates[lookup.name].append(lookup)
    if not candidates:
        return frozenset()
    with _own_tables(holdings, candidates) as tables:
        programs = [capture(model, call) for call in calls]
        apart = Holdings(model)
        return frozenset(
            lookup
            for table, group in candidates.items()
            if not _is_read_beside_lookups(programs, apart, tables[table], group)
            for lookup in group
        )


@contextlib.contextmanager
def _own_tables(holdings: Holdings, candidates: Mapping[str, Sequence[Slot]]) -> Iterator[dict[str, nn.Parameter]]:
    """Context in which embeddings have parameters of their own, one for all those of one table, with its values."""
    made: dict[str, nn.Parameter] = {}
    exchanged = []
    try:
        for table, group in candidates.items():
            held = holdings.named(table).tensor
            made[table] = nn.Parameter(held.detach(), held.requires_grad)
            for lookup in group:
                registry = vars(holdings.modules[lookup.lookup])["_parameters"]
                exchanged.append((registry, registry["weight"]))
                registry["weight"] = made[table]
        yield made
    finally:
        for registry, weight in exchanged:
            registry["weight"] = weight


def _is_read_beside_lookups(
    programs: Sequence[Program], holdings: Holdings, table: nn.Parameter, group: Sequence[Slot]
) -> bool:
    paths = {lookup.lookup for lookup in group}
    return any(reads_beside_lookups(program, holdings, table, paths) for program in programs)
