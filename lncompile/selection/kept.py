"""Results of races, kept on disk: the next process compiles the winner alone.

Each result is a file of its own, named by what the race depends on (:mod:`.identity`), in a folder beside Inductor's
caches, or the one that ``LNCOMPILE_SELECTION_DIR`` names. A file is written under another name and then takes its place
in one step, so that several processes may race at a time and none reads half a file. One that cannot be read is
ignored, with a line in the log. Several results in one file are what ``lncompile tune --output`` writes, to be shipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

from lncompile.lowering import torch_private_compiler
from lncompile.reporting.selection import Selection, from_dict, to_dict

#: The folder of the results of races.
FOLDER_VARIABLE = "LNCOMPILE_SELECTION_DIR"
#: A file of several results, which is asked before the folder.
FILE_VARIABLE = "LNCOMPILE_SELECTION_FILE"
#: Counted up when what is written changes in its form.
FORMAT = 1

log = logging.getLogger("lncompile")
_ANEW: ContextVar[dict[str, Selection] | None] = ContextVar("lncompile_races_anew", default=None)


def folder() -> Path:
    """Return the folder of the results of races."""
    named = os.environ.get(FOLDER_VARIABLE)
    return Path(named) if named else Path(torch_private_compiler.inductor_cache_folder(), "lncompile-selection")


def look_up(key: str, file: str | None = None) -> Selection | None:
    """Return the result of an earlier race; None where there is none, or what there is cannot be read.

    Args:
        key: what the race depends on.
        file: a file of several results that is asked first; by default the one that the environment names.
    """
    if _ANEW.get() is not None:
        return None
    shipped = file or os.environ.get(FILE_VARIABLE)
    if shipped:
        try:
            found = read_file(Path(shipped)).get(key)
            if found is not None:
                return dataclasses.replace(found, source=shipped)
        except (OSError, ValueError) as error:
            log.warning("the results of races in '%s' are ignored: %s", shipped, error)
    path = folder() / f"{key}.json"
    try:
        found = _read(path).get(key)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the result of a race in '%s' is ignored: %s", path, error)
        return None
    return None if found is None else dataclasses.replace(found, source=str(path))


def keep(key: str, selection: Selection) -> None:
    """Keep the result of a race; where that is not possible, a line in the log says why.

    Args:
        key: what the race depends on.
        selection: the result.
    """
    made = _ANEW.get()
    if made is not None:
        made[key] = selection
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_file(folder() / f"{key}.json", {key: selection})
    except OSError as error:
        log.warning("the result of a race is not kept: %s", error)


@contextlib.contextmanager
def raced_anew() -> Iterator[dict[str, Selection]]:
    """Context in which every graph is raced, whatever was kept of earlier races.

    Yields:
        The results of its races, by what each depends on.
    """
    made: dict[str, Selection] = {}
    token = _ANEW.set(made)
    try:
        yield made
    finally:
        _ANEW.reset(token)


def read_file(path: Path) -> dict[str, Selection]:
    """Read a file of results.

    Args:
        path: the file.

    Raises:
        OSError: if it cannot be opened.
        ValueError: if it holds something else.
    """
    return _read(path)


def write_file(path: Path, selections: Mapping[str, Selection]) -> None:
    """Write a file of results, in one step.

    Args:
        path: the file.
        selections: the results, by what each depends on.

    Raises:
        OSError: if it cannot be written.
    """
    data = {"format": FORMAT, "selections": {key: to_dict(selection) for key, selection in selections.items()}}
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=2)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """What a file that is opened the usual way may not be: a temporary one is for its owner alone."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _read(path: Path) -> dict[str, Selection]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("selections"), dict):
        raise ValueError(f"it does not hold results of races of format {FORMAT}")
    return {str(key): from_dict(value) for key, value in data["selections"].items()}
