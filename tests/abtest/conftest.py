"""The clock of tests that simulate time."""

from __future__ import annotations

import pytest
from abtesting import SimulatedTime

from lncompile.abtest import timers


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> SimulatedTime:
    clock = SimulatedTime()
    monkeypatch.setattr(timers.time, "perf_counter", lambda: clock.now)
    return clock
