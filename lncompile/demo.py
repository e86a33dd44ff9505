"""``python -m lncompile.demo``: on one model, how many LayerNorms fold, that predictions stay, and the latency."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lncompile.explain import explain
from lncompile.machine import describe_machine
from lncompile.models import RANDOM_GPT2, LoadedModel, ModelError, load_model
from lncompile.report import FoldReport
from lncompile.timing import PairedTimings, measure
from lncompile.verify import Verification, verify


class DemoError(Exception):
    """Something else than the model is missing. The message is one sentence for the person at the keyboard."""


@dataclass(frozen=True)
class Demonstration:
    """What the demo found. All numbers in it were measured in this run.

    Attributes:
        loaded: the model.
        machine: what it ran on, and how busy that was before the demo began.
        report: which of its LayerNorms fold.
        verification: errors against float64; None for a model without LayerNorms.
        timings: latencies of eager, inductor and lnfold; None where predictions got worse: the speed of
            wrong answers is worth nothing.
    """

    loaded: LoadedModel
    machine: Mapping[str, Any]
    report: FoldReport
    verification: Verification | None = None
    timings: PairedTimings | None = None

    @property
    def passed(self) -> bool:
        """Whether predictions are as exact as stock torch.compile's."""
        return self.verification is None or self.verification.passed

    def sentence(self) -> str:
        """Say in one sentence what was shown."""
        if self.verification is None:
            return "The model has no LayerNorm, so lnfold compiles it exactly as stock torch.compile does."
        folded = f"{self.report.folded} of {self.report.total} LayerNorms folded"
        worst = max(self.verification.outputs, key=lambda output: (not output.passed, output.lnfold))
        errors = (
            f"a relative {worst.lnfold:.1e} from the float64 reference (stock torch.compile {worst.inductor:.1e}, "
            f"eager {worst.eager:.1e})"
        )
        if self.timings is None:
            return f"{folded}, but predictions got worse: {worst.output} is {errors}."
        ratio = self.timings.speedup("lnfold", "inductor")
        if ratio.low > 1:
            verdict = "faster"
        elif ratio.high < 1:
            verdict = "slower"
        else:
            verdict = "no difference this measurement can tell from noise"
        return (
            f"{folded}; predictions are {errors}; one call takes {1e3 * self.timings.median('lnfold'):.1f} ms, "
            f"with stock torch.compile {1e3 * self.timings.median('inductor'):.1f} ms: "
            f"a speed-up of {ratio}, {verdict}{self._caveat()}."
        )

    def _caveat(self) -> str:
        # Two threads that wait for each other on taken cores take tens of milliseconds at each barrier: what is timed
        # then is the number of parallel loops, in an interval that can be narrow all the same.
        load, cores = self.machine["load_average"], os.cpu_count() or 1
        if load is None or load < 0.5 * cores:
            return ""
        return f", on a machine that was busy with other work (load {load:.1f} on {cores} cores): not to be relied on"

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        timings = self.timings
        return {
            "model": self.loaded.name,
            "description": self.loaded.description,
            "machine": dict(self.machine),
            "passed": self.passed,
            "sentence": self.sentence(),
            "explain": self.report.to_dict(),
            "verify": self.verification.to_dict() if self.verification else None,
            "timing": timings.to_dict() if timings else None,
            "speedup_over_inductor": {name: vars(timings.speedup(name, "inductor")) for name in ("eager", "lnfold")}
            if timings
            else None,
        }


class Steps:
    """Progress as numbered steps: a spinner on a terminal, a line for each thing begun elsewhere (a log, a pipe)."""

    def __init__(self, console: Console, total: int) -> None:
        self.console = console
        self.total = total
        self.begun = 0

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """Announce a step; yields a function that says what is going on within it.

        Args:
            title: what the step is for.
        """
        self.begun += 1
        self.console.print(f"\n{self.begun}/{self.total}  {title}", style="bold")
        started = time.perf_counter()
        if self.console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task("")
                yield lambda words: progress.update(task, description=words)
        else:
            yield lambda words: self.console.print(f"     {words} ...")
        self.console.print(f"     took {time.perf_counter() - started:.1f} s", style="dim")


