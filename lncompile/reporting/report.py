"""The fold report: what became of every LayerNorm, for people (``print``) and for programs (``to_dict``).

The data stand here. The sentences are in :mod:`lncompile.reporting.words`, lines that stand for many sites in
:mod:`lncompile.reporting.lines`, the table in :mod:`lncompile.reporting.table`, that of a notebook in
:mod:`lncompile.reporting.html`. They are imported when a report is shown: a process that loads compiled
code has a report, and does not wait for what prints it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lncompile.passes.decisions import (
    GraphBreak,
    MemoryBudget,
    PassTime,
    Reason,
    RuntimeCentering,
    Stream,
    UnrecognisedDifference,
    Verdict,
    WeightRewrite,
)
from lncompile.reporting.selection import Selection


@dataclass(frozen=True)
class FoldReport:
    """What the backend decided for one compiled graph, or for all graphs of a model.

    ``print`` shows it as a table, in the terminal's width (80 columns where there is no terminal; ``COLUMNS`` says
    otherwise), a notebook as HTML.

    Attributes:
        sites: every LayerNorm call, in order; see :class:`Verdict`.
        weights: the parameters that are centered, where the centered weights are and what they take.
        centerings: activations that are centered at each call, and why that pays.
        graphs: how many graphs it speaks of (graph breaks make several).
        seconds: time our passes took, Inductor's not counted.
        memory_budget: the limit on centered copies and what they would take without it, where one was set; of several
            graphs the sums.
        streams: what is added into each residual stream and which norms read it, for drawing; see :meth:`to_html`.
        differences: where a mean of features is subtracted and no LayerNorm is recognised, with why. They are not
            counted in ``total``: they may be anything.
        graph_breaks: where Dynamo ended a graph and began another, and why.
        norms_outside: names of the model's LayerNorm modules that are in no captured graph, where the model is known.
        rms_norms: RMSNorms, where there is no LayerNorm.
        folded_without_gradients: sites that would fold under ``torch.no_grad()``, where some stay only because
            gradients are recorded though the model is in evaluation mode; else None.
        passes: how long each of our passes took, in their order; of several graphs the sums.
        selections: how the way to compile each graph was chosen, where that was asked for (``lnfold.select``).

    Example:
        >>> report = lncompile.explain(model, input_ids)
        >>> report.folded, report.total
        (25, 25)
    """

    sites: tuple[Verdict, ...]
    weights: tuple[WeightRewrite, ...] = ()
    centerings: tuple[RuntimeCentering, ...] = ()
    graphs: int = 1
    seconds: float = 0.0
    memory_budget: MemoryBudget | None = None
    streams: tuple[Stream, ...] = ()
    differences: tuple[UnrecognisedDifference, ...] = ()
    graph_breaks: tuple[GraphBreak, ...] = ()
    norms_outside: tuple[str, ...] = ()
    rms_norms: int = 0
    folded_without_gradients: int | None = None
    passes: tuple[PassTime, ...] = ()
    selections: tuple[Selection, ...] = ()

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
        """Return the report as plain dicts, lists, strings and numbers, ready for JSON. It has every site by itself."""
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
        from lncompile.reporting.picture import draw  # it draws reports

        return draw(self, title, description)

    def table(self, width: int | None = None, full: bool = False) -> str:
        """Return the report as text.

        Args:
            width: columns of it; by default those of the terminal, or 80 (or ``COLUMNS``) where there is none.
            full: whether every site has a line of its own. Else sites whose names differ in an index, with the same
                verdict at the same line of the source, share one: ``h.0-11.ln_1  12 of 12``.

        Example:
            >>> print(lncompile.explain(model, input_ids).table(full=True))
        """
        from lncompile.reporting import table as report_table

        return report_table.text(self, report_table.terminal_width() if width is None else width, full)

    def headline(self) -> str:
        """What to know before anything else, in a sentence; ``""`` for most reports.

        That gradients keep norms from folding, or that the model has norms of a kind that cannot fold.
        """
        from lncompile.reporting import words as report_words

        return report_words.headline(self)

    def summary(self) -> str:
        """One line: how many folded, what was centered, what it costs."""
        from lncompile.reporting import words as report_words

        return report_words.summary(self)

    def nothing_to_fold(self) -> str:
        """One line, for a report without LayerNorms."""
        from lncompile.reporting import words as report_words

        return report_words.nothing_to_fold(self)

    def __str__(self) -> str:
        return self.table()

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        """How rich prints it, in the console's width; ``print(report)`` gives the same without colours."""
        from lncompile.reporting import table as report_table

        return report_table.lines(self, options.max_width, full=False)

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        from lncompile.reporting import html as report_html

        return report_html.table(self)


def unfolded(report: FoldReport, reason: Reason, detail: str) -> FoldReport:
    """Return the report of a graph that was to be folded, and runs as stock torch.compile compiles it.

    Args:
        report: what was decided.
        reason: why it stays, for each site that was to fold. Norms that were folded before are RMSNorms all the same.
        detail: the same in words.
    """
    sites = tuple(
        dataclasses.replace(
            site,
            folded=False,
            lowering="layer_norm",
            reason=reason,
            detail=detail,
            centered_by=(),
            centered_after=(),
            affine_absorbed_by=(),
            affine="",
            deferral="",
        )
        if site.folded and not site.folded_before
        else site
        for site in report.sites
    )
    return dataclasses.replace(report, sites=sites, weights=(), centerings=())


def merge(reports: Iterable[FoldReport]) -> FoldReport:
    """Put the reports of several graphs together; a weight that several graphs share counts once."""
    listed = list(reports)
    before = list(itertools.accumulate((report.total for report in listed), initial=0))
    weights = dict.fromkeys(weight for report in listed for weight in report.weights)
    budgets = [report.memory_budget for report in listed if report.memory_budget is not None]
    gains = [report.folded_without_gradients for report in listed]
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
        tuple(dict.fromkeys(found for report in listed for found in report.graph_breaks)),
        tuple(dict.fromkeys(name for report in listed for name in report.norms_outside)),
        sum(report.rms_norms for report in listed),
        None
        if all(gain is None for gain in gains)
        else sum(report.folded if gain is None else gain for report, gain in zip(listed, gains, strict=True)),
        _sums(report.passes for report in listed),
        tuple(selection for report in listed for selection in report.selections),
    )


def _sums(times: Iterable[Sequence[PassTime]]) -> tuple[PassTime, ...]:
    """How long each pass took on all graphs together."""
    seconds: dict[str, float] = {}
    for time in itertools.chain.from_iterable(times):
        seconds[time.name] = seconds.get(time.name, 0.0) + time.seconds
    return tuple(PassTime(name, sum_of_all) for name, sum_of_all in seconds.items())


def _moved(stream: Stream, first: int) -> Stream:
    """A stream of a report whose first site has become site ``first`` of another."""
    return Stream(
        tuple(part if part.site is None else dataclasses.replace(part, site=part.site + first) for part in stream.parts)
    )
