"""The work of ``lncompile bench``."""

from __future__ import annotations

from lncompile.cli.running import Run
from lncompile.cli.sameness import SAME_CODE, changes_nothing
from lncompile.reporting.words import folded_before


def run_bench(run: Run, seconds: float, processes: int) -> None:
    """Measure latency.

    Args:
        run: the run.
        seconds: how long.
        processes: how many processes measure.
    """
    loaded, machine = run.load_on_described_machine()
    same, report = changes_nothing(run, loaded)
    if same:
        sentence = f"{report.summary()} {SAME_CODE}" if report.total else f"The model has no LayerNorm. {SAME_CODE}"
        found = {"machine": machine, "measured": False, "sentence": sentence, "explain": report.to_dict()}
        run.show(loaded, found, sentence)
        return
    latency = run.measure(loaded, machine, seconds, processes)
    sentence = f"{report.folded} of {report.total} LayerNorms folded{folded_before(report)}; {latency.sentence()}."
    found = {
        "machine": machine,
        "measured": True,
        **latency.to_dict(),
        "sentence": sentence,
        "explain": report.to_dict(),
    }
    run.show(loaded, found, latency, sentence)
