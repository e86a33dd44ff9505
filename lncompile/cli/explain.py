"""The work of ``lncompile explain``."""

from __future__ import annotations

from pathlib import Path

from lncompile.cli.running import Run


def run_explain(run: Run, html: Path | None) -> None:
    """Say which LayerNorms fold.

    Args:
        run: the run.
        html: where the picture is written, if it is wanted.
    """
    loaded = run.load()
    report = run.explain(loaded)
    if html is not None:
        html.write_text(report.to_html(loaded.name, loaded.description), encoding="utf-8")
        run.note(f"drawn in {html}")
    run.show(loaded, {"explain": report.to_dict()}, report)
