"""Races with times of the test's own, in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import run_as_it_is

import lncompile
from lncompile.lowering import torch_private_inductor
from lncompile.reporting.selection import Selection
from lncompile.selection import choose, contestants, kept


@dataclass
class Lab:
    """What the race of a test sees and does.

    Attributes:
        seconds: how many milliseconds a call of each way takes by the stopwatch; a way that is not named takes 1 ms.
        compiled: the code of every graph that was compiled, in order: first those of the race.
        calls: how often each way was called.
        folder: where results are kept.
    """

    folder: Path
    seconds: Mapping[str, float] = field(default_factory=lambda: {"model": 0.5})
    compiled: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)

    def stopwatch(self, call: Callable[[], Any]) -> float:
        call()
        name: str = call.name  # type: ignore[attr-defined]
        self.calls[name] = self.calls.get(name, 0) + 1
        return self.seconds.get(name, 1.0) * 1e-3

    def files(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))


def in_a_lab(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Lab:
    found = Lab(tmp_path / "selections")
    monkeypatch.setenv(kept.FOLDER_VARIABLE, str(found.folder))
    monkeypatch.delenv(kept.FILE_VARIABLE, raising=False)
    monkeypatch.setattr(contestants, "stopwatch_for", lambda device: found.stopwatch)
    monkeypatch.setattr(choose, "_spent", 0.0)

    def compile_as_it_is(graph_module: Any, example_inputs: Any, config: Any) -> Callable[..., Any]:
        found.compiled.append(graph_module.code)
        return run_as_it_is(graph_module, example_inputs, config)

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", compile_as_it_is)
    return found


MEASURE = {"lnfold.select": "measure"}


def compiled(net: Any, **options: Any) -> Any:
    return torch.compile(net, backend="lnfold", options={**MEASURE, **{f"lnfold.{k}": v for k, v in options.items()}})


def selection(net: Any) -> Selection:
    (report,) = lncompile.reports(net)
    (found,) = report.selections
    return found


def again(lab: Lab) -> None:
    """What a new process starts with: nothing compiled."""
    torch._dynamo.reset()
    lab.compiled.clear()
    lab.calls.clear()
