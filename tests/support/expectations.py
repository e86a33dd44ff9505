"""Expected texts that stand in test files, and are written anew when asked.

A test calls ``assert_expected`` with what it found and with a literal. With ``REWRITE_EXPECTATIONS=1`` in the
environment the literal in the file is exchanged for what the test found, so that a change of many can be read there::

    REWRITE_EXPECTATIONS=1 pytest tests/rewrites/test_golden_*.py && git diff tests/rewrites
"""

from __future__ import annotations

import ast
import inspect
import os
import textwrap
from collections import defaultdict
from pathlib import Path

#: By file: where each text stood that was exchanged, and how many lines longer the file has become there.
_moved: dict[Path, list[tuple[int, int]]] = defaultdict(list)


def assert_expected(actual: str, expected: str) -> None:
    """Check a text against one that stands in the test.

    Args:
        actual: what the test found.
        expected: a literal in the call. It may be indented, and begin and end with a line of nothing.
    """
    actual, expected = _plain(actual), _plain(expected)
    if actual != expected and os.environ.get("REWRITE_EXPECTATIONS"):
        frame = inspect.stack()[1]
        exchange(Path(frame.filename), frame.lineno, actual)
        return
    assert actual == expected, f"expected\n{expected}\n\nfound\n{actual}\n\n(REWRITE_EXPECTATIONS=1 takes it over)"


def _plain(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def exchange(path: Path, line: int, actual: str) -> None:
    """Put a text in the place of the expectation of a call.

    Args:
        path: of the test file.
        line: at which the call stood when the file was imported.
        actual: the text.
    """
    here = line + sum(longer for at, longer in _moved[path] if at < line)
    source = path.read_text(encoding="utf-8")
    (literal,) = (
        call.args[1]
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "assert_expected"
        and call.lineno <= here <= (call.end_lineno or call.lineno)
    )
    assert isinstance(literal, ast.Constant)
    assert literal.end_lineno is not None
    lines = source.split("\n")
    before = lines[literal.lineno - 1].encode()[: literal.col_offset].decode()
    after = lines[literal.end_lineno - 1].encode()[literal.end_col_offset :].decode()
    indentation = " " * (len(before) - len(before.lstrip()))
    text = textwrap.indent(actual, indentation + "    ", lambda part: bool(part.strip()))
    assert '"""' not in text
    assert "\\" not in text
    new = f'{before}"""\n{text}\n{indentation}"""{after}'.split("\n")
    lines[literal.lineno - 1 : literal.end_lineno] = new
    path.write_text("\n".join(lines), encoding="utf-8")
    longer = len(new) - (literal.end_lineno - literal.lineno + 1)
    _moved[path].append((line, longer))
