"""The two arms of a test: what they call, whether they are in service, and what went wrong."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lncompile.comparisons.even_terms import settle
from lncompile.lowering import torch_private_caches, torch_private_dynamo
from lncompile.options import PREFIX, parse_options


@dataclass
class Arm:
    """One way to answer requests.

    Attributes:
        name: what reports call it.
        function: what answers.
        index: 0 for the baseline, 1 for the candidate.
        requests: how many it has answered, comparisons not counted.
        failures: how often it raised where the other arm did not.
        forgiven: how many of these were before it was last restored.
        out_of_service: why it answers no more, in words; None while it does.
        failed: whether it is out of service because it raised (and not by hand).
    """

    name: str
    function: Callable[..., Any]
    index: int
    requests: int = 0
    failures: int = 0
    forgiven: int = 0
    out_of_service: str | None = None
    failed: bool = False

    @property
    def in_service(self) -> bool:
        """Whether it answers requests."""
        return self.out_of_service is None

    def to_dict(self) -> dict[str, Any]:
        """Return its counts and state, ready for JSON."""
        return {
            "name": self.name,
            "requests": self.requests,
            "failures": self.failures,
            "in_service": self.in_service,
            "out_of_service": self.out_of_service,
        }


def make_arms(arms: Mapping[str, Callable[..., Any]]) -> tuple[Arm, Arm]:
    """Number two named callables: the first is the baseline, the second the candidate.

    Raises:
        ValueError: unless there are two, both plain callables.
    """
    if len(arms) != 2:
        raise ValueError(f"a test has two arms, a baseline and a candidate, not {len(arms)}")
    for name, function in arms.items():
        if not callable(function):
            raise ValueError(f"arm '{name}' is not callable (its type is {type(function).__name__})")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None)):  # noqa: B004
            raise ValueError(
                f"arm '{name}' is a coroutine function, whose call does no work yet: pass a plain function, "
                "and await ABTest.acall"
            )
    first, second = arms.items()
    return Arm(*first, 0), Arm(*second, 1)


def compiled_arms(
    model: Callable[..., Any], mode: str | None, options: Mapping[str, Any] | None, compile_arguments: Mapping[str, Any]
) -> dict[str, Callable[..., Any]]:
    """Compile a model twice, with stock Inductor and with lnfold, sharing weights. The work is done at the first calls.

    The process is settled first (:func:`lncompile.comparisons.even_terms.settle`), which compiles some small modules.

    Args:
        model: a module or function that is not compiled yet.
        mode: as for ``torch.compile``.
        options: Inductor's go to both arms, those under ``lnfold.`` to lnfold.
        compile_arguments: anything else for ``torch.compile``: ``dynamic``, ``fullgraph``.

    Raises:
        OptionError: for an option that neither knows.
        ValueError: for a model that is compiled already: its arms could be one and the same code.
    """
    if torch_private_dynamo.is_compiled(model):
        raise ValueError("the model is compiled already: pass the original, or two compiled ones as arms={...}")
    parse_options(mode, options)  # raises here, and not at the first request
    inductors = {name: value for name, value in (options or {}).items() if not name.startswith(PREFIX)}
    arguments = {**torch_private_caches.separate_caches(), **compile_arguments}
    if mode is not None:
        arguments["mode"] = mode
    settle(next((parameter.device for parameter in getattr(model, "parameters", tuple)()), "cpu"))

    def compiled(backend: str, chosen: Mapping[str, Any] | None) -> Callable[..., Any]:
        more: dict[str, Any] = {"options": dict(chosen)} if chosen else {}
        with torch_private_caches.without_precompilation():
            function: Callable[..., Any] = torch.compile(model, backend=backend, **arguments, **more)
        return function

    return {"inductor": compiled("inductor", inductors), "lnfold": compiled("lnfold", options)}
