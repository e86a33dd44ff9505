"""Centered weights written back into their parameters, and what it takes to undo that::

    means = mean_A(W)              # kept, in float64: k numbers for [d, k] centered along d
    W ← round(W - means)           # the parameter itself; no copy stays
    W ← round(W + means)           # restore

Whether a parameter may be written to at all is asked elsewhere (``ownership``). What is written is remembered with the
version that the write left behind: so it is not taken for a write of the user's, and a write of the user's is.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lncompile.lowering import torch_private
from lncompile.passes.axes import Axes
from lncompile.passes.centering import add_means, center_weight, means_of
from lncompile.passes.parameter_state import version_of

#: Held while weights are looked at to be centered, written or restored.
lock = threading.RLock()

# How often a weight is read anew that somebody writes to while it is read.
_ATTEMPTS = 3

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Written:
    """What is kept of a parameter that was overwritten with its centered weight.

    Attributes:
        axes: along which it was centered, one after the other.
        means: what was taken out, in float64.
        version: of the parameter, after it was written.
        storage: on which it lay.
        fingerprint: of what was written.
    """

    axes: tuple[Axes, ...]
    means: tuple[Tensor, ...]
    version: int
    storage: weakref.ref[torch.UntypedStorage]
    fingerprint: int

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(means.nbytes for means in self.means)


_written: MutableMapping[Tensor, Written] = WeakTensorKeyDictionary()
# Restored by the user: served by copies until he asks to begin anew.
_restored: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()


def can_be_kept(axes: Sequence[Axes]) -> bool:
    """Whether what centering takes out of a weight is less than the weight: there is something left that has a mean."""
    return all(part.normalised_dimensions for part in axes)


def bytes_kept(parameter: Tensor, axes: Sequence[Axes]) -> int:
    """Return how many bytes would be kept of a parameter that is overwritten."""
    with torch.no_grad():
        return sum(means_of(parameter, part).nbytes for part in axes)


def written(parameter: Tensor) -> Written | None:
    """Return what was kept of a parameter that holds the centered weight written to it; None if it does not (any more).

    A write since is noticed by the version, an exchange by the storage, and what torch does not count by the values.
    """
    with lock:
        record = _written.get(parameter)
        if record is None:
            return None
        same = version_of(parameter) == record.version and record.storage() is parameter.untyped_storage()
        if same and _fingerprint(parameter) == record.fingerprint:
            return record
        del _written[parameter]
        return None


def write(parameter: Tensor, axes: Sequence[Axes]) -> Written | None:
    """Overwrite a parameter with its centered weight.

    Args:
        parameter: a plain dense parameter, for which ``ownership`` knows no obstacle.
        axes: as in :func:`center_weight`.

    Returns:
        What was kept of it; None where somebody writes to it at this moment, again and again.
    """
    with lock, torch.inference_mode(False), torch.no_grad():
        for _ in range(_ATTEMPTS):
            version = version_of(parameter)
            means = tuple(means_of(parameter, part) for part in axes)
            centered = center_weight(parameter, axes)
            if version_of(parameter) == version:
                break
        else:
            return None
        parameter.copy_(centered)
        storage = weakref.ref(parameter.untyped_storage())
        record = Written(tuple(axes), means, version + 1, storage, _fingerprint(centered))
        _written[parameter] = record
        return record


def restore(parameter: Tensor) -> bool:
    """Put back what centering took out of a parameter, if it holds what was written to it.

    Returns:
        Whether it did. A weight that was written to since is its owner's, and stays.
    """
    with lock, torch.inference_mode(False), torch.no_grad():
        record = written(parameter)
        if record is None:
            return False
        value = parameter.detach()
        for part, means in zip(record.axes, record.means, strict=True):
            value = add_means(value, means, part)
        parameter.copy_(value)
        del _written[parameter]
        return True


def restore_for_good(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Restore parameters, and let none of them be overwritten again until :func:`allow_again`."""
    with lock:
        restored = []
        for parameter in parameters:
            if restore(parameter):
                restored.append(parameter)
            # Of subclasses `module.to()` may swap the contents, which torch refuses where there are weak references.
            if not torch_private.is_tensor_subclass(parameter):
                _restored[parameter] = True
        return restored


def allow_again() -> None:
    """Let every parameter be overwritten that was restored."""
    with lock:
        _restored.clear()


def was_restored(parameter: Tensor) -> bool:
    """Whether the user wants a parameter to stay as it is."""
    return parameter in _restored


def give_back(uses: Iterable[tuple[Tensor, tuple[Axes, ...] | None]]) -> list[Tensor]:
    """Restore what a new graph is about to read in another way than it was written.

    Args:
        uses: the graph's parameters, each with the axes along which it is centered and read in no other way, or None.

    Returns:
        The parameters that were restored. They may share storage with those of the graph.
    """
    with lock:
        if not len(_written):
            return []
        wanted: dict[int | None, set[object]] = defaultdict(set)
        for parameter, axes in uses:
            if isinstance(parameter, torch.nn.Parameter):
                wanted[torch_private.storage_identity(parameter)].add(axes)
        return [
            parameter
            for parameter, record in list(_written.items())
            if wanted.get(torch_private.storage_identity(parameter), set()) - {record.axes} and restore(parameter)
        ]


def _fingerprint(tensor: Tensor) -> int:
    """A number that two tensors of other values, or of the same in another order, most likely do not share."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten().to(torch.int64)
    weights = torch.arange(1, 2 * bits.numel(), 2, dtype=torch.int64, device=bits.device)
    return int(torch.sum(bits * weights))
