"""Graph breaks in the user's words: where, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import fx

from lncompile.lowering import torch_private_breaks
from lncompile.passes.decisions import GraphBreak

#: Reasons that Dynamo gives by a name of its own code.
_IN_WORDS = {"generic_jump": "a branch on the value of a tensor (if, while)"}


_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def graph_break_of(graph_module: fx.GraphModule) -> GraphBreak | None:
    """Return the graph break at which a graph of Dynamo's ends; None where it ends with what was compiled."""
    found = torch_private_breaks.graph_break_of(graph_module)
    return None if found is None else _in_words(found)


def in_words(breaks: Iterable[torch_private_breaks.Break]) -> tuple[GraphBreak, ...]:
    """Return graph breaks in the user's words, each place and reason once."""
    return tuple(dict.fromkeys(_in_words(found) for found in breaks))


def _in_words(found: torch_private_breaks.Break) -> GraphBreak:
    first, *rest = (line.strip() for line in found.reason.strip().splitlines() or [""])
    explanation = next((line.removeprefix("Explanation: ") for line in rest if line.startswith("Explanation: ")), "")
    reason = _IN_WORDS.get(first.partition(" ")[0], first)
    # Addresses differ from one process to the next, and say nothing.
    explanation = _ADDRESS.sub("", explanation)
    reason = f"{reason}: {explanation}" if explanation else reason
    place = f"{found.file.rsplit('/', 1)[-1]}:{found.line}" if found.file else ""
    return GraphBreak(place, reason)
