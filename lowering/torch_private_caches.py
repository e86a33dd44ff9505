"""Where Dynamo and AOTAutograd keep what they compiled, for programs that are to be compared on even terms.

A part of :mod:`.torch_private`, which says what its modules are for.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch

from lncompile.lowering.torch_private_dynamo import original_callable


def separate_caches() -> dict[str, Any]:
    """Arguments for torch.compile that give what it compiles a list and a recompile limit of its own.

    Compiled twice, a function's code is kept in one list, and both count towards one limit. A program with a list of
    its own still finds what is in the common one. Before torch 2.13 there is no such argument.
    """
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


def entries_searched_by(compiled: Any) -> list[Any]:
    """What Dynamo has compiled for the code object, and within it the list, that a call of a compiled module searches.

    For tests: it reaches the code of a module's ``forward`` alone.
    """
    from torch._dynamo import eval_frame

    original = original_callable(compiled)
    code = getattr(original.forward, "__func__", original.forward).__code__
    apart = getattr(eval_frame, "_get_cache_entries_for_region", None)
    if apart is not None:
        return list(apart(code, compiled.dynamo_ctx._isolate_recompiles_id))
    return list(eval_frame._debug_get_cache_entry_list(code))


def with_code_of_its_own(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a twin of a model, with the same weights, or of a function, whose code object is its own.

    Dynamo keeps what it compiled at the code object of the frame. A module's submodules keep theirs: it is the frames
    behind a graph break inside of them that are shared.
    """
    if isinstance(model, torch.nn.Module):
        twin = copy.copy(model)
        forward: Any = model.forward
        is_own = isinstance(forward, types.MethodType) and forward.__self__ is model
        if is_own and isinstance(forward.__func__, types.FunctionType):
            object.__setattr__(twin, "forward", types.MethodType(_with_own_code(forward.__func__), twin))
        return twin
    if isinstance(model, functools.partial) and isinstance(model.func, types.FunctionType):
        return functools.partial(_with_own_code(model.func), *model.args, **model.keywords)
    return _with_own_code(model) if isinstance(model, types.FunctionType) else model


def _with_own_code(function: types.FunctionType) -> types.FunctionType:
    twin = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    twin.__annotations__, twin.__qualname__ = function.__annotations__, function.__qualname__
    twin.__module__ = function.__module__
    twin.__dict__.update(function.__dict__)
    return twin


def without_autograd_cache() -> Any:
    """Context in which AOTAutograd compiles anew: what its cache finds is called through one function more."""
    from torch._functorch import config

    return config.patch(enable_autograd_cache=False)


def without_precompilation() -> Any:
    """Context in which what torch.compile makes neither loads code that another process saved nor saves its own.

    Such code is found by the source of the function alone, and called whichever program was loaded (torch 2.13).
    """
    return torch._dynamo.config.patch(caching_precompile=False)
