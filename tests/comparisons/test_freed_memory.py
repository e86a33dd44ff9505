"""Comparisons keep what is freed: glibc's trimming is a lottery between equal programs."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from lncompile.comparisons import freed_memory
from lncompile.comparisons.machine import describe_machine

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")

#: Faults of a program that fills 8 MiB at the end of the heap and frees it, again and again.
PROGRAM = """
import ctypes, resource, sys
from lncompile.comparisons.freed_memory import keep_freed_memory

c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
if sys.argv[1] == "keep":
    print(keep_freed_memory())
for _ in range(51):
    memory = c.malloc(8 << 20)
    c.memset(memory, 1, 8 << 20)
    c.free(memory)
    if _ == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def output_of(how: str, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in freed_memory.VARIABLES}
    command = [sys.executable, "-c", PROGRAM, how]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return done.stdout.split()


@needs_glibc
def test_a_second_call_pays_no_page_faults() -> None:
    kept, faults = output_of("keep")
    assert kept == "True"
    assert int(faults) < 100
    # The control: without it each call pays for every page, at least where glibc does not adapt to what was freed.
    (paid,) = output_of("", MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert int(paid) > 50 * 100


@needs_glibc
def test_the_environment_decides() -> None:
    kept, paid = output_of("keep", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert int(paid) >= 0


def test_it_stands_in_the_description_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in freed_memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: None)
    assert describe_machine()["memory"]["freed"] == "as the C library does"
    assert not freed_memory.keep_freed_memory()
    monkeypatch.setattr(freed_memory, "_mallopt", lambda: lambda what, value: 1)
    assert describe_machine()["memory"]["freed"] == "up to 1 GiB is kept"
    assert freed_memory.keep_freed_memory()
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.tcache_count=0")
    assert describe_machine()["memory"]["freed"] == "as GLIBC_TUNABLES says"
    assert not freed_memory.keep_freed_memory()