def demonstrate(name: str, seconds: float, console: Console) -> Demonstration:
    """Run the demo and print it.

    Args:
        name: as for :func:`lncompile.models.load_model`.
        seconds: how long to measure latency.
        console: where to print.

    Returns:
        What was found.

    Raises:
        ModelError: if the model cannot be had.

    Example:
        >>> demonstrate("gpt2", 10.0, Console()).passed
        True
    """
    steps = Steps(console, 4)
    machine = describe_machine()
    with steps.step("The model") as say:
        say(f"loading {name}")
        loaded = load_model(name)
        model, inputs = loaded.model, loaded.inputs
    console.print(f"     {loaded.description}", soft_wrap=True)
    with torch.no_grad():
        with steps.step("Which LayerNorms fold (lncompile.explain)") as say:
            say("capturing the graph")
            report = explain(model, **inputs)
        console.print(report)
        if not report.total:
            return Demonstration(loaded, machine, report)
        with steps.step("Predictions stay the same (lncompile.verify): error against a float64 reference") as say:
            verification = verify(model, progress=say, **inputs)
        console.print(verification)
        if not verification.passed:
            return Demonstration(loaded, machine, report, verification)
        with steps.step(f"Latency: interleaved calls, {seconds:g} s") as say:
            timings = _measure(model, inputs, seconds, say if console.is_terminal else None)
        console.print(_table(timings))
    return Demonstration(loaded, machine, report, verification, timings)


def _measure(
    model: torch.nn.Module, inputs: dict[str, Any], seconds: float, say: Callable[[str], None] | None
) -> PairedTimings:
    # verify() compiled the same model with the same backends under the same guards: Dynamo finds that code again.
    inductor = torch.compile(model, backend="inductor")
    lnfold = torch.compile(model, backend="lnfold")
    return measure(
        {
            "eager": lambda: model(**inputs),
            "inductor": lambda: inductor(**inputs),
            "lnfold": lambda: lnfold(**inputs),
        },
        seconds=seconds,
        progress=None if say is None else lambda share: say(f"measuring, {share:.0%}"),
    )


def _table(timings: PairedTimings) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("", "median ms", "speed-up over inductor [95% interval]"):
        table.add_column(header)
    for name in timings.seconds:
        ratio = "1" if name == "inductor" else str(timings.speedup(name, "inductor"))
        table.add_row(name, f"{1e3 * timings.median(name):.2f}", ratio)
    table.caption = f"{len(timings.seconds['lnfold'])} rounds on {torch.get_num_threads()} CPU threads"
    table.caption_justify = "left"
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lncompile.demo",
        description="Show on one model which LayerNorms fold, that predictions stay the same, and the latency "
        "against stock torch.compile.",
    )
    parser.add_argument(
        "--model",
        default=RANDOM_GPT2,
        help="'gpt2' (default): GPT-2 small's shapes with random weights, no network needed; or a Hugging Face hub id, "
        "such as openai-community/gpt2; or a local folder with a transformers model",
    )
    parser.add_argument("--seconds", type=_positive, default=10.0, help="how long to measure latency (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything found to this file")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


def _require_compiler() -> None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise DemoError(
            f"torch.compile needs a C++ compiler on the CPU, and there is no '{compiler}' (CXX names another)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo as a command.

    Args:
        arguments: of the command line, without the program's name; ``sys.argv``'s by default.

    Returns:
        The exit code: 0 where predictions stayed the same, 1 where they got worse, 2 where the demo could not be run.

    Example:
        >>> main(["--model", "gpt2", "--seconds", "5"])
        0
    """
    chosen = _parser().parse_args(arguments)
    # Rich takes a pipe for 80 columns wide, which would cut the report.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    try:
        if chosen.json is not None and not chosen.json.resolve().parent.is_dir():
            raise DemoError(f"there is no folder to write '{chosen.json}' into")
        _require_compiler()
        found = demonstrate(chosen.model, chosen.seconds, console)
    except (ModelError, DemoError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"\n{found.sentence()}", style="bold", soft_wrap=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
        console.print(f"Written to {chosen.json}", soft_wrap=True)
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
