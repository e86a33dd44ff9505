"""Words of the host's memory at listed addresses, compared with what they were in one go, by a small function in C.

It is called before each call of a model, when the model's own work has pushed everything out of the cache. So what
costs time is waiting for memory: each number is asked for well before it is read, so that many are under way at once.
NumPy's gather does that too, but what surrounds it in Python waits for one thing after the other.

The words stand in groups, and those of one group say that the memory of the next one's is still there (a tensor says
which storage it has, a storage where its elements are). The caller's thread holds the interpreter's lock all the time,
so no other thread frees what is read.

    items: tensors of the call ──► are they these? ──► group 1 ──► group 2 ──► ...

The function is compiled when it is first asked for, with the C++ compiler that Inductor uses on a CPU, and kept in
Inductor's cache folder. Where there is no compiler callers read words with NumPy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.machinery
import importlib.util
import itertools
import logging
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lncompile.lowering import torch_private_compiler

log = logging.getLogger("lncompile")

_SOURCE = r"""
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

typedef struct { const volatile uint32_t *address; uint32_t mask; uint32_t expected; } Word;
typedef struct {
    const void *const *items; const int64_t *places; int64_t count;  /* which objects, and where the tuple has them */
    int64_t length;                                                  /* of the tuple */
    const Word *words; const int64_t *ends; int64_t groups;
} Expected;

enum { AHEAD = 32 };  /* how many words are under way at once; a core can wait for 10 to 50 */

static int64_t difference(PyObject *tuple, const Expected *expected) {
    if (PyTuple_GET_SIZE(tuple) != expected->length) return -1;
    for (int64_t i = 0; i < expected->count; i++)
        if ((const void *)PyTuple_GET_ITEM(tuple, expected->places[i]) != expected->items[i]) return -1;
    const Word *words = expected->words;
    int64_t begin = 0;
    for (int64_t group = 0; group < expected->groups; group++) {
        int64_t end = expected->ends[group];
        for (int64_t i = begin; i < end && i < begin + AHEAD; i++) __builtin_prefetch((const void *)words[i].address);
        for (int64_t i = begin; i < end; i++) {
            if (i + AHEAD < end) __builtin_prefetch((const void *)words[i + AHEAD].address);
            if ((*words[i].address & words[i].mask) != words[i].expected) return group + 1;
        }
        begin = end;
    }
    return 0;
}

static PyObject *difference_of(PyObject *self, PyObject *tuple) {
    const Expected *expected = (const Expected *)PyLong_AsVoidPtr(self);
    if (expected == NULL) return NULL;
    if (!PyTuple_CheckExact(tuple)) {
        PyErr_SetString(PyExc_TypeError, "a tuple is compared");
        return NULL;
    }
    return PyLong_FromLongLong(difference(tuple, expected));
}

static PyMethodDef difference_method = {"difference", difference_of, METH_O, "0 where all is as expected."};

static PyObject *bind(PyObject *module, PyObject *address) {
    (void)module;
    if (!PyLong_Check(address)) {
        PyErr_SetString(PyExc_TypeError, "an address is a number");
        return NULL;
    }
    return PyCFunction_NewEx(&difference_method, address, NULL);
}

