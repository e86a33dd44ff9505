"""The fold report: what became of every LayerNorm, for people (``print``) and for programs (``to_dict``)."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lncompile.passes.budget import amount
from lncompile.passes.decisions import (
    REMEDIES,
    MemoryBudget,
    RuntimeCentering,
    Site,
    Stream,
    UnrecognisedDifference,
    WeightRewrite,
)


@dataclass(frozen=True)
class FoldReport:
    """What the backend decided for one compiled graph, or for all graphs of a model.

    Attributes:
        sites: every LayerNorm call, in order; see :class:`Site`.
        weights: the parameters that are centered, where the centered weights are and what they take.
        centerings: activations that are centered at each call, and why that pays.
        graphs: how many graphs it speaks of (graph breaks make several).
        seconds: time our passes took, Inductor's not counted.
        memory_budget: the limit on centered copies and what they would take without it, where one was set; of several
            graphs the sums.
        streams: what is added into each residual stream and which norms read it, for drawing; see :meth:`to_html`.
        differences: where a mean of features is subtracted and no LayerNorm is recognised, with why. They are not
            counted in ``total``: they may be anything.

    Example:
        >>> report = lncompile.explain(model, input_ids)
        >>> report.folded, report.total
        (25, 25)
    """

    sites: tuple[Site, ...]
    weights: tuple[WeightRewrite, ...] = ()
    centerings: tuple[RuntimeCentering, ...] = ()
    graphs: int = 1
    seconds: float = 0.0
    memory_budget: MemoryBudget | None = None
    streams: tuple[Stream, ...] = ()
    differences: tuple[UnrecognisedDifference, ...] = ()

    @property
    def total(self) -> int:
        """Number of LayerNorm sites."""
        return len(self.sites)

    @property
    def folded(self) -> int:
        """Number of sites that became an RMSNorm."""
        return sum(site.folded for site in self.sites)

    @property
    def extra_bytes(self) -> int:
        """Bytes kept beside the model: copies, and means of weights in place; what the graph centers is of the step."""
        return sum(weight.bytes for weight in self.weights if weight.storage != "graph")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers, ready for JSON."""
        data = dataclasses.asdict(self)
        for site, verdict in zip(data["sites"], self.sites, strict=True):
            site["reason"] = verdict.reason.value if verdict.reason is not None else None
            site["remedy"] = verdict.remedy
        for entry, difference in zip(data["differences"], self.differences, strict=True):
            entry["reason"], entry["remedy"] = difference.reason.value, difference.remedy
        return {"total": self.total, "folded": self.folded, "extra_bytes": self.extra_bytes, **data}

    def to_html(self, title: str = "", description: str = "") -> str:
        """Return the picture: one page that needs nothing else, with the streams drawn and every norm explained.

        Args:
            title: the model's name.
            description: a line about it.

        Example:
            >>> pathlib.Path("out.html").write_text(lncompile.explain(model, input_ids).to_html("my model"))
        """
        from lncompile.picture import draw  # it draws reports

        return draw(self, title, description)

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=160)
        console.print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it; ``print(report)`` gives the same without colours."""
        yield from self._sites_in_words() if self.sites else [Text(self.nothing_to_fold())]
        if self.differences:
            table = _table("difference from a mean", "at")
            for difference in self.differences:
                why = Text(f"{difference.reason.value}: {difference.detail}")
                table.add_row(Text(difference.name), Text(difference.location), why)
            yield table
            for reason in dict.fromkeys(difference.reason for difference in self.differences):
                yield Text(f"{reason.value} would be a LayerNorm with {REMEDIES[reason]}")

    def nothing_to_fold(self) -> str:
        """One line, for a report without LayerNorms."""
        if not self.differences:
            return "No LayerNorm in the graph: it goes to Inductor as it is."
        count = len(self.differences)
        taken = "1 difference from a mean is" if count == 1 else f"{count} differences from a mean are"
        return f"No LayerNorm is recognised in the graph, which goes to Inductor as it is; {taken} taken in it:"

    def _sites_in_words(self) -> Iterable[Any]:
        table = _table("site", "at", "lowered to")
        for site in self.sites:
            reason = "" if site.reason is None else f"{site.reason.value}: "
            style = "green" if site.folded else "yellow"
            more = [site.affine] if site.affine_absorbed_by else []
            more += [site.deferral] if site.deferral else []
            why = Text("; ".join([f"{reason}{site.detail}", *more]))
            table.add_row(Text(site.name), Text(site.location), Text(site.lowering, style=style), why)
        yield table
        yield Text(self.summary(), style="bold")
        for left in dict.fromkeys(site.reason for site in self.sites if site.reason is not None):
            yield Text(f"{left.value} would fold with {REMEDIES[left]}")
        details: dict[str, list[str]] = {}
        for weight in self.weights:
            if weight.detail:
                details.setdefault(weight.detail, []).append(weight.name)
        for detail, names in details.items():
            others = f" and {len(names) - 3} more" if len(names) > 3 else ""
            yield Text(f"a copy, not in place: {', '.join(names[:3])}{others}: {detail}")
        for centering in self.centerings:
            yield Text(f"centered at run time after {centering.after} ({centering.location}): {centering.detail}")

    def summary(self) -> str:
        """One line: how many folded, what was centered, what it costs."""
        absorbed = sum(bool(site.affine_absorbed_by) for site in self.sites)
        kind = "centered or absorbing" if absorbed else "centered"
        words = f"{self.folded} of {self.total} LayerNorms folded into {len(self.weights)} {kind} weights"
        words += f" ({self.extra_bytes / 2**20:.1f} MiB beside the model"
        counted = Counter(weight.storage for weight in self.weights)
        for storage, what in (
            ("inplace", "in place"),
            ("centered", "centered before"),
            ("graph", "centered at every step"),
        ):
            words += f", {counted[storage]} {what}" if counted[storage] else ""
        words += ")"
        words += f"; γ and β of {absorbed} absorbed" if absorbed else ""
        budget = self.memory_budget
        if budget is not None and budget.binds:
            words += f", within a memory budget of {amount(budget.limit)} (without: {amount(budget.wanted)})"
        left = Counter(site.reason.value for site in self.sites if site.reason is not None)
        if left:
            words += "; left: " + ", ".join(f"{count} {reason}" for reason, count in left.most_common())
        return words + "."


def _table(*headers: str) -> Table:
    """A table with these columns and one that says why."""
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, no_wrap=True)
    table.add_column("why", overflow="fold")
    return table


def merge(reports: Iterable[FoldReport]) -> FoldReport:
    """Put the reports of several graphs together; a weight that several graphs share counts once."""
    listed = list(reports)
    before = list(itertools.accumulate((report.total for report in listed), initial=0))
    weights = dict.fromkeys(weight for report in listed for weight in report.weights)
    budgets = [report.memory_budget for report in listed if report.memory_budget is not None]
    return FoldReport(
        tuple(site for report in listed for site in report.sites),
        tuple(weights),
        tuple(centering for report in listed for centering in report.centerings),
        sum(report.graphs for report in listed),
        sum(report.seconds for report in listed),
        MemoryBudget(
            sum(budget.limit for budget in budgets),
            sum(budget.wanted for budget in budgets),
            any(budget.binds for budget in budgets),
        )
        if budgets
        else None,
        tuple(
            _moved(stream, first) for report, first in zip(listed, before, strict=False) for stream in report.streams
        ),
        tuple(difference for report in listed for difference in report.differences),
    )


def _moved(stream: Stream, first: int) -> Stream:
    """A stream of a report whose first site has become site ``first`` of another."""
    return Stream(
        tuple(part if part.site is None else dataclasses.replace(part, site=part.site + first) for part in stream.parts)
    )
