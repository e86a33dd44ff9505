"""The command ``lncompile``: ``explain``, ``verify``, ``bench`` and ``ab`` of any model, for people and for scripts.

Results go to stdout, as a table or with ``--json`` as JSON alone; progress and errors go to stderr. The exit code is 0
where all is well, 1 where the answer is no (worse predictions, a regression), 2 where there is no answer.
"""

from __future__ import annotations

import ast
import contextlib
import enum
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from lncompile.abtest import ABTest
from lncompile.abtest.extras import require
from lncompile.abtest.simulation import Request, send_requests
from lncompile.explanation import explain as explain_model
from lncompile.explanation import reports
from lncompile.factories import ModelError, words
from lncompile.latency import compare_latency
from lncompile.machine import MachineError, describe_machine, require_compiler
from lncompile.models import RANDOM_GPT2, LoadedModel, load_model
from lncompile.options import OptionError, arms, parse_options
from lncompile.progress import Steps
from lncompile.report import FoldReport, merge
from lncompile.verification import verify as verify_model

app = typer.Typer(
    name="lncompile",
    help='What torch.compile(model, backend="lnfold") does for a model: which LayerNorms fold, that predictions stay '
    "the same, and the latency against stock torch.compile.",
    epilog="Exit codes: 0 all is well, 1 the answer is no, 2 there is no answer (wrong usage, no such model, ...).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Errors are sentences here; --traceback shows where they came up.
    pretty_exceptions_enable=False,
)


class InputError(Exception):
    """Something on the command line that cannot be. The message is one sentence for the person who wrote it."""


class Dtype(enum.StrEnum):
    """Dtypes a model can be put into."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A Hugging Face id or local folder; a config.json (random weights, every parameter randomised); "
        "module:factory or file.py:factory (a function that returns a model, or a model and its inputs); "
        f"'{RANDOM_GPT2}' (default): GPT-2 small's shapes with random weights, no network needed.",
    ),
]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences or images in one call.")]
Tokens = Annotated[int, typer.Option("--tokens", "-t", min=1, help="Tokens of a sequence.")]
TokensOfRequests = Annotated[
    list[int] | None,
    typer.Option("--tokens", "-t", min=1, help="Tokens of a sequence, by default 64; may be given several times."),
]
DtypeName = Annotated[
    Dtype | None, typer.Option("--dtype", help="Of weights and inputs; by default float32, or what the factory made.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda, cuda:1; by default cuda if there is one, or where the factory put it."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights and inputs.")]
Mode = Annotated[str | None, typer.Option("--mode", help="Of torch.compile: reduce-overhead, max-autotune, ...")]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="KEY=VALUE", help="Of torch.compile: lnfold.assist=false, max_autotune=true, ..."
    ),
]
Seconds = Annotated[float, typer.Option("--seconds", "-s", min=0.0, help="How long to measure.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Also draw the streams into one HTML page.")]
Shadow = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of requests whose answers are compared.")]
MinimumEffect = Annotated[float, typer.Option(min=0.0, max=10.0, help="Relative difference in latency that matters.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error came up.")]


@dataclass
class Run:
    """One run of a command.

    Attributes:
        name: of the model.
        loading: keyword arguments of :func:`lncompile.models.load_model`.
        mode: of torch.compile.
        options: likewise.
        as_json: whether stdout gets JSON.
        output: stdout as it was before the run: a model that prints must not print into the JSON.
        steps: progress, on stderr.
    """

    name: str
    loading: dict[str, Any]
    mode: str | None
    options: dict[str, Any]
    as_json: bool
    output: IO[str]
    steps: Steps

    def load(self) -> LoadedModel:
        """Load the model, as the first step."""
        with self.steps.step("The model") as say:
            say(f"loading {self.name}")
            loaded = load_model(self.name, **self.loading)
        self.steps.console.print(f"     {loaded.description}", soft_wrap=True, markup=False)
        return loaded

    def compile(self, loaded: LoadedModel) -> Any:
        """Return the model to be compiled with lnfold, and with the run's mode and options, when it is first called."""
        return torch.compile(loaded.model, backend="lnfold", **arms(self.mode, self.options)["lnfold"])

    def request(self, loaded: LoadedModel, length: int) -> Request:
        """Return positional and keyword arguments of a request with sequences of a length."""
        if length != self.loading["length"]:
            loaded = load_model(self.name, **{**self.loading, "length": length})
        return loaded.arguments, loaded.inputs

    def show(self, loaded: LoadedModel, found: Mapping[str, Any], *readable: Any) -> None:
        """Print what was found: ``found`` as JSON, or what is readable for people."""
        if self.as_json:
            everything = _finite({"model": loaded.name, "description": loaded.description, **found})
            print(json.dumps(everything, indent=2, allow_nan=False), file=self.output)
            return
        # Rich takes a pipe for 80 columns wide, which would cut the report.
        console = Console(file=self.output, width=None if self.output.isatty() else 160, highlight=False, markup=False)
        for item in readable:
            console.print(item, soft_wrap=isinstance(item, str))


