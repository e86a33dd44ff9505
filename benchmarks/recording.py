"""Where results go, and what code they are of."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """Return the commit that is measured, marked where the tree has changes it does not hold.

    A copy of the tree without its history cannot tell; there the variable ``BENCHMARK_COMMIT`` says which it is.
    """
    given = os.environ.get("BENCHMARK_COMMIT")
    if given:
        return given

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: a tree without its history"
    # The results themselves do not change what is measured.
    changed = git("status", "--porcelain", "--", ":/lncompile", ":/passes", ":/lowering", ":/benchmarks/*.py")
    return git("rev-parse", "HEAD") + (" with uncommitted changes" if changed else "")


def now() -> str:
    """Return the time of a measurement, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result as JSON and return where it lies.

    Args:
        name: of the file, without its ending.
        result: what was measured.
    """
    return write_to(RESULTS / f"{name}.json", result)


def write_to(path: Path, result: dict[str, Any]) -> Path:
    """Write a result as JSON to a file and return where it lies.

    Args:
        path: of the file; its folder is made where it is missing.
        result: what was measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
