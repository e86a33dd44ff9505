"""The group of commands: what becomes of a first word that is not one of them."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, ClassVar

from typer.core import TyperGroup


class CommandGroup(TyperGroup):
    """Commands, one of which may be the default: ``lncompile MODEL`` is then ``lncompile DEFAULT MODEL``.

    Attributes:
        default: the name of that command; None where there is none.
    """

    default: ClassVar[str | None] = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command in front of arguments that name none."""
        if args and args[0] not in self.commands and not self._is_own_option(ctx, args[0]):
            self._require_no_misspelling(ctx, args[0])
            if self.default is None:
                known = ", ".join(self.commands)
                ctx.fail(f"'{args[0]}' is not a command: write {ctx.info_name} COMMAND {args[0]}, one of {known}")
            else:
                args = [self.default, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def _is_own_option(self, ctx: Any, word: str) -> bool:
        return word.partition("=")[0] in {name for parameter in self.get_params(ctx) for name in parameter.opts}

    def _require_no_misspelling(self, ctx: Any, word: str) -> None:
        """A command with a letter wrong would be looked for as a model."""
        close = difflib.get_close_matches(word, list(self.commands), n=1, cutoff=0.8)
        if close and not Path(word).exists():
            ctx.fail(f"there is no command '{word}'; did you mean '{close[0]}'?")


def command_group(default: str | None = None) -> type[CommandGroup]:
    """Return a class of groups, to be given to ``typer.Typer(cls=...)``.

    Args:
        default: the command that ``lncompile MODEL`` stands for; None where the command has to be named.

    Example:
        >>> app = typer.Typer(cls=command_group(default="explain"))
    """

    class Group(CommandGroup):
        """With this default."""

    Group.default = default
    return Group
