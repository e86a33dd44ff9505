"""A model of the user's own, named as ``module:factory`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.models.names import ModelError, look_in_current_folder, no_such_module, split_factory


@dataclass(frozen=True)
class Made:
    """What a factory made.

    Attributes:
        model: the model.
        inputs: positional and keyword arguments for one call of it; None where it came alone.
        parameters: those of the sizes it was given that it has a parameter for.
    """

    model: nn.Module
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
    parameters: frozenset[str]


def call_factory(name: str, sizes: Mapping[str, int], asked: Collection[str] = ()) -> Made:
    """Call a factory.

    Args:
        name: ``"package.module:function"``, found as Python finds modules and in the current folder, or
            ``"path/to/file.py:function"``.
        sizes: values by name, such as ``batch``, ``tokens`` and ``seed``. A factory gets those it has a parameter for;
            one that takes any (``**sizes``) gets those that were asked for.
        asked: the names of those that were asked for, and that are not defaults.

    Returns:
        The model and its inputs.

    Raises:
        ModelError: if there is no such factory, or it fails, ends the program, or returns something else.

    Example:
        A factory is a function that returns a model, or a model and what it is called with (a tensor, a tuple of
        positional arguments, or a dict of keyword arguments):

        >>> def make(batch=1):
        ...     return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)), torch.randn(batch, 8)
    """
    factory = _find(name)
    accepted = _accepted(factory, sizes, asked)
    try:
        made = factory(**{key: value for key, value in sizes.items() if key in accepted})
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit as well: its exit code is not our answer
        raise ModelError(f"the factory '{name}' {_failed(error)}{_place(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the factory '{name}' returned {_kind(made)}: it has to return a torch.nn.Module, or a pair of one and "
            "what it is called with (a tensor, a tuple of positional arguments, a dict of keyword arguments)"
        )
    if inputs is None:
        return Made(model, None, accepted)
    if isinstance(inputs, Mapping):
        return Made(model, ((), dict(inputs)), accepted)
    if isinstance(inputs, tuple | list):
        return Made(model, (tuple(inputs), {}), accepted)
    if isinstance(inputs, Tensor):
        return Made(model, ((inputs,), {}), accepted)
    raise ModelError(
        f"the factory '{name}' returned a model and {_kind(inputs)} for its inputs: they have to be a tensor, a tuple "
        "of positional arguments, or a dict of keyword arguments"
    )


def _accepted(factory: Callable[..., Any], sizes: Mapping[str, int], asked: Collection[str]) -> frozenset[str]:
    """The names of sizes that a factory takes."""
    try:
        parameters = inspect.signature(factory).parameters
    except ValueError:  # written in C: it says nothing of its parameters
        return frozenset()
    named = {key for key, parameter in parameters.items() if parameter.kind is not parameter.POSITIONAL_ONLY}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return frozenset(key for key in sizes if key in named or (takes_any and key in asked))


def _find(name: str) -> Callable[..., Any]:
    """Import the module and take the function out of it."""
    place, attribute = split_factory(name)
    module = _import_file(name, Path(place).expanduser()) if place.endswith(".py") else _import_module(name, place)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            defined = [key for key in public if getattr(vars(module)[key], "__module__", None) == module.__name__]
            there = f"; it defines {', '.join(sorted(defined)[:10])}" if defined else ""
            raise ModelError(f"there is no '{attribute}' in '{place}'{there}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelError(f"'{name}' is {_kind(found)}, not a function or class that makes a model")
    factory: Callable[..., Any] = found
    return factory


def _import_module(name: str, module: str) -> Any:
    look_in_current_folder()
    try:
        return importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise no_such_module(error.name, name) from error
        raise ModelError(f"'{module}' cannot be imported: it {_failed(error)}{_place(error)}") from error
    except BaseException as error:
        raise ModelError(f"'{module}' cannot be imported: it {_failed(error)}{_place(error)}") from error


def _import_file(name: str, path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"there is no file '{path}' to find '{name}' in")
    # A name of its own: the file may be called as some installed package is.
    specification = importlib.util.spec_from_file_location(f"lncompile_factory_{path.stem}", path)
    assert specification is not None  # it ends in .py
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # pickling and dataclasses look there for what a module defines
    sys.path.insert(0, str(path.resolve().parent))  # as for a script: it may import its neighbours
    try:
        specification.loader.exec_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ModelError(f"'{path}' cannot be imported: it {_failed(error)}{_place(error)}") from error
    return module


def _failed(error: BaseException) -> str:
    """What a user's code did that did not go well."""
    if not isinstance(error, SystemExit):
        return f"failed: {words(error)}"
    code = "" if error.code is None else repr(error.code)
    return f"ended the program with sys.exit({code}) where a model was asked for"


def words(error: BaseException) -> str:
    """Return an error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """Where in the user's code an error came up, if it came up there."""
    others = (__file__, "<frozen", str(Path(torch.__file__).parent))
    library, packages = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(others)
        and (not frame.filename.startswith(library) or frame.filename.startswith(packages))
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


__all__ = ["Made", "ModelError", "call_factory", "words"]
