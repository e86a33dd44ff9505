"""The command line, called in this process: what it prints for people and for programs."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from lncompile.cli.commands import app


def run(*arguments: object) -> Result:
    """Run ``lncompile`` with arguments."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object, exit_code: int = 0) -> Any:
    """What a command prints with ``--json``."""
    result = run(*arguments, "--json")
    assert result.exit_code == exit_code, result.output
    return json.loads(result.stdout)


def assert_refused(*arguments: object, says: tuple[str, ...]) -> str:
    """Exit code 2, nothing on stdout, and one sentence on stderr without a traceback, which is returned."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    *_, error = result.stderr.splitlines(keepends=True)
    assert error.startswith("error: ")
    assert "Traceback" not in result.stderr
    for words in says:
        assert words in error, error
    return error
