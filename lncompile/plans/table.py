"""A fold plan in words: what rich prints of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")
# How many parameters a norm's fold takes grows from layer to layer, and the table lists them.
_COUNT = re.compile(r"^centered in \d+ parameters?(; )?")
_BECOMES = {
    "rms_norm": "RMSNorm",
    "centered": "stays a LayerNorm, on a centered stream",
    "layer_norm": "stays a LayerNorm",
}


def lines(plan: FoldPlan) -> Iterable[Any]:
    """What rich prints of a plan, one renderable after the other."""
    yield Text(_sentence(plan), style="bold")
    if plan.center:
        rows = [(entry.name, f"{list(entry.shape)}", entry.in_words(), _tied(entry.also)) for entry in plan.center]
        yield Text()
        yield _table(("center", "shape", "along", ""), _alike(rows))
    if plan.lookups:
        yield Text()
        yield _table(
            ("embedding", "table", "", ""),
            [
                (
                    entry.path,
                    entry.table,
                    f"untied: {entry.bytes} bytes for a table of its own" if entry.untied else "centered at each call",
                    _tied(entry.tied),
                )
                for entry in plan.lookups
            ],
        )
    if plan.absorb:
        rows = [
            (
                entry.path,
                "γ and β" if entry.weight and entry.bias else "γ" if entry.weight else "β",
                "into " + ", ".join(layer.path for layer in entry.layers),
                _added([layer.path for layer in entry.layers if layer.adds_bias]),
            )
            for entry in plan.absorb
        ]
        yield Text()
        yield _table(("absorb", "", "", ""), _alike(rows))
    if plan.norms:
        yield Text()
        yield _table(
            ("norm", "", "why"),
            _alike([(norm.name, _BECOMES[norm.becomes], _COUNT.sub("", norm.detail)) for norm in plan.norms]),
        )
    if plan.kept:
        yield Text()
        yield _table(("stays as it is", "why"), _alike([(entry.name, entry.reason) for entry in plan.kept]))
    if plan.unreached:
        yield Text()
        yield _table(("no example call reads",), _alike([(name,) for name in plan.unreached]))


def _sentence(plan: FoldPlan) -> str:
    """The whole plan in a sentence."""
    replaced = sum(norm.becomes == "rms_norm" for norm in plan.norms)
    what = f"{plan.form.class_name.rpartition('.')[2]}: {plan.folded} of {plan.total} LayerNorms fold"
    if plan.is_empty:
        return f"{what}; nothing to change."
    return f"{what}, {replaced} of them to an RMSNorm; {len(plan.center)} parameters are centered."


def _tied(names: Sequence[str]) -> str:
    return f"tied: {', '.join(names)}" if names else ""


def _added(paths: Sequence[str]) -> str:
    return f"a bias is added to {', '.join(paths)}" if paths else ""


def _alike(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in the numbers of layers alone, as one: ``h.{0..11}.attn.c_proj.weight``."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        # What is said about a layer names the layer's own parts.
        groups[tuple(_NUMBER.sub("*", _in_words(cell)) for cell in row)].append(row[0])
    merged = []
    for pattern, names in groups.items():
        if len(names) == 1:
            merged.append(next(row for row in rows if row[0] == names[0] and _pattern(row) == pattern))
        else:
            merged.append((_merged(names), *pattern[1:]))
    return merged


def _pattern(row: Sequence[str]) -> tuple[str, ...]:
    return tuple(_NUMBER.sub("*", _in_words(cell)) for cell in row)


def _in_words(cell: str) -> str:
    """Node names of a graph carry a number that says nothing: ``layer_norm_12``."""
    return re.sub(r"\b([a-z_]+?)_\d+\b", r"\1", cell)


def _merged(names: Sequence[str]) -> str:
    """Names that differ in numbers as one: the numbers that are there, as ranges."""
    numbers = [[int(number) for number in _NUMBER.findall(name)] for name in names]
    result, position = names[0], 0
    for column in zip(*numbers, strict=False):
        present = sorted(set(column))
        run = present == list(range(present[0], present[-1] + 1))
        words = (
            f"{present[0]}"
            if len(present) == 1
            else f"{{{present[0]}..{present[-1]}}}"
            if run
            else f"{{{','.join(map(str, present))}}}"
        )
        match = _NUMBER.search(result, position)
        assert match is not None  # every name of the group has as many numbers
        result = result[: match.start()] + words + result[match.end() :]
        position = match.start() + len(words)
    return result


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table
