"""What the log says of a compiled graph: one line at the first compilation, a warning where nothing folded.

Dynamo compiles a model again for other sizes, and in pieces where a graph breaks. The line comes once for a module and
each piece of its code; later compilations are logged as debugging. A warning comes once for a source function and a
reason, whichever module runs it: layers that each begin a graph of their own are one case.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections import Counter
from types import CodeType
from typing import Any

from torch import nn

from lncompile.lowering import torch_private_breaks, torch_private_dynamo
from lncompile.passes.decisions import Reason
from lncompile.reporting.report import FoldReport

log = logging.getLogger("lncompile")

_lock = threading.Lock()
_lines_of_functions: set[object] = set()
_lines_of_modules: weakref.WeakKeyDictionary[nn.Module, set[object]] = weakref.WeakKeyDictionary()
_warnings: set[object] = set()
#: Code of which some graph has folded something: the rest of it is not a reason for a warning.
_folding: set[object] = set()


def say(report: FoldReport, frame: torch_private_dynamo.Frame | None) -> None:
    """Log what became of one graph.

    Nothing is logged of a graph without LayerNorms.

    Args:
        report: of the graph.
        frame: what Dynamo is compiling; None where the backend was called by hand.
    """
    if not report.sites:
        return
    code = _source(frame)
    with _lock:
        level = _level(report, code, frame)
    log.log(level, "%s", _line(report, code))
    log.debug("fold report\n%s", report)


def tell_again() -> None:
    """Forget what was said, as ``torch._dynamo.reset()`` forgets what was compiled."""
    with _lock:
        for said in (_lines_of_functions, _lines_of_modules, _warnings, _folding):
            said.clear()


def _level(report: FoldReport, code: object, frame: torch_private_dynamo.Frame | None) -> int:
    # Not the code itself: Dynamo keeps with it what it compiled, and would keep it for ever.
    receiver, piece = (None, None) if frame is None else (frame.receiver, (_place(frame.code), code))
    said = _lines_of_modules.setdefault(receiver, set()) if isinstance(receiver, nn.Module) else _lines_of_functions
    is_first = piece not in said
    said.add(piece)
    if report.folded:
        _folding.add(code)
    elif code not in _folding and (code, (reason := _main(report)[0])) not in _warnings:
        _warnings.add((code, reason))
        # That stock won a race is what the race was for.
        return logging.INFO if reason is Reason.MEASURED else logging.WARNING
    return logging.INFO if is_first else logging.DEBUG


def _place(code: CodeType) -> tuple[str, int, str]:
    return code.co_filename, code.co_firstlineno, code.co_name


def _source(frame: torch_private_dynamo.Frame | None) -> tuple[str, int] | None:
    """What stays the same where Dynamo goes on in code of its own behind a graph break."""
    if frame is None:
        return None
    code = torch_private_breaks.original_code(frame.code)
    return code.co_filename, code.co_firstlineno


def _main(report: FoldReport) -> tuple[Any, Any]:
    """The reason for most sites that stay, and what to do about it."""
    return Counter((site.reason, site.remedy) for site in report.sites if not site.folded).most_common(1)[0][0]


def _line(report: FoldReport, code: tuple[str, int] | None) -> str:
    """One line: advice first, then what folded, and where nothing did, why and what to do."""
    place = "" if code is None else f"{code[0].rsplit('/', 1)[-1]}:{code[1]}: "
    words = [report.headline(), report.summary()]
    if not report.folded and not words[0]:
        reason, remedy = _main(report)
        detail = next(site.detail for site in report.sites if site.reason is reason)
        words.append(f"{reason.value}: {detail}. To let them fold: {remedy}.")
    return place + " ".join(word for word in words if word)
