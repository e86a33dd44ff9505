"""Ctrl-C while modules are being imported.

An exception that comes up anywhere in an import is printed as whatever the module in question makes of it, and modules
in C do not expect one. So the process ends there and then: nothing was begun that would have to be put in order.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

#: What a shell says of a command that was interrupted; 1 would be an answer.
INTERRUPTED = 130


def leave_at_once() -> None:
    """Have Ctrl-C end the process from now on, without a word, until :func:`importing` is through."""
    if threading.current_thread() is threading.main_thread():  # only there Python lets one say so
        signal.signal(signal.SIGINT, _leave)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Context for the imports of a command: Ctrl-C inside ends the process, behind it Ctrl-C raises KeyboardInterrupt.

    Example:
        >>> with importing():
        ...     import torch
    """
    before = signal.getsignal(signal.SIGINT)
    leave_at_once()
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler if before in (_leave, None) else before)


def _leave(*_: object) -> None:
    os._exit(INTERRUPTED)
