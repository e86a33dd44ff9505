"""One process of a measurement: ``python -m lncompile.comparisons.latency_process TASK.json RESULT.json``.

:func:`lncompile.comparisons.latency.compare_in_processes` writes the task and reads the result.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from lncompile.comparisons.latency import EAGER, compile_candidates
from lncompile.comparisons.timing import measure
from lncompile.models.loading import load_model


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Load the model, compile the candidates in the order asked for, and time them.

    Args:
        task: as ``compare_in_processes`` makes it.

    Returns:
        Seconds of each call by candidate, and candidates left out with why.
    """
    torch.set_num_threads(task["threads"])
    loading = dict(task["loading"])
    if loading.get("dtype") is not None:
        loading["dtype"] = getattr(torch, loading["dtype"])
    loaded = load_model(task["model"], **loading)
    parameter = next(loaded.model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with torch.no_grad():
        candidates = compile_candidates(
            loaded.model,
            loaded.arguments,
            loaded.inputs,
            task["candidates"],
            mode=task["mode"],
            options=task["options"],
            device=device,
        )
        timings = measure(candidates.calls, seconds=task["seconds"], device=device)
    ordered = {name: timings.seconds[name] for name in sorted(timings.seconds, key=_rank)}
    return {"seconds": ordered, "left_out": dict(candidates.left_out)}


def _rank(name: str) -> tuple[bool, str]:
    return name != EAGER, name


def main() -> None:
    """Carry out the task of the first argument and write the result to the second."""
    task, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(carry_out(json.loads(task.read_text()))))


if __name__ == "__main__":
    main()
