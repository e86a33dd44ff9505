"""benchmarks/gpu.py: a run of several steps that ends in time, whatever a step does."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import gpu
import pytest


def test_a_step_that_fails_or_takes_too_long_stops_no_other(tmp_path: Path) -> None:
    steps = (
        gpu.Step("good", 0.25, lambda output, dry: ["-c", "pass"]),
        gpu.Step("stuck", 0.25, lambda output, dry: ["-c", "import time; time.sleep(300)"]),
        gpu.Step("bad", 0.25, lambda output, dry: ["-c", "raise SystemExit(3)"]),
        gpu.Step("nothing to test", 0.25, lambda output, dry: ["-c", "raise SystemExit(5)"]),
    )
    found = gpu.run(steps, 12.0, tmp_path, dry=True)
    outcomes = [step["outcome"] for step in found["steps"]]
    assert outcomes == ["done", "stopped: it took longer than its share", "ended with exit code 3", "done"]
    assert json.loads((tmp_path / "gpu-run-dry-run.json").read_text()) == json.loads(json.dumps(found))


def test_what_a_stopped_step_has_started_is_stopped_too(tmp_path: Path) -> None:
    wrote = tmp_path / "wrote"
    inner = f"import time; time.sleep(3); open({str(wrote)!r}, 'w')"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    assert gpu.run_at_most(1.0, [sys.executable, "-c", outer]) is None
    time.sleep(3.5)
    assert not wrote.exists()


def test_shares_are_of_the_whole_and_dry_runs_leave_the_results_alone(tmp_path: Path) -> None:
    assert sum(step.share for step in gpu.STEPS) == pytest.approx(1)
    assert [step.name for step in gpu.STEPS][:2] == ["tests", "decoding"]
    for step in gpu.STEPS[1:]:
        command = step.command(tmp_path, True)
        assert str(tmp_path) in command
        assert Path(command[0]).is_file()
