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
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from lncompile.lowering import torch_private
from lncompile.passes.graph.axes import Axes
from lncompile.passes.rewrites.arithmetic import add_means, center_weight, means_of
from lncompile.runtime.parameter_identity import Place
from lncompile.runtime.parameter_state import version_of
from lncompile.runtime.weight_samples import lies_within

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
        storage: on which it lies, alone.
        shape: of the parameter.
        strides: of the parameter.
        fingerprint: of what was written.
    """

    axes: tuple[Axes, ...]
    means: tuple[Tensor, ...]
    version: int
    storage: weakref.ref[torch.UntypedStorage]
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    fingerprint: int

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(means.nbytes for means in self.means)

    def describes(self, tensor: Tensor) -> bool:
        """Whether a tensor is all of what was written: on the storage, in the same layout."""
        layout = tuple(tensor.shape) == self.shape and tensor.stride() == self.strides
        storage = tensor.untyped_storage()
        # Memory that was given back (``storage.resize_(0)``) holds nothing of what was written.
        return layout and self.storage() is storage and lies_within(tensor, storage)


# By the identity of the storage: a conversion gives a parameter another one, and then it is no longer what was written.
_written: dict[int | None, Written] = {}
# Restored by the user: served by copies until he asks to begin anew. By module, the names of its parameters.
_restored: MutableMapping[nn.Module, set[str]] = WeakIdKeyDictionary()


def bytes_kept(parameter: Tensor, axes: Sequence[Axes]) -> int:
    """Return how many bytes would be kept of a parameter that is overwritten."""
    with torch.no_grad(), torch_private.as_plain_tensors():
        return sum(means_of(parameter, part).nbytes for part in axes)


def written(parameter: Tensor) -> Written | None:
    """Return what was kept of a parameter that holds the centered weight written to it; None if it does not (any more).

    A write since is noticed by the version, an exchange by the storage, and what torch does not count by the values.
    """
    with lock, torch_private.as_plain_tensors():
        identity = torch_private.storage_identity(parameter)
        record = _written.get(identity)
        if record is None:
            return None
        same = version_of(parameter) == record.version and record.describes(parameter)
        if same and _fingerprint(parameter) == record.fingerprint:
            return record
        del _written[identity]
        return None


def write(parameter: Tensor, axes: Sequence[Axes]) -> Written | None:
    """Overwrite a parameter with its centered weight.

    Args:
        parameter: a plain dense parameter, for which ``ownership`` knows no obstacle.
        axes: as in :func:`center_weight`.

    Returns:
        What was kept of it; None where somebody writes to it at this moment, again and again.
    """
    with lock, torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
        for _ in range(_ATTEMPTS):
            version = version_of(parameter)
            means = tuple(means_of(parameter, part) for part in axes)
            centered = center_weight(parameter, axes)
            if version_of(parameter) == version:
                break
        else:
            return None
        parameter.copy_(centered)
        identity = torch_private.storage_identity(parameter)

        def forget(freed: weakref.ref[torch.UntypedStorage]) -> None:
            # A later owner of the same address may have put its own record there.
            if (known := _written.get(identity)) is not None and known.storage is freed:
                del _written[identity]

        storage = weakref.ref(parameter.untyped_storage(), forget)
        layout = tuple(parameter.shape), parameter.stride()
        record = Written(tuple(axes), means, version + 1, storage, *layout, _fingerprint(centered))
        _written[identity] = record
        return record


def restore(parameter: Tensor) -> bool:
    """Put back what centering took out of a parameter, if it holds what was written to it.

    Returns:
        Whether it did. A weight that was written to since is its owner's, and stays.
    """
    with lock, torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
        record = written(parameter)
        if record is None:
            return False
        _put_back(record, parameter)
        del _written[torch_private.storage_identity(parameter)]
        return True


def _put_back(record: Written, tensor: Tensor) -> None:
    value = tensor.detach()
    for part, means in zip(record.axes, record.means, strict=True):
        value = add_means(value, means, part)
    tensor.copy_(value)


def restore_for_good(parameters: Iterable[Tensor], places: Iterable[Place]) -> list[Tensor]:
    """Restore parameters, and let none of them be overwritten again until :func:`allow_again`.

    Args:
        parameters: to be restored.
        places: where they are held. Whatever comes to stand there, by a conversion or a load, is left alone too.

    Returns:
        The parameters that were restored.
    """
    with lock:
        for module, name in places:
            _restored.setdefault(module, set()).add(name)
        return [parameter for parameter in parameters if restore(parameter)]


def allow_again() -> None:
    """Let every parameter be overwritten that was restored."""
    with lock:
        _restored.clear()


def anything_restored() -> bool:
    """Whether the user wants any parameter to stay as it is."""
    return len(_restored) > 0


def was_restored(places: Iterable[Place]) -> bool:
    """Whether the user wants the parameter that is held in these places to stay as it is."""
    return any(name in _restored.get(module, ()) for module, name in places)


def give_back(uses: Iterable[tuple[Any, tuple[Axes, ...] | None]]) -> bool:
    """Restore what a new graph is about to read in another way than it was written.

    Args:
        uses: the graph's inputs, parameters among them, each with the axes along which it is centered and read in no
            other way, or None.

    Returns:
        Whether anything was restored. What is restored may be another parameter than the graph's, on the same storage,
        and torch then counts no write to that one.
    """
    with lock, torch.inference_mode(False), torch.no_grad(), torch_private.as_plain_tensors():
        restored = False
        for parameter, axes in uses if _written else ():
            identity = torch_private.storage_identity(parameter) if isinstance(parameter, nn.Parameter) else None
            record = _written.get(identity)
            if record is None or record.axes == axes:
                continue
            del _written[identity]
            if not lies_within(parameter, parameter.untyped_storage()):
                continue  # its memory was given back, and what was written with it
            whole = parameter if record.describes(parameter) else _whole(record, parameter)
            if _fingerprint(whole) == record.fingerprint:  # or somebody wrote to it since, and it is his
                _put_back(record, whole)
                restored = True
        return restored


def _whole(record: Written, part: Tensor) -> Tensor:
    """All of what was written, as a tensor of our own on the storage that a part of it lies on."""
    return torch.empty(0, dtype=part.dtype, device=part.device).set_(
        part.untyped_storage(), 0, record.shape, record.strides
    )


def _fingerprint(tensor: Tensor) -> int:
    """A number that two tensors of other values, or of the same in another order, most likely do not share."""
    bits = tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).flatten().to(torch.int64)
    weights = torch.arange(1, 2 * bits.numel(), 2, dtype=torch.int64, device=bits.device)
    return int(torch.sum(bits * weights))
