"""The work of ``lncompile MODEL``: one answer, from what the other commands find."""

from __future__ import annotations

import dataclasses

import torch

from lncompile.cli.running import Run, place_of
from lncompile.comparisons.answer import Answer
from lncompile.comparisons.latency import compare_in_processes
from lncompile.comparisons.machine import describe_machine
from lncompile.explanation import explain
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
    machine_before = describe_machine(run.device or "cpu")
    loaded = run.load()
    machine = {**describe_machine(place_of(loaded)), "load_average": machine_before["load_average"]}
    weight_bytes = sum(parameter.nbytes for parameter in loaded.model.parameters())
    with run.steps.step("Which LayerNorms fold") as say, torch.no_grad():
        say("capturing the graph")
        report = explain(run.compile(loaded), *loaded.arguments, **loaded.inputs)
    answer = Answer(
        loaded.name, loaded.description, machine, weight_bytes, report, mode=run.asked.mode, options=run.options
    )
    if report.folded:
        with run.steps.step("Whether predictions stay the same") as say:
            verification = verify(run.compile(loaded), *loaded.arguments, progress=say, **loaded.inputs)
        answer = dataclasses.replace(answer, verification=verification)
    if report.folded and answer.stays_exact:
        run.free_weights()
        with run.steps.step(f"Latency: {processes} processes, {seconds:g} s of calls") as say:
            latency = compare_in_processes(
                loaded.name,
                run.loading_by_name(),
                mode=run.asked.mode,
                options=run.options,
                limit=True,
                seconds=seconds,
                processes=processes,
                machine=machine,
                progress=say,
            )
        answer = dataclasses.replace(answer, latency=latency)
    run.show(loaded, answer.to_dict(), answer)
    return answer
