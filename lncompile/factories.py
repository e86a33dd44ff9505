"""A model of the user's own, named as ``module:factory`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ModelError(Exception):
    """A model that cannot be had. The message is one sentence for the person who asked for it."""


def call_factory(
    name: str, sizes: Mapping[str, int]
) -> tuple[nn.Module, tuple[tuple[Any, ...], dict[str, Any]] | None]:
    """Call a factory.

    Args:
        name: ``"package.module:function"``, found as Python finds modules and in the current folder, or
            ``"path/to/file.py:function"``.
        sizes: values by name, ``batch`` and ``tokens``. A factory gets those it has a parameter for.

    Returns:
        The model, and positional and keyword arguments for one call of it; None where the factory returned a model
        alone.

    Raises:
        ModelError: if there is no such factory, or it fails, or returns something else.

    Example:
        A factory is a function that returns a model, or a model and what it is called with (a tensor, a tuple of
        positional arguments, or a dict of keyword arguments):

        >>> def make(batch=1):
        ...     return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)), torch.randn(batch, 8)
    """
    factory = _find(name)
    accepted: Mapping[str, Any]
    try:
        accepted = inspect.signature(factory).parameters
    except ValueError:  # written in C: it says nothing of its parameters
        accepted = {}
    try:
        made = factory(**{key: value for key, value in sizes.items() if key in accepted})
    except Exception as error:
        raise ModelError(f"the factory '{name}' failed: {words(error)}{_place(error)}") from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the factory '{name}' returned {_kind(made)}: it has to return a torch.nn.Module, or a pair of one and "
            "what it is called with (a tensor, a tuple of positional arguments, a dict of keyword arguments)"
        )
    if inputs is None:
        return model, None
    if isinstance(inputs, Mapping):
        return model, ((), dict(inputs))
    if isinstance(inputs, tuple | list):
        return model, (tuple(inputs), {})
    if isinstance(inputs, Tensor):
        return model, ((inputs,), {})
    raise ModelError(
        f"the factory '{name}' returned a model and {_kind(inputs)} for its inputs: they have to be a tensor, a tuple "
        "of positional arguments, or a dict of keyword arguments"
    )


def _find(name: str) -> Callable[..., Any]:
    """Import the module and take the function out of it."""
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ModelError(f"'{name}' names no factory: write module:function or path/to/file.py:function")
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
    # An installed command has its own folder on the path instead of the one the user stands in.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ModelError(
                f"there is no module '{error.name}' to find '{name}' in: it has to be installed, or lie in the current "
                "folder; path/to/file.py:function names a file"
            ) from error
        raise ModelError(f"'{module}' cannot be imported: {words(error)}{_place(error)}") from error
    except Exception as error:
        raise ModelError(f"'{module}' cannot be imported: {words(error)}{_place(error)}") from error


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
    except Exception as error:
        raise ModelError(f"'{path}' cannot be imported: {words(error)}{_place(error)}") from error
    return module


def words(error: BaseException) -> str:
    """Return an error's kind and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place(error: BaseException) -> str:
    """Where in the user's code an error came up, if it came up there."""
    others = (__file__, "<frozen", importlib.__file__, str(Path(torch.__file__).parent))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
