"""Memory that a call frees stays with the process, so that the next call finds it.

glibc gives what is free at the end of the heap back to the system as soon as it is more than a threshold (128 KiB at
first), and asks for it again at the next call, which pays a page fault for every 4 KiB. Whether a program's temporary
tensors lie at the end of the heap is decided by what happened to be allocated behind them: under
torch's profiler the matrix products of a narrow encoder took 0.44 ms a call for some programs and 1.2 ms for others of
the same process, stock's and lnfold's alike, and 0.42 to 0.54 ms for all once freed memory was kept (tried by hand).

So comparisons keep freed memory. Production may do the same: ``MALLOC_TRIM_THRESHOLD_=1073741824`` and
``MALLOC_MMAP_THRESHOLD_=33554432`` in the environment, or another allocator (jemalloc, tcmalloc).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

#: mallopt's numbers for the two thresholds (malloc.h), and glibc's largest one for memory that is mapped by itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEPT, MAPPED = 1 << 30, 32 << 20
#: Who sets one of these has decided.
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Have glibc keep up to 1 GiB of freed memory, for the rest of the process.

    Returns:
        Whether it does now. It does not where the environment has a say in it, or the C library is another one.
    """
    mallopt = None if _decided_by() else _mallopt()
    # Setting one of them ends that glibc adapts the other to what is freed.
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, MAPPED) and mallopt(_M_TRIM_THRESHOLD, KEPT))


def in_words() -> str:
    """Say what becomes of freed memory in comparisons.

    Example:
        >>> in_words()
        'up to 1 GiB is kept'
    """
    decided = _decided_by()
    if decided:
        return f"as {decided} says"
    return "up to 1 GiB is kept" if _mallopt() is not None else "as the C library does"


def _decided_by() -> str | None:
    return next((name for name in VARIABLES if os.environ.get(name)), None)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function, where the C library is glibc."""
    try:
        function: Callable[[int, int], int] = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # it has no such function, or is no file of its own
        return None
    return function


__all__ = ["KEPT", "MAPPED", "VARIABLES", "in_words", "keep_freed_memory"]
