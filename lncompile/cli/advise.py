"""The work of ``lncompile MODEL``: one answer, from what the other commands find."""

from __future__ import annotations

import dataclasses

from lncompile.cli.racing import race
from lncompile.cli.running import Run
from lncompile.comparisons.answer import Answer
from lncompile.reporting.selection import Selection, options_of_choice
from lncompile.verification import verify


def run_advise(run: Run, seconds: float, processes: int) -> Answer:
    """Find out whether lnfold is worth while for a model on this machine.

    Args:
        run: the run.
        seconds: how long to measure.
        processes: how many processes measure.

    Returns:
        The answer, which was shown.
    """
    loaded, machine = run.load_on_described_machine()
    weight_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    report = run.explain(loaded)
    selections: tuple[Selection, ...] = ()
    if report.folded and run.options.get("lnfold.select") != "model":
        reports, _ = race(run, loaded, anew=False)
        selections = tuple(selection for raced in reports for selection in raced.selections if selection.is_race)
        run.options = {**run.options, **(options_of_choice(selections) or {})}
    answer = Answer(
        loaded.name,
        loaded.description,
        machine,
        weight_bytes,
        report,
        mode=run.asked.mode,
        options=run.options,
        selections=selections,
    )
    if report.folded:
        with run.steps.step("Whether predictions stay the same") as say:
            verification = verify(run.compile(loaded), *loaded.arguments, progress=say, **loaded.inputs)
        answer = dataclasses.replace(answer, verification=verification)
    if report.folded and answer.stays_exact:
        latency = run.measure(loaded, machine, seconds, processes, limit=True)
        answer = dataclasses.replace(answer, latency=latency)
    run.show(loaded, answer.to_dict(), answer)
    return answer
