"""What a race of the ways to compile a graph found: the data of a report, and the sentences that say it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Raced:
    """One way to compile a graph, as it was raced.

    Attributes:
        name: of the way: ``"stock"``, ``"model"`` (what the model of costs chooses), ``"fold alone"``, ...
        options: what to give ``torch.compile`` for it, beside the user's own options.
        speedup: how many times as fast as stock; None where it was not timed.
        low: lower end of that one's interval; None where there were too few rounds for one.
        high: upper end.
        rounds: in how many rounds it was timed.
        note: what else is to be said: that it is the same graph as another, was dropped early, or failed.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    speedup: float | None = None
    low: float | None = None
    high: float | None = None
    rounds: int = 0
    note: str = ""

    def in_words(self) -> str:
        """``"fold alone 1.066 [1.031, 1.102] (27 rounds)"``."""
        words = self.name
        if self.speedup is not None:
            words += f" {self.speedup:.3f}"
        if self.low is not None and self.high is not None:
            words += f" [{self.low:.3f}, {self.high:.3f}]"
        remarks = [f"{self.rounds} rounds"] if self.rounds else []
        remarks += [self.note] if self.note else []
        return f"{words} ({'; '.join(remarks)})" if remarks else words


@dataclass(frozen=True)
class Selection:
    """How the way to compile one graph was chosen.

    Attributes:
        chosen: the name of the way.
        raced: all ways that there were; empty where nothing was raced.
        reason: why it is this one, or why nothing was raced, in words.
        when: when they were raced, UTC, as ``"2026-11-28 03:50"``.
        device: on what.
        seconds: how long the race took, compiling included.
        minimum_speedup: what another way than stock had to surpass.
        source: ``"race"``, or the file that the result of an earlier one was kept in.
    """

    chosen: str
    raced: tuple[Raced, ...] = ()
    reason: str = ""
    when: str = ""
    device: str = ""
    seconds: float = 0.0
    minimum_speedup: float = 1.0
    source: str = "race"

    @property
    def is_race(self) -> bool:
        """Whether ways were raced, now or earlier."""
        return any(way.rounds for way in self.raced)


def in_words(selection: Selection) -> Iterator[str]:
    """The sentences of a report: what was chosen, and a line for each way that was raced."""
    if not selection.is_race:
        yield f"not raced: {selection.reason}; compiled as '{selection.chosen}'"
        return
    kept = "" if selection.source == "race" else f", kept in {selection.source}"
    yield (
        f"raced {selection.when} UTC on {selection.device}, {selection.seconds:.1f} s{kept}: '{selection.chosen}' is "
        f"chosen: {selection.reason}"
    )
    ways = ", ".join(way.in_words() for way in selection.raced)
    yield f"times as fast as stock torch.compile, with 95% intervals for all ways and looks together: {ways}"


def options_of_choice(selections: Iterable[Selection]) -> dict[str, Any] | None:
    """Return what to give ``torch.compile``, beside the user's own options, for the ways that races chose.

    Args:
        selections: of the graphs of one model.

    Returns:
        The options of the way, where it is the same one in every graph that was raced; ``lnfold.select="measure"``
        where graphs differ; None where stock was chosen in each, or nothing was raced.

    Example:
        >>> way = Raced("scales deferred", {"lnfold.defer": "on"}, 1.1, 1.05, 1.15, 40)
        >>> options_of_choice([Selection("scales deferred", (way,))])
        {'lnfold.defer': 'on'}
    """
    raced = [selection for selection in selections if selection.is_race]
    chosen = {selection.chosen for selection in raced}
    if not raced or chosen == {"stock"}:
        return None
    if len(chosen) > 1:
        return {"lnfold.select": "measure"}
    (way,) = (way for way in raced[0].raced if way.name == raced[0].chosen)
    return dict(way.options)


def to_dict(selection: Selection) -> dict[str, Any]:
    """Return a selection as plain dicts, ready for JSON."""
    return {
        **vars(selection),
        "raced": [{**vars(way), "options": dict(way.options)} for way in selection.raced],
    }


def from_dict(data: Any) -> Selection:
    """Read what :func:`to_dict` returned.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(data, dict) or not isinstance(data.get("raced"), list):
        raise ValueError("it is not the result of a race")
    raced = tuple(Raced(**_checked(way, _RACED)) for way in data["raced"])
    return Selection(**{**_checked(data, _SELECTION), "raced": raced})


_NUMBER: tuple[type, ...] = (int, float)
_RACED: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "options": (dict,),
    "speedup": (*_NUMBER, type(None)),
    "low": (*_NUMBER, type(None)),
    "high": (*_NUMBER, type(None)),
    "rounds": (int,),
    "note": (str,),
}
_SELECTION: dict[str, tuple[type, ...]] = {
    "chosen": (str,),
    "raced": (list,),
    "reason": (str,),
    "when": (str,),
    "device": (str,),
    "seconds": _NUMBER,
    "minimum_speedup": _NUMBER,
    "source": (str,),
}


def _checked(data: Any, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(kinds):
        raise ValueError("it has other entries than the result of a race")
    for name, value in data.items():
        if not isinstance(value, kinds[name]) or isinstance(value, bool):
            raise ValueError(f"'{name}' is not what it has to be")
    return dict(data)


__all__ = ["Raced", "Selection", "from_dict", "in_words", "options_of_choice", "to_dict"]
