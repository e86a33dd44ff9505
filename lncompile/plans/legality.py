"""Which parameters may be centered: those that every program reads centered, along the same axes, or not at all.

A parameter that cannot be centered is kept, with the reason, and all programs are read anew without it: the norms that
need it stay, and what only they wanted centered is not wanted any more. Fewer parameters are centered each time, so
this ends.

A table that an embedding looks up in and that something else reads as it is (a tied head) does not have to be kept:
what the embedding looks up can be centered apart from its table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from lncompile.plans.capture import Program
from lncompile.plans.holdings import Holdings, Slot
from lncompile.plans.reading import Reading, lookups_of, odd_lookups, read
from lncompile.plans.ways import Way

#: A centering at each call takes one pass over the stream, which is what one norm saves.
_NORMS_WORTH_A_CENTERING = 2


@dataclass(frozen=True)
class Settled:
    """What may be centered.

    Attributes:
        readings: of all programs.
        centered: what is done to each slot.
        kept: slots that stay as they are, with why, where a norm wanted them centered.
        separate: embeddings whose look-up is centered apart from their table.
    """

    readings: Sequence[Reading]
    centered: Mapping[Slot, Way]
    kept: Mapping[Slot, str]
    separate: frozenset[Slot]

    @property
    def folded(self) -> int:
        """How many norms fold."""
        return sum(reading.folded for reading in self.readings)


@dataclass
class _State:
    kept: dict[Slot, str]
    separate: set[Slot] = field(default_factory=set)
    barred: set[Slot] = field(default_factory=set)


def settle(
    programs: Sequence[Program], holdings: Holdings, untied: Collection[Slot], with_readers: bool = False
) -> Settled:
    """Decide what is centered.

    Args:
        programs: the example calls.
        holdings: what the model holds.
        untied: embeddings that get a centered table of their own, if their table cannot be centered.
        with_readers: whether it is asked for what reads the norms.
    """
    state = _State({Slot(name): held.obstacle for name, held in holdings.obstacles()})
    for program in programs:
        for value in program.example_inputs:
            for name in holdings.sharing_memory_with(value):
                state.kept[Slot(name)] = "shares its memory with a tensor that is not in the state dict"
    lookups = all_lookups(programs, holdings)
    settled = _settle(programs, holdings, lookups, state)
    for lookup in sorted(settled.separate):
        without = _State(dict(state.kept), state.separate - {lookup}, state.barred | {lookup})
        kept_tied = _settle(programs, holdings, lookups, without)
        if settled.folded - kept_tied.folded < (1 if lookup in untied else _NORMS_WORTH_A_CENTERING):
            settled, state = kept_tied, without
    if with_readers:
        readings = [read(program, holdings, state.kept, state.separate, True) for program in programs]
        settled = dataclasses.replace(settled, readings=readings)
    return settled


def all_lookups(programs: Sequence[Program], holdings: Holdings) -> set[Slot]:
    """The embeddings whose look-ups can be centered apart from their tables, in all programs.

    Args:
        programs: the example calls.
        holdings: what the model holds.
    """
    odd = set().union(*(odd_lookups(program, holdings) for program in programs))
    return {slot for program in programs for slot in lookups_of(program, holdings) if slot.lookup not in odd}


def _settle(programs: Sequence[Program], holdings: Holdings, lookups: set[Slot], state: _State) -> Settled:
    while True:
        readings = [read(program, holdings, state.kept, state.separate) for program in programs]
        conflicts = find_conflicts(readings)
        if not conflicts:
            break
        for slot, reason in conflicts.items():
            own_lookups = {lookup for lookup in lookups - state.barred if lookup.name == slot.name}
            state.kept[Slot(slot.name)] = reason
            if slot.lookup:
                # That look-up cannot be centered, and so neither can its table.
                state.separate.discard(slot)
                state.barred.add(slot)
            else:
                state.separate |= own_lookups
    centered = {slot: way for reading in readings for slot, ways in reading.wanted.items() for way in ways}
    separate = frozenset(slot for slot in state.separate if slot in centered)
    return Settled(readings, centered, state.kept, separate)


def find_conflicts(readings: Sequence[Reading]) -> dict[Slot, str]:
    """Return the slots that some program wants centered and that cannot be, with why, in words.

    Args:
        readings: of all programs.
    """
    conflicts: dict[Slot, str] = {}
    ways: dict[Slot, set[Way]] = {}
    for reading in readings:
        conflicts.update(reading.inexpressible)
        for slot, wanted in reading.wanted.items():
            ways.setdefault(slot, set()).update(wanted)
    for slot, wanted in ways.items():
        readers = [(number, reading.raw[slot]) for number, reading in enumerate(readings, 1) if slot in reading.raw]
        if len(wanted) > 1:
            conflicts[slot] = "would have to be centered in several ways"
        elif slot.lookup and not all(way.is_of_rows for way in wanted):
            conflicts[slot] = "is tied, and would have to be centered in parts of its rows"
        elif readers:
            number, reader = readers[0]
            call = f" in call {number}" if len(readings) > 1 else ""
            conflicts[slot] = f"is also read as it is{call}: {reader}" if reader else "is read in several ways"
    return conflicts
