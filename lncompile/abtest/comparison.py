"""Comparing the answers of both arms to one request, within a tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering import torch_private
from lncompile.verification import relative_error

#: Largest ``‖a - b‖ / ‖b‖`` of outputs called equal, by dtype: wide enough for two compilers' roundings in deep models.
#: What is not listed (integers, booleans) has to be the same.
TOLERANCES: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
#: How many outputs have their largest error kept, and how many differences their words.
_OUTPUTS, _EXAMPLES = 64, 5


@dataclass
class Comparisons:
    """What comparing has shown so far, in constant memory.

    Attributes:
        compared: requests whose answers were compared.
        differing: those of them that differ by more than the tolerance.
        skipped: requests that could not be compared.
        largest: the largest error of each output by where it stands.
        examples: the first differences, in words.
        why_skipped: why the last of ``skipped`` was.
    """

    compared: int = 0
    differing: int = 0
    skipped: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    why_skipped: str | None = None

    def add(self, errors: Mapping[str, float], differences: list[str], bucket: str) -> None:
        """Count a comparison: what :func:`compare` returned for a request of this bucket."""
        self.compared += 1
        for name, error in errors.items():
            if name in self.largest or len(self.largest) < _OUTPUTS:
                self.largest[name] = max(error, self.largest.get(name, 0.0))
        if differences:
            self.differing += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(f"{differences[0]} (inputs {bucket})")

    def skip(self, why: str) -> None:
        """Count a request that could not be compared."""
        self.skipped += 1
        self.why_skipped = why

    @property
    def equal(self) -> bool | None:
        """Whether all answers compared agree; None without any."""
        return self.differing == 0 if self.compared else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it, ready for JSON."""
        return {
            "compared": self.compared,
            "differing": self.differing,
            "skipped": self.skipped,
            "why_skipped": self.why_skipped,
            # JSON has no infinity.
            "largest_relative_errors": {
                name: error if error < float("inf") else None for name, error in self.largest.items()
            },
            "examples": list(self.examples),
        }


def compare(output: Any, other: Any, tolerances: Mapping[torch.dtype, float]) -> tuple[dict[str, float], list[str]]:
    """Compare two answers.

    Args:
        output: the answer of the one arm, tensors in nested containers.
        other: and of the other.
        tolerances: the largest error by dtype.

    Returns:
        The error of each tensor by where it stands: ``‖output - other‖ / ‖other‖`` over finite elements for floating
        point, the share of elements that differ for integers, infinity where infinities and NaNs do not match. And the
        differences beyond the tolerance, in words.
    """
    errors: dict[str, float] = {}
    differences: list[str] = []
    mine, others = (dict(torch_private.leaves_with_path(tree)) for tree in (output, other))
    if mine.keys() != others.keys():
        return errors, [f"the outputs have different forms: {_some(mine)} and {_some(others)}"]
    for path, value in mine.items():
        where, expected = path or "output", others[path]
        if isinstance(value, Tensor) and isinstance(expected, Tensor):
            if value.shape != expected.shape or value.dtype != expected.dtype:
                differences.append(f"{where} is {_kind(value)} and {_kind(expected)}")
                continue
            errors[where] = error = _error(value.detach(), expected.detach())
            # Not `error > tolerance`, which a NaN would pass.
            if not error <= tolerances.get(value.dtype, 0.0):
                differences.append(f"{where} differs by {error:.2e} ({str(value.dtype).removeprefix('torch.')})")
        elif type(value) is not type(expected):
            differences.append(f"{where} is of type {type(value).__name__} and {type(expected).__name__}")
        elif isinstance(value, (str, bytes, bool, int)) and value != expected:
            differences.append(f"{where} is {value!r:.60} and {expected!r:.60}")
    return errors, differences


def _error(value: Tensor, expected: Tensor) -> float:
    if not (value.is_floating_point() or value.is_complex()):
        return float((value != expected).double().mean()) if value.numel() else 0.0
    if value.is_complex():
        value, expected = torch.view_as_real(value), torch.view_as_real(expected)
    finite = expected.isfinite()
    if not torch.equal(value.isfinite(), finite):
        return float("inf")
    if not torch.equal(value[~finite].nan_to_num(nan=0.0), expected[~finite].nan_to_num(nan=0.0)):
        return float("inf")
    return relative_error(value, expected)


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _some(leaves: Mapping[str, Any]) -> str:
    names = [path or "output" for path in leaves]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
