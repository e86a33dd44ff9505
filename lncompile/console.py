"""Consoles that print what they are given: a name such as ``models:ok`` holds neither an emoji nor markup."""

from __future__ import annotations

from typing import IO, Any

from rich.console import Console


def plain_console(file: IO[str] | None = None, **settings: Any) -> Console:
    """Return a console that reads nothing into strings: no markup, no emoji, no highlighting of numbers.

    Args:
        file: what it prints to; standard output by default.
        settings: of :class:`rich.console.Console`, such as ``width`` or ``stderr``.

    Example:
        >>> plain_console().print("factory:ok: [bold]")
        factory:ok: [bold]
    """
    return Console(file=file, markup=False, emoji=False, highlight=False, **settings)
