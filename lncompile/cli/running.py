"""What surrounds the work of every command: checks before it, progress and errors in sentences, an exit code."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import typer

from lncompile.cli.checks import WITHOUT_VALUES, check, require_values
from lncompile.cli.interrupts import INTERRUPTED, importing
from lncompile.cli.parameters import Asked, InputError
from lncompile.comparisons.machine import MachineError, require_compiler
from lncompile.models.names import Kind, ModelError, kind_of
from lncompile.options import OptionError, arms, parse_options

if TYPE_CHECKING:
    import torch

    from lncompile.abtest.simulation import Request
    from lncompile.comparisons.latency import Latency
    from lncompile.models.loading import LoadedModel
    from lncompile.progress import Steps
    from lncompile.reporting.report import FoldReport


@dataclass
class Run:
    """One run of a command.

    Attributes:
        asked: what was asked for.
        options: of torch.compile.
        device: where the model is put; None for where its factory makes it.
        dtype: of weights and inputs; None for what the factory makes.
        output: stdout as it was before the run: a model that prints must not print into the JSON.
        steps: progress, on stderr.
        loaded: the model, once it is loaded.
    """

    asked: Asked
    options: dict[str, Any]
    device: str | None
    dtype: torch.dtype | None
    output: IO[str]
    steps: Steps
    loaded: LoadedModel | None = None

    def load(self, tokens: int | None = None) -> LoadedModel:
        """Load the model, as the first step.

        Args:
            tokens: of a sequence, by default those that were asked for.
        """
        from lncompile.models.loading import load_model

        with self.steps.step("The model") as say:
            say(f"loading {self.asked.model}")
            self.loaded = load_model(self.asked.model, **self._loading(tokens))
        require_values(self.asked.command, place_of(self.loaded).type)
        self.note(self.loaded.description)
        return self.loaded

    def compile(self, loaded: LoadedModel, options: Mapping[str, Any] | None = None) -> Any:
        """Return the model to be compiled with lnfold when it is first called.

        Args:
            loaded: the model.
            options: by default the run's, as its mode is.
        """
        import torch

        given = self.options if options is None else options
        return torch.compile(loaded.model, backend="lnfold", **arms(self.asked.mode, given)["lnfold"])

    def request(self, loaded: LoadedModel, tokens: int | None) -> Request:
        """Return positional and keyword arguments of a request with sequences of a length."""
        from lncompile.models.loading import inputs_of_length, load_model

        if kind_of(self.asked.model) is Kind.FACTORY:
            loaded = load_model(self.asked.model, **self._loading(tokens))
        elif tokens is not None:
            loaded = inputs_of_length(loaded, self.asked.batch, tokens, self.asked.seed)
        return loaded.arguments, loaded.inputs

    def explain(self, loaded: LoadedModel) -> FoldReport:
        """Find out which LayerNorms fold, as a step."""
        import torch

        from lncompile.explanation import explain

        with self.steps.step("Which LayerNorms fold") as say, torch.no_grad():
            say("capturing the graph")
            return explain(self.compile(loaded), *loaded.arguments, **loaded.inputs)

    def load_on_described_machine(self) -> tuple[LoadedModel, dict[str, Any]]:
        """Load the model, and describe the machine that it runs on as it was before: nothing of ours loads it."""
        from lncompile.comparisons.machine import describe_machine

        before = describe_machine(self.device or "cpu")
        loaded = self.load()
        return loaded, {**describe_machine(place_of(loaded)), "load_average": before["load_average"]}

    def measure(
        self, loaded: LoadedModel, machine: Mapping[str, Any], seconds: float, processes: int, limit: bool = False
    ) -> Latency:
        """Measure latency in processes of its own, as a step. The model's weights are freed.

        Args:
            loaded: the model.
            machine: that it runs on.
            seconds: how long.
            processes: how many processes measure.
            limit: whether the model without its norms is measured as well.
        """
        from lncompile.comparisons.latency import compare_in_processes

        self.free_weights()
        with self.steps.step(f"Latency: {processes} processes, {seconds:g} s of calls") as say:
            return compare_in_processes(
                loaded.name,
                self.loading_by_name(),
                mode=self.asked.mode,
                options=self.options,
                limit=limit,
                seconds=seconds,
                processes=processes,
                machine=machine,
                progress=say,
            )

    def free_weights(self) -> None:
        """Free the memory of the model, whose shapes stay: processes that measure load it themselves."""
        import gc

        import torch

        assert self.loaded is not None
        self.loaded.model.to("meta")
        torch.compiler.reset()  # what was compiled holds centered copies
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def note(self, words: str) -> None:
        """Say something about the step that is done."""
        self.steps.console.print(f"     {words}", soft_wrap=True)

    def show(self, loaded: LoadedModel, found: Mapping[str, Any], *readable: Any) -> None:
        """Print what was found: ``found`` as JSON, or what is readable for people."""
        from lncompile.console import plain_console

        if self.asked.as_json:
            everything = _finite({"model": loaded.name, "description": loaded.description, **found})
            print(json.dumps(everything, indent=2, allow_nan=False), file=self.output)
            return
        console = plain_console(self.output)
        for item in readable:
            console.print(item, soft_wrap=isinstance(item, str))

    def loading_by_name(self) -> dict[str, Any]:
        """Return the keyword arguments that the model was loaded with, ready for JSON: for another process."""
        return {
            **self._loading(None),
            "dtype": None if self.asked.dtype is None else self.asked.dtype.value,
            "device": self.device,
        }

    def _loading(self, tokens: int | None) -> dict[str, Any]:
        return {
            "batch": self.asked.batch,
            "length": self.asked.tokens if tokens is None else tokens,
            "dtype": self.dtype,
            "device": self.device,
            "seed": self.asked.seed,
        }


@contextlib.contextmanager
def running(asked: Asked, steps: int) -> Iterator[Run]:
    """Check what can be checked before anything is done, run a command, and say in a sentence what went wrong.

    Args:
        asked: what was asked for.
        steps: number of steps of the command.

    Yields:
        The run.

    Raises:
        typer.Exit: with 2 where there is no answer, with 130 where it was interrupted.
    """
    run: Run | None = None
    try:
        options = check(asked)
        with importing():
            from lncompile.console import plain_console
            from lncompile.progress import Steps

            device = _device(asked)
        parse_options(asked.mode, options)
        if asked.command not in WITHOUT_VALUES:
            require_compiler(device or "cpu")
        run = Run(asked, options, device, _dtype(asked), sys.stdout, Steps(plain_console(stderr=True), steps))
        with contextlib.redirect_stdout(sys.stderr):
            yield run
    except BaseException as error:
        if isinstance(error, GeneratorExit):
            raise
        if any(isinstance(link, KeyboardInterrupt) for link in chain_of(error)):
            _show_error("interrupted", asked)
            raise typer.Exit(INTERRUPTED) from None
        if asked.show_traceback:
            traceback.print_exc()
        sentence = _sentence(error, asked, run)
        typer.echo(f"error: {sentence}", err=True)
        _show_error(sentence, asked)
        raise typer.Exit(2) from None


def _show_error(sentence: str, asked: Asked) -> None:
    """Print what went wrong for a program, where it is one that reads stdout."""
    if asked.as_json:
        typer.echo(json.dumps({"model": asked.model, "error": sentence}, indent=2))


def chain_of(error: BaseException) -> list[BaseException]:
    """Return an error and those that led to it."""
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None and before not in chain:
        chain.append(before)
    return chain


def place_of(loaded: LoadedModel) -> torch.device:
    """Return where a model runs."""
    import torch

    return next((parameter.device for parameter in loaded.model.parameters()), torch.device("cpu"))


def _device(asked: Asked) -> str | None:
    """The device to put a model on; None to leave it where a factory made it."""
    import torch

    if asked.device is None:
        is_factory = kind_of(asked.model) is Kind.FACTORY
        return None if is_factory else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked.device)
    except RuntimeError:
        raise InputError(f"--device takes cpu, cuda, cuda:1 and the like, not '{asked.device}'") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"there is no device '{asked.device}': torch sees {torch.cuda.device_count()} CUDA devices")
    return asked.device


def _dtype(asked: Asked) -> torch.dtype | None:
    import torch

    if asked.dtype is None:
        return None
    dtype: torch.dtype = getattr(torch, asked.dtype.value)
    return dtype


def _finite(value: Any) -> Any:
    """Without infinities and NaNs, which JSON does not have: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _printed(text: str, asked: Asked) -> str:
    """What a process printed: its last line, or all of it where the traceback is wanted."""
    lines = text.strip().splitlines()
    if not lines:
        return ""
    return "\n" + text.rstrip() if asked.show_traceback else f": {lines[-1].strip()} (--traceback shows all of it)"


def _sentence(error: BaseException, asked: Asked, run: Run | None) -> str:
    """What went wrong and what can be done about it."""
    if run is not None:
        from lncompile.cli.out_of_memory import is_out_of_memory, out_of_memory  # it needs torch, which is there by now
        from lncompile.comparisons.processes import ProcessError
        from lncompile.plans.entries import PlanError
        from lncompile.plans.safetensors_file import CheckpointError

        if isinstance(error, PlanError | CheckpointError):
            return str(error)
        if isinstance(error, ProcessError) and not error.out_of_memory:
            return f"{error}{_printed(error.printed, asked)}"
        for link in chain_of(error):
            if is_out_of_memory(link):
                return out_of_memory(link, run)
    if isinstance(error, ModelError | MachineError | OptionError | InputError):
        return str(error)
    lines = str(error).strip().splitlines()
    if isinstance(error, SystemExit | typer.Exit):
        return f"the model ended the program while {asked.command} was called for it (--traceback shows where)"
    words = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{words} (--traceback shows where)"
