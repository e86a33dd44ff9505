"""The race of the ways to compile a model, as a step of ``lncompile tune`` and of ``lncompile MODEL``."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from lncompile.cli.running import Run

if TYPE_CHECKING:
    from lncompile.models.loading import LoadedModel
    from lncompile.reporting.report import FoldReport
    from lncompile.reporting.selection import Selection


def race(run: Run, loaded: LoadedModel, *, anew: bool) -> tuple[list[FoldReport], dict[str, Selection]]:
    """Compile a model in every way that the run's options leave open, time them, and keep what was found.

    Args:
        run: the run.
        loaded: the model.
        anew: whether graphs are raced that were raced before.

    Returns:
        The reports of its graphs, which hold the results; and the results of the races that were run anew, by what each
        depends on.
    """
    import torch

    from lncompile.explanation import reports
    from lncompile.selection import kept

    made: dict[str, Selection] = {}
    with run.steps.step("The race") as say, torch.no_grad(), contextlib.ExitStack() as stack:
        say("compiling the model in several ways, and timing them")
        if anew:
            made = stack.enter_context(kept.raced_anew())
        compiled = run.compile(loaded, {**run.options, "lnfold.select": "measure"})
        compiled(*loaded.arguments, **loaded.inputs)
        return reports(compiled), made
