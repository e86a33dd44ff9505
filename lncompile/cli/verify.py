"""The work of ``lncompile verify``."""

from __future__ import annotations

from lncompile.cli.running import Run, place_of
from lncompile.comparisons.machine import describe_machine
from lncompile.verification import verify


def run_verify(run: Run) -> bool:
    """Measure errors against float64.

    Args:
        run: the run.

    Returns:
        Whether predictions stay the same.
    """
    loaded = run.load()
    with run.steps.step("Errors against float64") as say:
        verification = verify(run.compile(loaded), *loaded.arguments, progress=say, **loaded.inputs)
    found = {
        "machine": describe_machine(place_of(loaded)),
        "passed": verification.passed,
        "sentence": verification.sentence(),
        "verify": verification.to_dict(),
    }
    run.show(loaded, found, verification, verification.sentence())
    return verification.passed
