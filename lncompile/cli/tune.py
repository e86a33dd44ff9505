"""The work of ``lncompile tune``."""

from __future__ import annotations

from pathlib import Path

from lncompile.cli.racing import race
from lncompile.cli.running import Run
from lncompile.reporting.selection import in_words, to_dict


def run_tune(run: Run, output: Path | None) -> None:
    """Race the ways to compile a model, and keep the results.

    Args:
        run: the run.
        output: a file to write them into as well, if it is wanted.
    """
    from lncompile.selection import kept

    loaded = run.load()
    reports, made = race(run, loaded, anew=True)
    selections = [selection for report in reports for selection in report.selections]
    run.note(f"results are kept in {kept.folder()}")
    if output is not None:
        kept.write_file(output, made)
        run.note(f"written to {output}; options={{'lnfold.selection_file': '{output}'}} reads it")
    lines = [line for selection in selections for line in in_words(selection)]
    lines = lines or ["Nothing was compiled, so nothing was raced."]
    found = {
        "selections": [to_dict(selection) for selection in selections],
        "kept": {"folder": str(kept.folder()), "output": None if output is None else str(output), "races": len(made)},
        "reports": [report.to_dict() for report in reports],
    }
    run.show(loaded, found, *lines)
