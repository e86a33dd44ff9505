"""Even terms for programs that are compared in one process: a difference is theirs, not one of order or of place.

Four things make equal programs differ:

* *One list of compiled code.* All that is compiled from one code object stands in one list, which each call searches
  from its front. So each program gets code of its own (:func:`compile_apart`).
* *Memory in pieces.* What is compiled first is put into the holes that importing and tracing leave in memory. What
  follows lies close together. A call between calls of others finds its guards and code out of the cache, and the first
  program has more cache lines to fetch: of four equal programs that take 110 µs, the first took 2.0, 2.4 and 4.1%
  longer than the others in three processes. Small modules that are compiled first, and kept, fill the holes
  (:func:`settle`): then it was -0.04, 0.2 and 0.4%.
* *Memory that is given back.* Whether a call's temporary tensors are given back to the system, and paid for again page
  by page at the next call, depends on where they happen to lie. So freed memory is kept (:mod:`.freed_memory`).
* *Caches.* A graph that AOTAutograd's cache knows is called through one function more than one that is compiled. So
  what is compared is compiled without that cache (``without_autograd_cache``). Inductor's own is used.

What is left differs from process to process, in either direction, by some tenths of a percent: an interval that is to
hold for another process needs several processes (:mod:`lncompile.comparisons.processes`).
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lncompile.comparisons.freed_memory import keep_freed_memory
from lncompile.lowering import torch_private_caches

log = logging.getLogger("lncompile")

#: How many small modules are compiled. Two leave the first program 1 to 3% behind, eight 0.4% at most.
SMALL_MODULES = 8


def settle(device: torch.device | str = "cpu") -> None:
    """Compile small modules and keep them, once in a process, before programs that are to be compared are compiled.

    Memory that is freed stays with the process from then on (:mod:`lncompile.comparisons.freed_memory`).
    It takes a tenth of a second a module, beside what the first compilation of a process takes in any case. Where the
    small module cannot be compiled, a log line says so: programs are then compared as they are.

    Args:
        device: what the programs run on.

    Example:
        >>> settle()
        >>> baseline, candidate = compile_apart(model, backend="inductor"), compile_apart(model, backend="lnfold")
    """
    keep_freed_memory()
    _small_programs(torch.device(device).type)
    gc.collect()


def begin_anew() -> None:
    """Settle again when it is next asked for: ``torch.compiler.reset()`` forgot what was compiled."""
    _small_programs.cache_clear()


@functools.cache
def _small_programs(device: str) -> tuple[Callable[..., Any], ...]:
    programs: tuple[Callable[..., Any], ...] = ()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # what is drawn here is not the caller's
            model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).eval().to(device)
            value = torch.zeros(8, 8, device=device)
            programs = tuple(compile_apart(model, backend="inductor") for _ in range(SMALL_MODULES))
            for program in programs:
                program(value)
    except Exception as error:
        log.warning(
            "programs are compared without settling the process first, because a small module cannot be compiled: "
            "%s: %s",
            type(error).__name__,
            error,
        )
    return programs


def compile_apart(model: Callable[..., Any], *, backend: Any, **arguments: Any) -> Callable[..., Any]:
    """Compile a model so that a call of it looks at no code but its own, whatever else is compiled of the model.

    It is a twin of the model that is compiled, with the same weights and submodules, whose ``forward`` has code of its
    own. Where torch can, what is compiled behind graph breaks, in submodules that both share, is kept apart as well.
    That alone is not enough: such a program still finds what was compiled without it.

    Args:
        model: a module or function. Parameters, buffers and submodules are shared, not copied. Any other attribute
            that ``forward`` assigns to the module itself stays in the twin.
        backend: as for ``torch.compile``.
        arguments: likewise.

    Returns:
        What ``torch.compile`` returns.

    Example:
        >>> baseline = compile_apart(model, backend="inductor", mode="reduce-overhead")
    """
    twin = torch_private_caches.with_code_of_its_own(model)
    apart = torch_private_caches.separate_caches()
    with torch_private_caches.without_precompilation():
        compiled: Callable[..., Any] = torch.compile(twin, backend=backend, **apart, **arguments)
    return compiled
