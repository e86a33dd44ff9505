"""The parameters that every command has, and what surrounds its work: a command is a function of its run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

from lncompile.cli.parameters import (
    AsJson,
    Asked,
    Batch,
    Device,
    DtypeName,
    Mode,
    ModelName,
    OptionPairs,
    Seed,
    Tokens,
    Traceback,
)
from lncompile.cli.running import running
from lncompile.models.names import RANDOM_GPT2

#: In the order of the help: before a command's own, and behind them.
_BEFORE: dict[str, tuple[Any, Any]] = {
    "model": (ModelName, RANDOM_GPT2),
    "batch": (Batch, None),
    "tokens": (Tokens, None),
    "dtype": (DtypeName, None),
    "device": (Device, None),
    "seed": (Seed, None),
    "mode": (Mode, None),
    "option": (OptionPairs, None),
}
_BEHIND: dict[str, tuple[Any, Any]] = {"as_json": (AsJson, False), "show_traceback": (Traceback, False)}

#: The parameters that name a file to write.
_FILES = ("html", "plot", "output")

Work = Callable[..., bool]


def command_on(app: typer.Typer) -> Callable[..., Callable[[Work], Work]]:
    """Return a decorator that makes commands of an application.

    Its argument is the number of steps of a command. What it decorates takes the run and what is the command's own, and
    returns whether all is well; where it is not, the exit code is 1. A parameter of its own takes the place of a shared
    one of that name.
    """

    def command(steps: int) -> Callable[[Work], Work]:
        def register(work: Work) -> Work:
            hints = get_type_hints(work, include_extras=True)
            own = {p.name: (hints[p.name], p.default) for p in list(inspect.signature(work).parameters.values())[1:]}
            before = {name: own.get(name, shared) for name, shared in _BEFORE.items()}
            taken = {**before, **own, **_BEHIND}

            @functools.wraps(work)
            def call(**given: Any) -> None:
                tokens = given["tokens"]
                asked = Asked(
                    command=work.__name__,
                    model=given["model"],
                    batch=given["batch"],
                    tokens=(tokens[0] if tokens else None) if isinstance(tokens, list) else tokens,
                    dtype=given["dtype"],
                    device=given["device"],
                    seed=given["seed"],
                    mode=given["mode"],
                    pairs=given["option"],
                    as_json=given["as_json"],
                    show_traceback=given["show_traceback"],
                    files=tuple((f"--{name}", given[name]) for name in _FILES if given.get(name) is not None),
                )
                with running(asked, steps) as run:
                    is_well = work(run, **{name: given[name] for name in own})
                if not is_well:
                    raise typer.Exit(1)

            parameters = [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
                for name, (annotation, default) in taken.items()
            ]
            vars(call)["__signature__"] = inspect.Signature(parameters)
            call.__annotations__ = {name: annotation for name, (annotation, _) in taken.items()}
            app.command()(call)
            return work

        return register

    return command


__all__ = ["command_on"]
