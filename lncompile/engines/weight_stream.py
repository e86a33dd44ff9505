"""Centering the tensors of a checkpoint while an engine reads them: one at a time, before it shards or merges them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from lncompile.plans.entries import CenteredParameter, PlanError
from lncompile.plans.slices import center_in_place


class CenteredWeights:
    """Passes weights on, those that are named centered.

    Each tensor is centered by itself, so that an engine that gets new weights later, some at a time, gets them right.

    Args:
        entries: how each tensor is centered, by its name in the checkpoint.

    Attributes:
        passed: the names of those that came by.

    Example:
        >>> centered = CenteredWeights({"wpe.weight": entry})
        >>> model.load_weights(centered(weights))
    """

    def __init__(self, entries: Mapping[str, CenteredParameter]) -> None:
        self.entries = entries
        self.passed: set[str] = set()

    def __call__(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the same names, and tensors of the same shapes and dtypes.

        Raises:
            PlanError: where a tensor has another shape than the plan was made for, or cannot be centered.
        """
        for name, tensor in weights:
            entry = self.entries.get(name)
            if entry is None:
                yield name, tensor
                continue
            if tuple(tensor.shape) != entry.shape or not tensor.is_floating_point() or tensor.element_size() < 2:
                raise PlanError(
                    f"'{name}' is {list(tensor.shape)} of {tensor.dtype}, and {list(entry.shape)} was to be centered"
                )
            # What was read may lie in a file that is mapped into memory, or belong to who sent it.
            centered = tensor.detach().contiguous().clone()
            center_in_place(entry, centered)
            self.passed.add(name)
            yield name, centered

    def require_all(self) -> None:
        """Raise PlanError where a tensor did not come by: what was loaded is folded in part, and wrong."""
        missing = sorted(set(self.entries) - self.passed)
        if missing:
            raise PlanError(
                f"{len(missing)} of {len(self.entries)} tensors were not loaded, so that the model is folded in part "
                f"and cannot be used: {', '.join(missing[:4])}. Load it without folding"
            )
