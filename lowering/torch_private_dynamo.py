"""Dynamo seen from outside, and what it is compiling just now: the private names of torch for that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch._dynamo
import torch.fx.experimental.symbolic_shapes


def innermost_function(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function without the wrapper that keeps Dynamo away from it.

    Dynamo unwraps what a backend returns, and wraps it once. A wrapper inside of a function of ours would stay, and
    cost each call some microseconds that stock does not pay.
    """
    from torch._dynamo.eval_frame import innermost_fn

    innermost: Callable[..., Any] = innermost_fn(compiled)
    return innermost


def innermost_backend(compiled: Any) -> Any:
    """Return the object torch.compile made for (backend, mode, options) of a compiled callable, or None."""
    from torch._dynamo.eval_frame import innermost_backend as innermost

    callback = getattr(compiled, "dynamo_ctx", compiled)
    callback = getattr(callback, "callback", None) or getattr(compiled, "_torchdynamo_orig_backend", None)
    return None if callback is None else innermost(callback)


def original_callable(compiled: Any) -> Any:
    """Return what a torch.compile'd module or function was compiled from; anything else as it is."""
    if isinstance(compiled, torch.nn.Module) and hasattr(compiled, "_orig_mod"):
        return compiled._orig_mod
    return getattr(compiled, "_torchdynamo_orig_callable", compiled)


def is_compiled(function: Any) -> bool:
    """Whether calling this runs compiled code: what torch.compile returned, or a module after ``module.compile()``."""
    return original_callable(function) is not function or getattr(function, "_compiled_call_impl", None) is not None


def many_recompiles() -> Any:
    """Context in which Dynamo compiles one code object as often as it must (explaining many models of one class)."""
    return torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=100_000)


class CompilationWatch:
    """Says whether anything was compiled in this process while something else ran.

    Dynamo calls back when the first of some overlapping compilations starts and when the last one ends; recording CUDA
    graphs and compiling a backward graph on its first use count as such.
    """

    def __init__(self) -> None:
        self._ticks = 0

    def ticks(self) -> int:
        """A number that goes up when compilations start and when they end: odd while there are any."""
        handler = torch._dynamo.callback.callback_handler
        # torch._dynamo.reset() forgets all callbacks.
        if self._started not in handler.start_callbacks:
            handler.register_start_callback(self._started)
            handler.register_end_callback(self._ended)
        return self._ticks

    def undisturbed(self, since: int) -> bool:
        """Whether nothing was compiled from the moment that ``ticks`` returned ``since`` until now."""
        return since % 2 == 0 and self._ticks == since

    def _started(self, _: Any = None) -> None:
        self._ticks += 1 + self._ticks % 2

    def _ended(self, _: Any = None) -> None:
        # Even where we were registered in the middle of one.
        self._ticks += 2 - self._ticks % 2


compilation_watch = CompilationWatch()


def count(key: str, amount: int = 1) -> None:
    """Add to ``torch._dynamo.utils.counters["lnfold"][key]``."""
    from torch._dynamo.utils import counters

    counters["lnfold"][key] += amount


def trace_artifact(name: str, payload: Callable[[], str]) -> None:
    """Write a JSON artifact into torch's structured trace, where tlparse shows it beside the graph."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "json"}, payload_fn=payload)


# Base class of what Dynamo raises to itself (start again with other assumptions, give this frame up, ...).
DynamoException: type[Exception] = torch._dynamo.exc.TorchDynamoException

# What Dynamo raises where it may not break a graph, and has to.
CAPTURE_ERRORS: tuple[type[Exception], ...] = (
    DynamoException,
    torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
)


def code_being_compiled() -> Any:
    """Return the code object whose frame Dynamo is compiling; None outside of Dynamo (a backend called by hand)."""
    root = _root_being_compiled()
    return None if root is None else root.f_code


def _root_being_compiled() -> Any:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return None


class Frame(NamedTuple):
    """A frame that Dynamo is compiling.

    Attributes:
        code: its code object.
        receiver: its first argument: the module, in the frame of a module's forward.
    """

    code: Any
    receiver: Any


def frame_being_compiled() -> Frame | None:
    """Return the frame that Dynamo is compiling; None outside of Dynamo."""
    root = _root_being_compiled()
    if root is None:
        return None
    code, values = root.f_code, root.f_locals
    if code.co_argcount:
        return Frame(code, values.get(code.co_varnames[0]))
    rest = values.get("args")  # a decorator's wrapper(*args, **kwargs)
    return Frame(code, rest[0] if isinstance(rest, tuple) and rest else None)


def scope_being_compiled() -> dict[str, Any]:
    """Return what the names in Dynamo's source expressions mean: ``L`` and ``G`` of the frame that is being compiled.

    Empty outside of Dynamo.
    """
    root = _root_being_compiled()
    return {} if root is None else {"L": root.f_locals, "G": root.f_globals}


def codes_of_call(module: torch.nn.Module) -> set[Any]:
    """Return the code objects whose frames are whole calls of a module: its forward's, and torch's around it."""
    codes: set[Any] = {torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__}
    function: Any = module.forward
    while function is not None:
        function = getattr(function, "__func__", getattr(function, "func", function))
        codes.add(getattr(function, "__code__", None))
        function = getattr(function, "__wrapped__", None)
    return codes - {None}
