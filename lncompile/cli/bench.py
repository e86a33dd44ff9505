"""The work of ``lncompile bench``."""

from __future__ import annotations

from lncompile.cli.running import Run, place_of
from lncompile.explanation import reports
from lncompile.latency import compare_latency
from lncompile.machine import describe_machine
from lncompile.report import FoldReport, merge


def run_bench(run: Run, seconds: float) -> None:
    """Measure latency.

    Args:
        run: the run.
        seconds: how long.
    """
    machine_before = describe_machine(run.device or "cpu")
    loaded = run.load()
    compiled = run.compile(loaded)
    place = place_of(loaded)
    machine = {**describe_machine(place), "load_average": machine_before["load_average"]}
    with run.steps.step(f"Latency: interleaved calls, {seconds:g} s") as say:
        latency = compare_latency(
            compiled, loaded.arguments, loaded.inputs, seconds=seconds, device=place, machine=machine, progress=say
        )
    report = merge(reports(compiled))
    sentence = f"{_folded(report)}; {latency.sentence()}."
    found = {"machine": machine, **latency.to_dict(), "sentence": sentence, "explain": report.to_dict()}
    run.show(loaded, found, latency, sentence)


def _folded(report: FoldReport) -> str:
    if not report.total:
        return "the model has no LayerNorm, so lnfold compiles it exactly as stock torch.compile does"
    return f"{report.folded} of {report.total} LayerNorms folded"
