"""The work of ``lncompile explain``."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lncompile.cli.parameters import InputError
from lncompile.cli.running import Run
from lncompile.graph_observers import watched_by
from lncompile.reporting.graphs import GraphDirectory


def run_explain(run: Run, html: Path | None, graphs: Path | None) -> None:
    """Say which LayerNorms fold.

    Args:
        run: the run.
        html: where the picture is written, if it is wanted.
        graphs: the folder that the graphs are written into, after each pass, if they are wanted.
    """
    watched = contextlib.nullcontext() if graphs is None else watched_by(_directory(graphs))
    loaded = run.load()
    with watched:
        report = run.explain(loaded)
    if graphs is not None:
        run.note(f"graphs after each pass in {graphs}; {graphs / 'index.txt'} says which pass changed what")
    if html is not None:
        html.write_text(report.to_html(loaded.name, loaded.description), encoding="utf-8")
        run.note(f"drawn in {html}")
    run.show(loaded, {"explain": report.to_dict()}, report)


def _directory(graphs: Path) -> GraphDirectory:
    try:
        return GraphDirectory(graphs)
    except ValueError as error:
        raise InputError(f"{error} (--graphs)") from error
    except OSError as error:
        raise InputError(f"'{graphs}' cannot be written (--graphs): {error.strerror}") from error
