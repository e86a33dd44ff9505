"""A report in a notebook: a table, without a script and without anything fetched. Every text in it is escaped."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lncompile.reporting import lines as report_lines
from lncompile.reporting import words as report_words

if TYPE_CHECKING:
    from lncompile.reporting.report import FoldReport

_LEFT = ' style="text-align:left"'


def table(report: FoldReport) -> str:
    """A report as a piece of HTML, with the lines that ``print`` gives."""
    parts: list[str] = []
    headline = report_words.headline(report)
    if headline:
        parts.append(f"<p><strong>{html.escape(headline)}</strong></p>")
    if report.sites:
        rows = [
            (line.name, line.location, line.lowering, line.count or "1", line.why)
            for line in report_lines.merged(report.sites)
        ]
        parts.append(_rows(("site", "at", "lowered to", "count", "why"), rows))
        parts.append(f"<p><strong>{html.escape(report_words.summary(report))}</strong></p>")
    else:
        parts.append(paragraph(report_words.nothing_to_fold(report)))
    if report.differences:
        found = [(d.name, d.location, f"{d.reason.value}: {d.detail}") for d in report.differences]
        parts.append(_rows(("difference from a mean", "at", "why"), found))
    remedies = report_words.remedies(report)
    if remedies:
        parts.append(f"<p>To let more fold:</p>{_list(remedies)}")
    notes = list(report_words.notes(report))
    if notes:
        parts.append(_list(notes))
    return f"<div>{''.join(parts)}</div>"


def paragraph(words: str) -> str:
    """A sentence as HTML."""
    return f"<p>{html.escape(words)}</p>"


def _rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th{_LEFT}>{html.escape(title)}</th>" for title in header)
    body = "".join(f"<tr>{''.join(f'<td{_LEFT}>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"
