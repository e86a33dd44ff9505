"""``python -m lncompile.demo``: on one model, how many LayerNorms fold, that predictions stay, and the latency."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lncompile.explanation import explain
from lncompile.factories import ModelError
from lncompile.latency import Latency, compare_latency
from lncompile.machine import MachineError, describe_machine, require_compiler
from lncompile.models import RANDOM_GPT2, LoadedModel, load_model
from lncompile.processes import RepeatedTimings
from lncompile.progress import Steps
from lncompile.report import FoldReport
from lncompile.verification import Verification, verify


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
    timings: RepeatedTimings | None = None

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
        return f"{folded}; predictions are {errors}; {Latency(self.timings, self.machine).sentence()}."

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        latency = None if self.timings is None else Latency(self.timings, self.machine).to_dict()
        return {
            "model": self.loaded.name,
            "description": self.loaded.description,
            "machine": dict(self.machine),
            "passed": self.passed,
            "explain": self.report.to_dict(),
            "verify": self.verification.to_dict() if self.verification else None,
            **(latency or {"timing": None, "speedup_over_inductor": None}),
            "sentence": self.sentence(),
        }


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
            report = explain(model, *loaded.arguments, **inputs)
        console.print(report)
        if not report.total:
            return Demonstration(loaded, machine, report)
        with steps.step("Predictions stay the same (lncompile.verify): error against a float64 reference") as say:
            verification = verify(model, *loaded.arguments, progress=say, **inputs)
        console.print(verification)
        if not verification.passed:
            return Demonstration(loaded, machine, report, verification)
        with steps.step(f"Latency: interleaved calls, {seconds:g} s") as say:
            # verify() compiled the same model with the same backends under the same guards: Dynamo finds that code.
            latency = compare_latency(model, loaded.arguments, inputs, seconds=seconds, machine=machine, progress=say)
        console.print(latency)
    return Demonstration(loaded, machine, report, verification, latency.timings)


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
        "such as openai-community/gpt2; or a local folder with a transformers model; or a config.json; or "
        "module:function, where the function returns a model, or a model and its inputs",
    )
    parser.add_argument("--seconds", type=_positive, default=10.0, help="how long to measure latency (default: 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything found to this file")
    return parser


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value


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
            raise MachineError(f"there is no folder to write '{chosen.json}' into")
        require_compiler()
        found = demonstrate(chosen.model, chosen.seconds, console)
    except (ModelError, MachineError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(f"\n{found.sentence()}", style="bold", soft_wrap=True)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
        console.print(f"Written to {chosen.json}", soft_wrap=True)
    return 0 if found.passed else 1


if __name__ == "__main__":
    sys.exit(main())
