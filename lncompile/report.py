"""The fold report: what became of every LayerNorm, for people (``print``) and for programs (``to_dict``)."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lncompile.passes.decisions import REMEDIES, RuntimeCentering, Site, WeightRewrite


@dataclass(frozen=True)
class FoldReport:
    """What the backend decided for one compiled graph, or for all graphs of a model.

    Attributes:
        sites: every LayerNorm call, in order; see :class:`Site`.
        weights: the parameters that are centered, with the bytes of the centered copy.
        centerings: activations that are centered at each call, and why that pays.
        graphs: how many graphs it speaks of (graph breaks make several).
        seconds: time our passes took, Inductor's not counted.

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
        """Bytes of all centered copies beside the model; what is centered in the graph is memory of the step alone."""
        return sum(weight.bytes for weight in self.weights if weight.storage == "copy")

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, strings and numbers, ready for JSON."""
        data = dataclasses.asdict(self)
        for site, verdict in zip(data["sites"], self.sites, strict=True):
            site["reason"] = verdict.reason.value if verdict.reason is not None else None
            site["remedy"] = verdict.remedy
        return {"total": self.total, "folded": self.folded, "extra_bytes": self.extra_bytes, **data}

    def __str__(self) -> str:
        buffer = io.StringIO()
        console = Console(file=buffer, width=160)
        console.print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it; ``print(report)`` gives the same without colours."""
        if not self.sites:
            yield Text("No LayerNorm in the graph: it goes to Inductor as it is.")
            return
        table = Table(box=None, pad_edge=False)
        for header in ("site", "at", "lowered to"):
            table.add_column(header, no_wrap=True)
        table.add_column("why", overflow="fold")
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
        for centering in self.centerings:
            yield Text(f"centered at run time after {centering.after} ({centering.location}): {centering.detail}")

    def summary(self) -> str:
        """One line: how many folded, what was centered, what it costs."""
        absorbed = sum(bool(site.affine_absorbed_by) for site in self.sites)
        kind = "centered or absorbing" if absorbed else "centered"
        words = f"{self.folded} of {self.total} LayerNorms folded into {len(self.weights)} {kind} weights"
        words += f" ({self.extra_bytes / 2**20:.1f} MiB beside the model"
        trained = sum(weight.storage == "graph" for weight in self.weights)
        words += f", {trained} centered at every step)" if trained else ")"
        words += f"; γ and β of {absorbed} absorbed" if absorbed else ""
        left = Counter(site.reason.value for site in self.sites if site.reason is not None)
        if left:
            words += "; left: " + ", ".join(f"{count} {reason}" for reason, count in left.most_common())
        return words + "."


def merge(reports: Iterable[FoldReport]) -> FoldReport:
    """Put the reports of several graphs together; a weight that several graphs share counts once."""
    listed = list(reports)
    weights = dict.fromkeys(weight for report in listed for weight in report.weights)
    return FoldReport(
        tuple(site for report in listed for site in report.sites),
        tuple(weights),
        tuple(centering for report in listed for centering in report.centerings),
        sum(report.graphs for report in listed),
        sum(report.seconds for report in listed),
    )
