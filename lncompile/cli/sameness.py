"""Whether there is anything to compare: where nothing folds, lnfold compiles as stock torch.compile does."""

from __future__ import annotations

from lncompile.cli.running import Run
from lncompile.models.loading import LoadedModel
from lncompile.options import arms, parse_options
from lncompile.reporting.report import FoldReport

SAME_CODE = (
    "lnfold compiles this model to the same code as stock torch.compile, so there is nothing to compare: a difference "
    "that was measured would be chance."
)


def changes_nothing(run: Run, loaded: LoadedModel) -> tuple[bool, FoldReport]:
    """Find out, as a step of its own.

    Args:
        run: the run.
        loaded: its model.

    Returns:
        Whether lnfold leaves the model's graphs as they are, and which LayerNorms fold.
    """
    report = run.explain(loaded)
    options, ours = parse_options(run.asked.mode, run.options)
    given = arms(run.asked.mode, run.options)["inductor"]
    _, stocks = parse_options(given.get("mode"), given.get("options"))
    # lnfold.matrix_vector="on" turns a tuning of Inductor's on, whatever folds.
    rewritten = (options.nonfoldable != "inductor" and report.total) or ours != stocks
    return not report.folded and not rewritten, report