static PyMethodDef methods[] = {
    {"bind", bind, METH_O, "The function for what is expected at an address."}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "host_words", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit_host_words(void) { return PyModule_Create(&module); }
"""

#: Which interpreter a library is for.
_INTERPRETER = str(sysconfig.get_config_var("EXT_SUFFIX"))

_WORD = np.dtype([("address", np.uint64), ("mask", np.uint32), ("expected", np.uint32)])


class _Expected(ctypes.Structure):
    _fields_ = (
        ("items", ctypes.c_void_p),
        ("places", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("words", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
    )


class HostWords:
    """The words of some objects as they were when this was made.

    Args:
        items: the objects, alive whenever this is asked.
        groups: for each group the addresses of its 4-byte words, aligned, and the bits of each that count. While the
            words of a group are what they were, the memory of the next group's is there.

    Raises:
        NotImplementedError: where :func:`can_compare` says no.

    Example:
        >>> words = HostWords((weight,), [[(weight.data_ptr(), 0xFFFFFFFF)]])
        >>> words.are_same((weight,))
        True
    """

    def __init__(self, items: tuple[Any, ...], groups: Sequence[Sequence[tuple[int, int]]]) -> None:
        if not can_compare():
            raise NotImplementedError("words cannot be compared in C here")
        self._items = np.array([id(item) for item in items], dtype=np.uint64)
        self._words = np.zeros(sum(map(len, groups)), dtype=_WORD)
        self._words["address"] = [address for group in groups for address, _ in group]
        self._words["mask"] = [mask for group in groups for _, mask in group]
        self._ends = np.array(list(itertools.accumulate(map(len, groups))), dtype=np.int64)
        self._whole = Look(self, range(len(items)), len(items))
        self.record()

    def record(self) -> None:
        """Take the words as they are now for what is expected."""
        addresses, masks = self._words["address"].tolist(), self._words["mask"].tolist()
        read = ctypes.c_uint32.from_address
        self._words["expected"] = [read(address).value & mask for address, mask in zip(addresses, masks, strict=True)]

    def are_same(self, items: tuple[Any, ...]) -> bool:
        """Whether these are the same objects and every word is what it was."""
        return not self._whole.difference(items)

    def end(self) -> None:
        """Never be the same again, wherever it is asked."""
        self._items[:] = 0


class Look:
    """The same question of a longer tuple, which holds the objects at some places.

    Args:
        words: what is expected.
        places: of each object.
        length: of the tuple.

    Attributes:
        difference: the function in C: of a tuple, 0 where the objects are at their places in it and every word is what
            it was.
    """

    __slots__ = ("_expected", "_held", "difference")

    def __init__(self, words: HostWords, places: Sequence[int], length: int) -> None:
        items, known, ends = words._items, words._words, words._ends
        at = np.array(places, dtype=np.int64)
        # All are held: what is expected names their memory.
        self._held = items, at, known, ends
        self._expected = _Expected(
            items.ctypes.data, at.ctypes.data, len(items), length, known.ctypes.data, ends.ctypes.data, len(ends)
        )
        bind = _comparison()
        assert bind is not None  # or there were no words
        self.difference: Callable[[tuple[Any, ...]], int] = bind(ctypes.addressof(self._expected))


def can_compare() -> bool:
    """Whether words can be compared in C here: there is a compiler, and an interpreter whose lock keeps memory."""
    return _comparison() is not None


@functools.cache
def _comparison() -> Callable[[int], Callable[[tuple[Any, ...]], int]] | None:
    """Makes the function in C for what is expected at an address; None where there is none."""
    gil: Any = getattr(sys, "_is_gil_enabled", lambda: True)
    if (
        sys.implementation.name != "cpython"
        or sys.byteorder != "little"
        or not gil()
        or np.dtype(np.intp).itemsize != 8
    ):
        return None
    try:
        loader = importlib.machinery.ExtensionFileLoader("host_words", str(_library()))
        specification = importlib.util.spec_from_file_location("host_words", loader.path, loader=loader)
        assert specification is not None
        module = importlib.util.module_from_spec(specification)
        loader.exec_module(module)
        bind: Callable[[int], Callable[[tuple[Any, ...]], int]] = module.bind
    except Exception as error:  # Inductor has exceptions of its own for a compiler that is not there
        log.debug("weights are looked at by NumPy, because no function in C can be compiled: %s", error)
        return None
    return bind


class CompiledComparison(NamedTuple):
    """The compiled function, for another process.

    Attributes:
        interpreter: for which it was compiled.
        library: the shared library.
    """

    interpreter: str
    library: bytes


def compiled_comparison() -> CompiledComparison | None:
    """The compiled function, for a process that loads what this one has compiled; None if there is none."""
    return CompiledComparison(_INTERPRETER, _library().read_bytes()) if can_compare() else None


def keep_comparison(compiled: CompiledComparison) -> None:
    """Put the function that another process has compiled into the cache, which spares a compiler's run.

    Args:
        compiled: what :func:`compiled_comparison` returned there, for this release of lncompile.
    """
    if compiled.interpreter != _INTERPRETER:
        return
    try:
        library = _place()
        if not library.is_file():
            _make(library, lambda made: made.write_bytes(compiled.library))
    except Exception as error:  # no compiler, no room: what asks for the function says what becomes of that
        log.debug("the function in C that another process has compiled is not kept: %s", error)


def _place() -> Path:
    """Where the compiled function is kept: another compiler, machine, Python or source has a place of its own."""
    compiler = torch_private_compiler.cpp_compiler()
    made_of = "\n".join((compiler, os.uname().machine, _INTERPRETER, _SOURCE))
    digest = hashlib.sha256(made_of.encode()).hexdigest()[:16]
    return Path(torch_private_compiler.inductor_cache_folder()) / "lncompile" / f"host_words_{digest}.so"


def _library() -> Path:
    """The compiled function, from the cache or from the compiler."""
    library = _place()
    if not library.is_file():
        _make(library, _compile)
    return library


def _make(library: Path, make: Callable[[Path], object]) -> None:
    """Make a file in one go: several processes may be here at once."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch, library.name)
        make(made)
        made.replace(library)


def _compile(made: Path) -> None:
    source = made.with_suffix(".cpp")
    source.write_text(_SOURCE)
    includes = [f"-I{sysconfig.get_path(kind)}" for kind in ("include", "platinclude")]
    compiler = torch_private_compiler.cpp_compiler()
    command = [compiler, "-O2", "-shared", "-fPIC", *includes, "-o", str(made), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
