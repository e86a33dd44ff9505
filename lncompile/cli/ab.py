"""The work of ``lncompile ab``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table

from lncompile.abtest import ABTest
from lncompile.abtest.extras import require
from lncompile.abtest.simulation import send_requests
from lncompile.cli.parameters import InputError
from lncompile.cli.running import Run, place_of
from lncompile.cli.sameness import SAME_CODE, changes_nothing
from lncompile.comparisons.machine import describe_machine
from lncompile.options import arms


def run_ab(
    run: Run, lengths: Sequence[int], seconds: float, shadow: float, minimum_effect: float, plot: Path | None
) -> bool:
    """Answer simulated requests by both arms.

    Args:
        run: the run.
        lengths: tokens of the kinds of requests; none where nothing was asked for.
        seconds: how long at most.
        shadow: share of requests whose answers are compared.
        minimum_effect: relative difference in latency that matters.
        plot: where a picture is written, if it is wanted.

    Returns:
        Whether lnfold is a regression.
    """
    if plot is not None:
        try:
            require("matplotlib", "plot", "--plot")
        except ImportError as error:
            raise InputError(str(error)) from error
    loaded = run.load(lengths[0] if lengths else None)
    requests = [(loaded.arguments, loaded.inputs), *(run.request(loaded, length) for length in lengths[1:])]
    place = place_of(loaded)
    same, report = changes_nothing(run, loaded)
    if same:
        sentence = f"{report.summary()} {SAME_CODE}" if report.total else f"The model has no LayerNorm. {SAME_CODE}"
        found = {"machine": describe_machine(place), "measured": False, "regression": False, "sentence": sentence}
        run.show(loaded, {**found, "explain": report.to_dict()}, sentence)
        return False
    test = ABTest(
        loaded.model,
        **arms(run.asked.mode, run.options)["lnfold"],
        shadow=shadow,
        minimum_effect=minimum_effect,
        seed=run.asked.seed or 0,
        device=place,
    )
    with run.steps.step(f"Requests to both arms, at most {seconds:g} s") as say, torch.no_grad():
        send_requests(test, requests, seconds=seconds, seed=run.asked.seed or 0, progress=say)
    verdict = test.verdict()
    found = {
        "machine": describe_machine(place),
        "measured": True,
        "regression": verdict.regression,
        "ab": test.to_dict(),
    }
    run.show(loaded, found, _arms_table(test), str(verdict))
    if plot is not None:
        test.plot(plot)
        run.note(f"drawn in {plot}")
    return verdict.regression


def _arms_table(test: ABTest) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("arm", "requests", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(header)
    for arm in test.to_dict()["arms"]:
        quantiles = [arm["seconds"][name] for name in ("p50", "p90", "p99")]
        milliseconds = ["" if value is None else f"{1e3 * value:.3f}" for value in quantiles]
        table.add_row(arm["name"], str(arm["seconds"]["requests"]), *milliseconds)
    return table
