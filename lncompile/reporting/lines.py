"""A line for sites that repeat: ``h.0-11.ln_1  12 of 12`` in the place of twelve.

Sites share a line where their names differ in indices alone and all else is of one kind: verdict, place in the source,
and the words but for the numbers in them. A site that differs has a line of its own.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lncompile.passes.decisions import Verdict
from lncompile.reporting.words import why

# A number in words that tells sites of one kind apart: of parameters, or of a layer in a path; no line of a file, and
# no part of a name such as `layer_norm1`.
_NUMBER = re.compile(r"(?<!\.py:)(?<![\w-])\d+\b(?!\.\d)")
# What is counted: `1 parameter` and `2 parameters` are of one kind.
_PLURAL = re.compile(r"(?<=# )(\w+?)s\b")
# The number at the end of a graph's own name for a call: `h.0:layer_norm_3`.
_CALL = re.compile(r"(?<=:)([A-Za-z_]\w*?)(_\d+)?$")
#: Above so many runs of indices (`0, 2, 4`) a line says from where to where they go, and how many there are.
RUNS = 3


@dataclass(frozen=True)
class Line:
    """A line of a report: one site, or several of one kind.

    Attributes:
        name: of the sites, with ranges in the place of indices: ``"h.0-11.ln_1"``.
        sites: those it stands for.
        alike: how many sites of the report have such a name, whatever became of them.
        why: why they folded or not.
    """

    name: str
    sites: tuple[Verdict, ...]
    alike: int
    why: str

    @property
    def location(self) -> str:
        """Where the sites stand in the model's source."""
        return self.sites[0].location

    @property
    def lowering(self) -> str:
        """What they are lowered to."""
        return self.sites[0].lowering

    @property
    def folded(self) -> bool:
        """Whether they folded."""
        return self.sites[0].folded

    @property
    def count(self) -> str:
        """How many of those that are alike the line stands for; ``""`` for a site by itself."""
        return f"{len(self.sites)} of {self.alike}" if len(self.sites) > 1 else ""


def each(sites: Iterable[Verdict]) -> list[Line]:
    """A line for every site."""
    return [Line(site.name, (site,), 1, why(site)) for site in sites]


def merged(sites: Sequence[Verdict]) -> list[Line]:
    """As few lines as say the same, in the order of the first site of each.

    Args:
        sites: those of a report.
    """
    by_name: dict[tuple[str, ...], int] = defaultdict(int)
    kinds: dict[tuple[tuple[str, ...], object], list[int]] = defaultdict(list)
    for index, site in enumerate(sites):
        pattern, _ = _parts(site.name)
        by_name[pattern] += 1
        words = _PLURAL.sub(r"\1", _NUMBER.sub("#", why(site)))
        kinds[pattern, (site.location, site.lowering, site.reason, words)].append(index)
    lines: list[tuple[int, Line]] = []
    for (pattern, _), members in kinds.items():
        lines += [(group[0], _line(pattern, [sites[i] for i in group], by_name)) for group in _groups(sites, members)]
    return [line for _, line in sorted(lines, key=lambda placed: placed[0])]


def _line(pattern: tuple[str, ...], sites: Sequence[Verdict], by_name: Mapping[tuple[str, ...], int]) -> Line:
    if len({site.name for site in sites}) == 1:
        # One site, or one in several graphs.
        name = sites[0].name
    else:
        columns = list(zip(*(_parts(site.name)[1] for site in sites), strict=True))
        ranges = iter([_runs(set(column)) for column in columns])
        name = "".join(next(ranges) if part == "#" else part for part in pattern)
    return Line(name, tuple(sites), by_name[pattern], _common([why(site) for site in sites]))


def _parts(name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A name as what is between its indices (``"#"`` for each of them), and its indices."""
    pieces = re.split(r"([.:])", _CALL.sub(r"\1", name))
    pattern = tuple("#" if piece.isdecimal() else piece for piece in pieces)
    return pattern, tuple(int(piece) for piece in pieces if piece.isdecimal())


def _groups(sites: Sequence[Verdict], members: Sequence[int]) -> list[list[int]]:
    """Cut sites of one kind into groups whose indices are all the combinations of some at each place.

    ``stages.0.blocks.0-1`` and ``stages.1.blocks.0-5`` are two: ``stages.0-1.blocks.0-5`` would say more.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index in members:
        groups[_parts(sites[index].name)[1]].append(index)
    boxes: dict[tuple[frozenset[int], ...], list[int]] = {
        tuple(frozenset([i]) for i in indices): found for indices, found in groups.items()
    }
    for place in reversed(range(len(next(iter(groups))))):
        joined: dict[tuple[object, ...], list[tuple[tuple[frozenset[int], ...], list[int]]]] = defaultdict(list)
        for box, found in boxes.items():
            joined[box[:place], box[place + 1 :]].append((box, found))
        boxes = {
            (*parts[0][0][:place], frozenset().union(*(box[place] for box, _ in parts)), *parts[0][0][place + 1 :]): [
                i for _, found in parts for i in found
            ]
            for parts in joined.values()
        }
    return [sorted(found) for found in boxes.values()]


def _runs(indices: set[int]) -> str:
    """Indices in words: ``"0-2,4-11"``; ``"0-22"`` where they have many gaps."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    if len(runs) > RUNS:
        runs = [[runs[0][0], runs[-1][1]]]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _common(words: Sequence[str]) -> str:
    """What words of one kind say together: a range where a number differs, in a path as ``0-11``, else ``2 to 50``."""
    if len(set(words)) == 1:
        return words[0]
    columns = list(zip(*([int(number) for number in _NUMBER.findall(each)] for each in words), strict=True))
    pieces = _NUMBER.split(max(words, key=len))  # in the plural, if there is one
    said = [pieces[0]]
    for column, before, after in zip(columns, pieces[:-1], pieces[1:], strict=True):
        in_a_path = before.endswith((".", "[")) or after.startswith(".")
        first, last = min(column), max(column)
        spread = _runs(set(column)) if in_a_path else f"{first} to {last}"
        said += [str(first) if first == last else spread, after]
    return "".join(said)
