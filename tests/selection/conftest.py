"""A lab to race in."""

from __future__ import annotations

from pathlib import Path

import pytest
from racing import Lab, in_a_lab


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    """Races with times of the test's own, without Inductor, in a folder of the test's own."""
    return in_a_lab(monkeypatch, tmp_path)
