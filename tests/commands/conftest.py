"""What the tests of commands need in processes of their own."""

from __future__ import annotations

import pytest
from places import ROOT


@pytest.fixture(autouse=True)
def helpers_for_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that a command starts imports the test's file, for its models, and with it what the file imports."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
