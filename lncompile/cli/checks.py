"""What can be found wrong with a command line before torch is imported, which takes seconds."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lncompile.cli.parameters import Asked, InputError
from lncompile.models.names import kind_of
from lncompile.options import parse_ours

#: Commands that need no values of a model's weights in memory.
WITHOUT_VALUES = ("explain", "fold")


def check(asked: Asked) -> dict[str, Any]:
    """Check what was asked for.

    Returns:
        The options of torch.compile.

    Raises:
        InputError: for what cannot be, in a sentence.
        ModelError: if the model's name names nothing.
        OptionError: for an option of lnfold's that does not exist, or a value it does not take.
    """
    if asked.command != "fold":  # that takes files of weights, too
        kind_of(asked.model)
    options = parse_pairs(asked.pairs or ())
    parse_ours(options)
    for option, file in asked.files:
        if file is not None:
            require_writable(file, option)
    if asked.device is not None:
        require_values(asked.command, asked.device)
    return options


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs: true, false, numbers and quoted strings as such, anything else as a string."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not key or not equals:
            raise InputError(f"--option takes KEY=VALUE, such as lnfold.assist=off, not '{pair}'")
        try:
            options[key] = {"true": True, "false": False}.get(text.lower(), text)
            options[key] = ast.literal_eval(text) if options[key] is text else options[key]
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def require_writable(file: Path, option: str) -> None:
    """Say that a file cannot be written before the work is done for it."""
    if file.is_dir():
        raise InputError(f"{option} takes a file to write, and '{file}' is a folder")
    if not file.resolve().parent.is_dir():
        raise InputError(f"there is no folder '{file.parent}' to write '{file.name}' into ({option})")
    existed = file.exists()
    if existed and not file.is_file():
        return  # a pipe or a terminal, where opening it is already an event
    try:
        with file.open("ab"):
            pass
        if not existed:
            file.unlink()
    except OSError as error:
        raise InputError(f"'{file}' cannot be written ({option}): {error.strerror}") from error


def require_values(command: str, device: str) -> None:
    """Say that a command that calls models does not work on the meta device."""
    if command not in WITHOUT_VALUES and device.partition(":")[0] == "meta":
        raise InputError(
            f"a model on the meta device has shapes and no values, and {command} needs values: only explain works there"
        )
