"""The reports of everything that was compiled for one model: a list that prints as one table."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from typing import Any

from lncompile.reporting import html as report_html
from lncompile.reporting import table as report_table
from lncompile.reporting.report import FoldReport, merge


class Reports(list[FoldReport]):
    """The reports of a model's compiled graphs: a list of :class:`FoldReport`, printed as one.

    ``print`` shows the table of all graphs together, a notebook the same as HTML. Where the list is empty, they say
    why.

    Args:
        reports: one for each compiled graph.
        nothing: what to say where there are none.
        norms_outside: names of the model's LayerNorm modules that are in none of the graphs.

    Example:
        >>> print(lncompile.reports(compiled))
        >>> sum(report.folded for report in lncompile.reports(compiled))
        25
    """

    def __init__(
        self, reports: Iterable[FoldReport] = (), nothing: str = "", norms_outside: tuple[str, ...] = ()
    ) -> None:
        super().__init__(reports)
        self.nothing = nothing or "There are no reports."
        self.norms_outside = norms_outside

    def merged(self) -> FoldReport:
        """One report for all graphs. A weight that several of them share counts once."""
        return dataclasses.replace(merge(self), norms_outside=self.norms_outside)

    def to_dict(self) -> dict[str, Any]:
        """Return the merged report as plain dicts, lists, strings and numbers, see :meth:`FoldReport.to_dict`."""
        return self.merged().to_dict()

    def table(self, width: int | None = None, full: bool = False) -> str:
        """Return them as text, see :meth:`FoldReport.table`."""
        width = report_table.terminal_width() if width is None else width
        if not self:
            return "\n".join(textwrap.wrap(self.nothing, width))
        return self.merged().table(width, full)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return self.table()

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        """How rich prints them, in the console's width."""
        if not self:
            return [self.nothing]
        return report_table.lines(self.merged(), options.max_width, full=False)

    def _repr_html_(self) -> str:
        """How a notebook shows them."""
        return self.merged()._repr_html_() if self else report_html.paragraph(self.nothing)
