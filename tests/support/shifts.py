"""What a shift of one tensor reaches, by the variables that the passes build."""

from __future__ import annotations

from collections.abc import Mapping

from lncompile.passes.placement.variables import Variable, VariableKey


def shifted_from(key: VariableKey, variables: Mapping[VariableKey, Variable]) -> set[VariableKey] | None:
    """Everything that is shifted if one tensor is; None if something notices."""
    seen, queue = {key}, [key]
    while queue:
        variable = variables[queue.pop()]
        if variable.reader_blocker is not None:
            return None
        queue += [successor for successor in variable.successors if successor not in seen]
        seen.update(variable.successors)
    return seen


__all__ = ["shifted_from"]
