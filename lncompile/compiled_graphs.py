"""What this process has compiled, or loaded, with lnfold: a record for each graph, which lives as long as its code."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lncompile.reporting.report import FoldReport
from lncompile.runtime.materialize import Materializer
from lncompile.runtime.parameter_identity import ParameterReference
from lncompile.runtime.unfolded import given_up


@dataclass(eq=False)
class CompiledGraph:
    """What was compiled: the report, with enough to find it again from a compiled model. Lives as long as the code.

    Attributes:
        decided: the report of the compilation.
        code: the code object whose frame Dynamo compiled; None where the backend was called by hand, and of loaded
            code.
        arguments: ``mode`` and ``options`` of the ``torch.compile``.
        parameters: those it was compiled with, by position among the graph's inputs.
        materializer: supplies its centered weights; None where it has none.
        number: graphs in the order of their compilation.
    """

    decided: FoldReport
    code: Any
    arguments: Mapping[str, Any]
    parameters: Mapping[int, ParameterReference]
    materializer: Materializer | None = None
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        compiled_graphs.add(self)

    @property
    def report(self) -> FoldReport:
        """What was decided, unless it was given up since."""
        gives_up = self.materializer is not None and not self.materializer.keeps_up
        return given_up(self.decided) if gives_up else self.decided

    def served(self) -> set[int]:
        """Ids of the parameters it was compiled with and, where Dynamo reused the code, called with since."""
        identities = (parameter.identity() for parameter in self.parameters.values())
        own = {identity for identity in identities if identity is not None}
        return own | (self.materializer.seen() if self.materializer else set())


compiled_graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def arguments_of(backend: Any) -> Mapping[str, Any] | None:
    """Return the ``mode`` and ``options`` that torch.compile's backend object hands to lnfold.

    Args:
        backend: what torch.compile made of backend, mode and options; None as well.

    Returns:
        None for another backend than lnfold.
    """
    if getattr(backend, "compiler_name", None) != "lnfold":
        return None
    arguments: Mapping[str, Any] = backend.kwargs
    return arguments


def are_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two ``mode`` and ``options`` are the same."""
    return left.get("mode") == right.get("mode") and dict(left.get("options") or {}) == dict(right.get("options") or {})