@contextlib.contextmanager
def _run(
    name: str,
    steps: int,
    loading: dict[str, Any],
    mode: str | None,
    pairs: list[str] | None,
    as_json: bool,
    show_traceback: bool,
) -> Iterator[Run]:
    """Check what can be checked before a model is loaded, run a command, and say in a sentence what went wrong."""
    try:
        options = _parse_pairs(pairs or [])
        parse_options(mode, options)
        loading = {**loading, "device": _device(name, loading["device"])}
        if loading["dtype"] is not None:
            loading["dtype"] = getattr(torch, loading["dtype"].value)
        console = Console(stderr=True, highlight=False, markup=False)
        run = Run(name, loading, mode, options, as_json, sys.stdout, Steps(console, steps))
        with contextlib.redirect_stdout(sys.stderr):
            yield run
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # as a shell says it; 1 would be an answer
    except Exception as error:
        if show_traceback:
            traceback.print_exc()
        typer.echo(f"error: {_sentence(error)}", err=True)
        raise typer.Exit(2) from None


def _parse_pairs(pairs: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs: true, false, numbers and quoted strings as such, anything else as a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--option takes KEY=VALUE, such as lnfold.assist=false, not '{pair}'")
        try:
            options[key] = {"true": True, "false": False}.get(text.lower(), text)
            options[key] = ast.literal_eval(text) if options[key] is text else options[key]
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def _device(name: str, device: str | None) -> str | None:
    """The device to put a model on; None to leave it where a factory made it."""
    if device is None:
        return None if ":" in name else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise InputError(f"--device takes cpu, cuda, cuda:1 and the like, not '{device}'") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device '{device}': torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _finite(value: Any) -> Any:
    """Without infinities and NaNs, which JSON does not have: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(error: BaseException) -> str:
    """What went wrong and what can be done about it."""
    chain: list[BaseException] = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    for link in chain:
        if _is_out_of_memory(link):
            return (
                f"out of memory ({words(link)}); a smaller --batch, fewer --tokens or --dtype bfloat16 need less "
                "(verify also needs a float64 copy of the model)"
            )
    if isinstance(error, ModelError | MachineError | OptionError | InputError):
        return str(error)
    return f"{words(error)} (--traceback shows where)"


def _is_out_of_memory(error: BaseException) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    of_the_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_the_cpu or isinstance(error, MemoryError | torch.OutOfMemoryError)


@app.command()
def explain(
    model: ModelName = RANDOM_GPT2,
    batch: Batch = 1,
    tokens: Tokens = 64,
    dtype: DtypeName = None,
    device: Device = None,
    seed: Seed = 0,
    mode: Mode = None,
    option: OptionPairs = None,
    html: Html = None,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Say of every LayerNorm whether it folds, and why not. Compiles nothing."""
    loading = {"batch": batch, "length": tokens, "dtype": dtype, "device": device, "seed": seed}
    with _run(model, 2, loading, mode, option, as_json, show_traceback) as run:
        if html is not None:
            _require_folder(html)
        loaded = run.load()
        with run.steps.step("Which LayerNorms fold") as say, torch.no_grad():
            say("capturing the graph")
            report = explain_model(run.compile(loaded), *loaded.arguments, **loaded.inputs)
        if html is not None:
            html.write_text(report.to_html(loaded.name, loaded.description), encoding="utf-8")
            run.steps.console.print(f"     drawn in {html}", soft_wrap=True, markup=False)
        run.show(loaded, {"explain": report.to_dict()}, report)


@app.command()
def verify(
    model: ModelName = RANDOM_GPT2,
    batch: Batch = 1,
    tokens: Tokens = 64,
    dtype: DtypeName = None,
    device: Device = None,
    seed: Seed = 0,
    mode: Mode = None,
    option: OptionPairs = None,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Compare eager, stock torch.compile and lnfold with a float64 reference. Exit code 1 if lnfold is worse."""
    loading = {"batch": batch, "length": tokens, "dtype": dtype, "device": device, "seed": seed}
    with _run(model, 2, loading, mode, option, as_json, show_traceback) as run:
        require_compiler(run.loading["device"] or "cpu")
        loaded = run.load()
        with run.steps.step("Errors against float64") as say:
            verification = verify_model(run.compile(loaded), *loaded.arguments, progress=say, **loaded.inputs)
        verdict = "Predictions stay the same." if verification.passed else "Predictions got worse."
        found = {"machine": describe_machine(_place_of(loaded)), "passed": verification.passed}
        run.show(loaded, {**found, "verify": verification.to_dict()}, verification, verdict)
    if not verification.passed:
        raise typer.Exit(1)


@app.command()
def bench(
    model: ModelName = RANDOM_GPT2,
    batch: Batch = 1,
    tokens: Tokens = 64,
    dtype: DtypeName = None,
    device: Device = None,
    seed: Seed = 0,
    mode: Mode = None,
    option: OptionPairs = None,
    seconds: Seconds = 10.0,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Measure eager, stock torch.compile and lnfold, call by call in turn: medians, ratios and their 95% intervals."""
    loading = {"batch": batch, "length": tokens, "dtype": dtype, "device": device, "seed": seed}
    with _run(model, 2, loading, mode, option, as_json, show_traceback) as run:
        require_compiler(run.loading["device"] or "cpu")
        machine_before = describe_machine(run.loading["device"] or "cpu")
        loaded = run.load()
        compiled = run.compile(loaded)
        place = _place_of(loaded)
        machine = {**describe_machine(place), "load_average": machine_before["load_average"]}
        with run.steps.step(f"Latency: interleaved calls, {seconds:g} s") as say:
            latency = compare_latency(
                compiled, loaded.arguments, loaded.inputs, seconds=seconds, device=place, machine=machine, progress=say
            )
        report = merge(reports(compiled))
        sentence = f"{_folded(report)}; {latency.sentence()}."
        found = {"machine": machine, **latency.to_dict(), "sentence": sentence, "explain": report.to_dict()}
        run.show(loaded, found, latency, sentence)


@app.command()
def ab(
    model: ModelName = RANDOM_GPT2,
    batch: Batch = 1,
    tokens: TokensOfRequests = None,
    dtype: DtypeName = None,
    device: Device = None,
    seed: Seed = 0,
    mode: Mode = None,
    option: OptionPairs = None,
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=0.0, help="Stop undecided after this long.")] = 60.0,
    shadow: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of requests whose answers are compared.")
    ] = 0.05,
    minimum_effect: Annotated[float, typer.Option(min=0.0, max=10.0, help="Relative difference that matters.")] = 0.02,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it (png, svg, pdf).")] = None,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Answer simulated requests by stock torch.compile and lnfold at random, until it is known which one is faster.

    What lncompile.ABTest does in a server, tried out on this machine. Exit code 1 if lnfold fails, answers otherwise or
    is slower by what matters.
    """
    lengths = list(dict.fromkeys(tokens or [64]))
    loading = {"batch": batch, "length": lengths[0], "dtype": dtype, "device": device, "seed": seed}
    with _run(model, 2, loading, mode, option, as_json, show_traceback) as run:
        require_compiler(run.loading["device"] or "cpu")
        if plot is not None:
            _require_folder(plot)
            try:
                require("matplotlib", "plot", "--plot")
            except ImportError as error:
                raise InputError(str(error)) from error
        loaded = run.load()
        requests = [run.request(loaded, length) for length in lengths]
        machine = describe_machine(_place_of(loaded))
        test = ABTest(
            loaded.model,
            **arms(mode, run.options)["lnfold"],
            shadow=shadow,
            minimum_effect=minimum_effect,
            seed=seed,
            device=_place_of(loaded),
        )
        with run.steps.step(f"Requests to both arms, at most {seconds:g} s") as say, torch.no_grad():
            send_requests(test, requests, seconds=seconds, seed=seed, progress=say)
        verdict = test.verdict()
        found = {"machine": machine, "regression": verdict.regression, "ab": test.to_dict()}
        run.show(loaded, found, _arms_table(test), str(verdict))
        if plot is not None:
            test.plot(plot)
            run.steps.console.print(f"     drawn in {plot}", soft_wrap=True, markup=False)
    if verdict.regression:
        raise typer.Exit(1)


def _arms_table(test: ABTest) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in ("arm", "requests", "p50 ms", "p90 ms", "p99 ms"):
        table.add_column(header)
    for arm in test.to_dict()["arms"]:
        quantiles = [arm["seconds"][name] for name in ("p50", "p90", "p99")]
        milliseconds = ["" if value is None else f"{1e3 * value:.3f}" for value in quantiles]
        table.add_row(arm["name"], str(arm["seconds"]["requests"]), *milliseconds)
    return table


def _require_folder(file: Path) -> None:
    """Say that a file cannot be written before the work is done for it."""
    if not file.resolve().parent.is_dir():
        raise InputError(f"there is no folder to write '{file}' into")


def _place_of(loaded: LoadedModel) -> torch.device:
    """Where a model runs."""
    return next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))


def _folded(report: FoldReport) -> str:
    if not report.total:
        return "the model has no LayerNorm, so lnfold compiles it exactly as stock torch.compile does"
    return f"{report.folded} of {report.total} LayerNorms folded"


def main() -> None:
    """Run the command, as ``lncompile`` or ``python -m lncompile.cli``."""
    app()


if __name__ == "__main__":
    main()
