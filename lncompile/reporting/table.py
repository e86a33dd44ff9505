"""A report as text, in whatever width there is.

Three layouts, the first that fits. All in columns::

    site              at                    lowered to            why
    h.0-11.ln_1       modeling_gpt2.py:276  rms_norm    12 of 12  centered in 2 to 46 parameters

Where too little is left for the last column, what does not fit in it stands below, and where that does not fit either,
the name has a line of its own. No line is longer than the width and no word is left out.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from lncompile.reporting import lines as report_lines
from lncompile.reporting import words as report_words
from lncompile.reporting.lines import Line

if TYPE_CHECKING:
    from lncompile.reporting.report import FoldReport

#: Where there is no terminal, and what the last column needs so that words are wrapped in it.
DEFAULT_WIDTH, ROOM_FOR_WORDS = 80, 44
_GAP, _INDENT = "  ", "    "


def terminal_width() -> int:
    """Columns of the terminal; without one what ``COLUMNS`` says, or 80."""
    return shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns


def text(report: FoldReport, width: int, full: bool) -> str:
    """A report as text.

    Args:
        report: the report.
        width: columns of the text.
        full: whether every site has a line of its own.
    """
    return "\n".join(line.plain for line in lines(report, width, full))


def lines(report: FoldReport, width: int, full: bool) -> Iterator[Text]:
    """The lines of a report, each at most as long as the width, with colours for rich."""
    width = max(width, 20)
    headline = report_words.headline(report)
    if headline:
        yield from _wrapped(headline, width, style="bold yellow")
    if report.sites:
        sites = report_lines.each(report.sites) if full else report_lines.merged(report.sites)
        yield from _table(("site", "at", "lowered to", "", "why"), [_row(line) for line in sites], width)
        yield from _wrapped(report_words.summary(report), width, style="bold")
    else:
        yield from _wrapped(report_words.nothing_to_fold(report), width)
    if report.differences:
        header = ("difference from a mean", "at", "", "", "why")
        rows = [
            _Row((found.name, found.location, "", ""), f"{found.reason.value}: {found.detail}", "yellow")
            for found in report.differences
        ]
        yield from _table(header, rows, width)
    remedies = report_words.remedies(report)
    if remedies:
        yield from _wrapped("To let more fold:", width)
        for remedy in remedies:
            yield from _wrapped(remedy, width, first=_GAP, rest=_INDENT)
    for note in report_words.notes(report):
        yield from _wrapped(note, width, rest=_INDENT)


class _Row:
    """Cells that are not wrapped, words that are, and a colour for the verdict."""

    def __init__(self, cells: Sequence[str], words: str, style: str = "") -> None:
        self.cells, self.words, self.style = tuple(cells), words, style


def _row(line: Line) -> _Row:
    cells = (line.name, line.location, line.lowering, line.count)
    return _Row(cells, line.why, "green" if line.folded else "yellow")


def _table(header: Sequence[str], rows: Sequence[_Row], width: int) -> Iterator[Text]:
    *titles, last = header
    used = [column for column in range(len(titles)) if titles[column] or any(row.cells[column] for row in rows)]
    widths = {c: max(len(titles[c]), *(len(row.cells[c]) for row in rows)) for c in used}
    start = sum(widths.values()) + len(_GAP) * len(used)
    if start - len(_GAP) > width:
        # The name has a line of its own.
        names, rest = used[:1], used[1:]
        for row in rows:
            yield from _wrapped(row.cells[names[0]], width)
            below = _GAP.join(_padded(row, rest, widths)).rstrip()
            yield from _styled(below, width, row, _GAP)
            yield from _wrapped(row.words, width, first=_INDENT, rest=_INDENT)
        return
    room = width - start

    def has_room(words: str) -> bool:
        return bool(words) and (room >= ROOM_FOR_WORDS or len(words) <= room)

    title = _Row(titles, last if any(has_room(row.words) for row in rows) else "")
    for row in (title, *rows):
        cells = _GAP.join(_padded(row, used, widths))
        words = row.words
        if has_room(words):
            first, *more = _broken(words, room)
            yield _coloured(f"{cells}{_GAP}{first}", row)
            yield from (Text(" " * start + line) for line in more)
        else:
            yield _coloured(cells.rstrip(), row)
            yield from _wrapped(words, width, first=_INDENT, rest=_INDENT)


def _padded(row: _Row, columns: Sequence[int], widths: dict[int, int]) -> list[str]:
    return [row.cells[column].ljust(widths[column]) for column in columns]


def _styled(words: str, width: int, row: _Row, indent: str) -> Iterator[Text]:
    for line in _broken(words, width - len(indent)) if words else ():
        yield _coloured(indent + line, row)


def _coloured(line: str, row: _Row) -> Text:
    found = Text(line)
    if row.style and len(row.cells) > 2 and row.cells[2]:
        found.highlight_words([row.cells[2]], row.style)
    return found


def _wrapped(words: str, width: int, first: str = "", rest: str = "", style: str = "") -> Iterator[Text]:
    if not words:
        return
    broken = _broken(words, width - max(len(first), len(rest)))
    for index, line in enumerate(broken):
        yield Text((rest if index else first) + line, style=style)


def _broken(words: str, width: int) -> list[str]:
    """Words in lines; a word that is longer than a line is cut."""
    return textwrap.wrap(words, width, break_on_hyphens=False) or [""]
