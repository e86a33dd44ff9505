"""The work of ``lncompile bench``."""

from __future__ import annotations

from lncompile.cli.running import Run, place_of
from lncompile.cli.sameness import SAME_CODE, changes_nothing
from lncompile.comparisons.latency import compare_in_processes
from lncompile.comparisons.machine import describe_machine
from lncompile.reporting.words import folded_before


def run_bench(run: Run, seconds: float, processes: int) -> None:
    """Measure latency.

    Args:
        run: the run.
        seconds: how long.
        processes: how many processes measure.
    """
    machine_before = describe_machine(run.device or "cpu")
    loaded = run.load()
    machine = {**describe_machine(place_of(loaded)), "load_average": machine_before["load_average"]}
    same, report = changes_nothing(run, loaded)
    if same:
        sentence = f"{report.summary()} {SAME_CODE}" if report.total else f"The model has no LayerNorm. {SAME_CODE}"
        found = {"machine": machine, "measured": False, "sentence": sentence, "explain": report.to_dict()}
        run.show(loaded, found, sentence)
        return
    run.free_weights()
    with run.steps.step(f"Latency: {processes} processes, {seconds:g} s of calls") as say:
        latency = compare_in_processes(
            loaded.name,
            run.loading_by_name(),
            mode=run.asked.mode,
            options=run.options,
            seconds=seconds,
            processes=processes,
            machine=machine,
            progress=say,
        )
    sentence = f"{report.folded} of {report.total} LayerNorms folded{folded_before(report)}; {latency.sentence()}."
    found = {
        "machine": machine,
        "measured": True,
        **latency.to_dict(),
        "sentence": sentence,
        "explain": report.to_dict(),
    }
    run.show(loaded, found, latency, sentence)
