"""A folder of graphs: each graph of a model after every pass that changed it, and an index of the passes.

What stands in it after ``lncompile explain MODEL --graphs DIR``::

    DIR/index.txt                  which pass changed what, and how long it took
    DIR/graph-1/00-captured.py     the graph as Dynamo captured it
    DIR/graph-1/09-place.txt       what placement decided, and on what
    DIR/graph-1/15-center.py       the graph after pass 15
    DIR/graph-2/...                the graph behind a graph break
"""

from __future__ import annotations

import difflib
from pathlib import Path

from lncompile.passes.pipeline.runner import Step

_HEADER = "Graphs written by lncompile, after each pass that changed them."


class GraphDirectory:
    """Writes graphs and decisions into a folder, as the pipeline goes on.

    Args:
        path: the folder. It is made where there is none; what an earlier run has written there is taken away.

    Raises:
        ValueError: where something else is in the folder.

    Example:
        >>> with watched_by(GraphDirectory(Path("graphs"))):
        ...     lncompile.explain(model, input_ids)
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = path / "index.txt"
        self._graphs = 0
        self._code = ""
        self._number = 0
        _clear(path)
        path.mkdir(parents=True, exist_ok=True)
        self._index.write_text(f"{_HEADER}\n", encoding="utf-8")

    def begin(self, code: str, again: bool) -> None:
        """Write the graph as it was captured."""
        if again:
            self._say("the passes that decide run again, with fewer operators written out")
        else:
            self._graphs += 1
            self._number = 0
            (self._path / f"graph-{self._graphs}").mkdir(exist_ok=True)
            self._say("", f"graph-{self._graphs}", f"{'file':<24}{'pass':<16}{'kind':<10}{'ms':>8}  what it did")
            self._write("00-captured.py", code)
            self._say(f"{'00-captured.py':<24}")
        self._code = code

    def after(self, step: Step) -> None:
        """Write what a pass has done, if it changed the graph or says something."""
        name, did = "", "switched off" if step.is_off else ""
        if step.code is not None:
            name, did = f"{step.number:02}-{step.name}.py", _difference(self._code, step.code)
            self._write(name, step.code)
            self._code = step.code
        elif step.text:
            name = f"{step.number:02}-{step.name}.txt"
            self._write(name, f"{step.text}\n")
        words = f"{step.description}{f' ({did})' if did else ''}"
        self._say(f"{name:<24}{step.name:<16}{step.kind.value:<10}{1e3 * step.seconds:>8.2f}  {words}")

    def _write(self, name: str, text: str) -> None:
        (self._path / f"graph-{self._graphs}" / name).write_text(text, encoding="utf-8")

    def _say(self, *lines: str) -> None:
        with self._index.open("a", encoding="utf-8") as file:
            file.writelines(f"{line.rstrip()}\n" for line in lines)


def _difference(before: str, after: str) -> str:
    """How many lines came and went: ``+3 -1 lines``."""
    changes = [line[0] for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-"]
    return f"+{changes.count('+')} -{changes.count('-')} lines"


def _clear(path: Path) -> None:
    """Take away what an earlier run has written into a folder."""
    if not path.exists() or not any(path.iterdir()):
        return
    index = path / "index.txt"
    if not index.is_file() or not index.read_text(encoding="utf-8").startswith(_HEADER):
        raise ValueError(f"'{path}' is not empty, and what is in it was not written by --graphs")
    for folder in path.glob("graph-*"):
        for pattern in ("[0-9][0-9]-*.py", "[0-9][0-9]-*.txt"):
            for file in folder.glob(pattern):
                file.unlink()
    index.unlink()
