"""What the name of a model names: a factory, a folder, a configuration, or a model on the hub. Reads no weights.

Nothing of this needs torch, so that a name which names nothing is refused at once.
"""

from __future__ import annotations

import ast
import enum
import importlib.util
import os
import re
import sys
from pathlib import Path

#: Name of the built-in model: GPT-2 small's shapes with random weights, which needs no network.
RANDOM_GPT2 = "gpt2"

# An id on the Hugging Face hub, with or without an owner.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelError(Exception):
    """A model that cannot be had. The message is one sentence for the person who asked for it."""


class Kind(enum.Enum):
    """Where a model comes from."""

    BUILT_IN = "built-in"
    FACTORY = "factory"
    FOLDER = "folder"
    CONFIG = "config"
    HUB = "hub"


def kind_of(name: str) -> Kind:
    """Return what a name names.

    Args:
        name: as for :func:`lncompile.models.loading.load_model`.

    Raises:
        ModelError: if there is no such file, folder or module, or the name cannot be one.

    Example:
        >>> kind_of("package.module:make")
        <Kind.FACTORY: 'factory'>
    """
    path = Path(name).expanduser()
    if name == RANDOM_GPT2:
        return Kind.BUILT_IN
    if ":" in name and not path.exists():
        _require_factory(name)
        return Kind.FACTORY
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"the folder '{name}' holds no config.json, so there is no transformers model in it")
        return Kind.FOLDER
    if path.suffix == ".py":
        raise ModelError(_without_function(name, path))
    if path.is_file():
        return Kind.CONFIG
    if name.count("/") > 1 or name.startswith((".", "~", "/")) or name.endswith(".json"):
        raise ModelError(f"there is no folder or file '{name}'")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"there is no model '{name}', neither a local folder nor on the Hugging Face hub")
    return Kind.HUB


def split_factory(name: str) -> tuple[str, str]:
    """Return the two parts of a factory's name: a module or file, and a function in it.

    Raises:
        ModelError: if one is missing.

    Example:
        >>> split_factory("models/mine.py:make")
        ('models/mine.py', 'make')
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        hint = _defined_in(place) if place.endswith(".py") and Path(place).expanduser().is_file() else ""
        raise ModelError(f"'{name}' names no factory: write module:function or path/to/file.py:function{hint}")
    return place, function


def look_in_current_folder() -> None:
    """Let modules in the current folder be found: an installed command has its own folder on the path in its place."""
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())


def no_such_module(module: str, name: str) -> ModelError:
    """Return the error for a module that cannot be found."""
    return ModelError(
        f"there is no module '{module}' to find '{name}' in: it has to be installed, or lie in the current folder; "
        "path/to/file.py:function names a file"
    )


def factories_in(file: Path) -> list[str]:
    """Return the names of what may make a model in a Python file, without running it: functions, or else classes.

    Args:
        file: its path.

    Raises:
        SyntaxError: if it is not valid Python.
    """
    tree = ast.parse(file.read_bytes())
    for kind in (ast.FunctionDef, ast.ClassDef):
        names = [node.name for node in tree.body if isinstance(node, kind) and not node.name.startswith("_")]
        if names:
            return names
    return []


def _require_factory(name: str) -> None:
    place, _ = split_factory(name)
    if place.endswith(".py"):
        if not Path(place).expanduser().is_file():
            raise ModelError(f"there is no file '{place}' to find '{name}' in")
        return
    look_in_current_folder()
    # Of a package only that it is there: looking further would run it.
    package = place.partition(".")[0]
    try:
        found = package in sys.modules or importlib.util.find_spec(package) is not None
    except ValueError:  # "" or a module that was made by hand
        found = False
    if not found:
        raise no_such_module(package, name)


def _without_function(name: str, file: Path) -> str:
    if not file.is_file():
        return f"there is no file '{name}'; a factory in a file is written {name}:function"
    return f"'{name}' is a file with factories: write {name}:function{_defined_in(name)}"


def _defined_in(place: str) -> str:
    try:
        names = factories_in(Path(place).expanduser())
    except (SyntaxError, ValueError) as error:
        return f"; it is not valid Python, though: {type(error).__name__} in line {getattr(error, 'lineno', 0)}"
    if not names:
        return "; it defines no function yet"
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; it defines {', '.join(names[:10])}{more}"
