"""The commands as a command line knows them: names, parameters, help. Their work is imported when it is wanted."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Annotated

import typer

from lncompile import __version__
from lncompile.cli.group import command_group
from lncompile.cli.interrupts import importing
from lncompile.cli.parameters import AsJson, Asked, Graphs, Html, Plot, TokensOfRequests, Traceback
from lncompile.cli.running import Run, running
from lncompile.cli.shared_parameters import command_on

app = typer.Typer(
    name="lncompile",
    cls=command_group(default="advise"),
    help='Find out whether torch.compile(model, backend="lnfold") is worthwhile for a model on this machine: '
    '"lncompile MODEL" gives one answer; the commands below give its parts.',
    epilog="Exit codes: 0 all is well, 1 predictions get worse or lnfold is a regression, 2 there is no answer (wrong "
    "usage, no such model, ...).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Errors are sentences here; --traceback shows where they came up.
    pretty_exceptions_enable=False,
    # Nothing that somebody wrote is read as markup, and 80 columns hold plain help.
    rich_markup_mode=None,
)


def _print_versions(wanted: bool) -> None:
    if wanted:
        try:
            torch = importlib.metadata.version("torch")  # importing it would take seconds
        except importlib.metadata.PackageNotFoundError:
            torch = "not installed"
        typer.echo(f"lncompile {__version__}, torch {torch}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_versions, is_eager=True, help="Print versions and exit."),
    ] = False,
) -> None:
    """Only what is not a command's own; the group's help stands above."""


Source = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A folder with safetensors files, as save_pretrained writes it; a Hugging Face id; or a file.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to write. It must not exist.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A plan that was saved; default: one made of the model's config.json."),
]
Untie = Annotated[
    bool, typer.Option("--untie", help="Give an embedding whose table is tied a centered table of its own.")
]
Processes = Annotated[
    int,
    typer.Option(
        "--processes",
        min=2,
        metavar="N",
        help="Number of measuring processes; every other one compiles in the opposite order.",
    ),
]


Seconds = Annotated[float, typer.Option("--seconds", "-s", min=0.0, metavar="S", help="How long to measure.")]
command = command_on(app)


@command(steps=5)
def advise(run: Run, seconds: Seconds = 20.0, processes: Processes = 4) -> bool:
    """Say whether to use lnfold on this machine, and why.

    The answer is "use it", "no gain" or "not possible". The ways to compile the model are raced first, unless
    --option lnfold.select=model says otherwise.
    This is what "lncompile MODEL" does. The exit code is 1 if predictions would get worse.
    """
    with importing():
        from lncompile.cli.advise import run_advise
    return run_advise(run, seconds, processes).stays_exact


@command(steps=2)
def explain(run: Run, html: Html = None, graphs: Graphs = None) -> bool:
    """Say of every LayerNorm whether it folds, and why not.

    Compiles nothing. With --device meta it needs no memory for weights.
    """
    with importing():
        from lncompile.cli.explain import run_explain
    run_explain(run, html, graphs)
    return True


@command(steps=2)
def verify(run: Run) -> bool:
    """Compare predictions with a float64 reference.

    Compares eager, stock torch.compile and lnfold. The exit code is 1 if lnfold's are worse, or not finite.
    """
    with importing():
        from lncompile.cli.verify import run_verify
    return run_verify(run)


@command(steps=3)
def bench(run: Run, seconds: Seconds = 20.0, processes: Processes = 4) -> bool:
    """Measure latency, call by call in turn, in several processes.

    Times eager, stock torch.compile and lnfold: medians, ratios and their 95% intervals over processes. Where lnfold
    changes nothing it says so and measures nothing.
    """
    with importing():
        from lncompile.cli.bench import run_bench
    run_bench(run, seconds, processes)
    return True


@command(steps=2)
def tune(
    run: Run,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Also write the results into a file, to be shipped."),
    ] = None,
) -> bool:
    """Race the ways to compile a model, before it is needed.

    Times stock torch.compile and what lnfold can make of the model, with its inputs, on this machine. The result is
    kept: torch.compile with lnfold.select="measure" and the same mode, options and inputs then compiles the winner
    alone.
    """
    with importing():
        from lncompile.cli.tune import run_tune
    run_tune(run, output)
    return True


@command(steps=3)
def ab(
    run: Run,
    tokens: TokensOfRequests = None,
    seconds: Annotated[
        float, typer.Option("--seconds", "-s", min=0.0, metavar="S", help="Stop undecided after this long.")
    ] = 60.0,
    shadow: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="X", help="Share of requests whose answers are compared.")
    ] = 0.05,
    minimum_effect: Annotated[
        float, typer.Option(min=0.0, max=10.0, metavar="X", help="Relative difference in latency that matters.")
    ] = 0.02,
    plot: Plot = None,
) -> bool:
    """Try lnfold out on simulated requests.

    Each is answered by stock torch.compile or by lnfold at random, until it is known which one is faster: what
    lncompile.ABTest does in a server. The exit code is 1 if lnfold fails, returns different outputs, or is slower by
    more than --minimum-effect.
    """
    with importing():
        from lncompile.cli.ab import run_ab
    return not run_ab(run, list(dict.fromkeys(tokens or ())), seconds, shadow, minimum_effect, plot)


@app.command()
def fold(
    model: Source,
    target: Target,
    plan: PlanFile = None,
    untie: Untie = False,
    as_json: AsJson = False,
    show_traceback: Traceback = False,
) -> None:
    """Write a folded copy of a checkpoint.

    It has centered weights, and the plan that says which norms are RMSNorms.
    Needs memory for one tensor only. If interrupted, it leaves no incomplete TARGET and resumes when run again.
    """
    asked = Asked("fold", model, None, None, None, "meta", None, None, None, as_json, show_traceback)
    with running(asked, steps=3 if plan is None else 1) as run:
        with importing():
            from lncompile.cli.fold import run_fold
        run_fold(run, target, plan, untie)
