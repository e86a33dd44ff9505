"""The command ``lncompile``: ``explain``, ``verify``, ``bench`` and ``ab`` of any model, for people and for scripts.

Results go to stdout, as a table or with ``--json`` as JSON alone; progress and errors go to stderr. The exit code is 0
where all is well, 1 where predictions get worse or lnfold is a regression, 2 where there is no answer.

torch is imported after the command line was read and found right: :mod:`.commands` holds the commands' parameters,
:mod:`.checks` what can be checked without it, :mod:`.running` what surrounds every command, and a module of each
command's name its work.
"""

from __future__ import annotations

from lncompile.cli.interrupts import leave_at_once


def main() -> None:
    """Run the command, as ``lncompile`` or ``python -m lncompile``."""
    leave_at_once()
    from lncompile.cli.commands import app

    app()
