"""Where torch keeps a tensor's version and place in memory, found by trying, so that those of many are read in one go.

``tensor._version`` and ``tensor.data_ptr()`` take 60 ns each, too much for hundreds of tensors at every call of a
model. They are two numbers in memory::

    Python object ─► TensorImpl ─► version counter: version
                          │──────► StorageImpl: address of its memory
                          └ offset of the first element in it

How far each stands from the beginning of what holds it is torch's own business and differs between versions. So it is
not written here: tensors are made of which these numbers are known, and each place is searched for where they all have
theirs. Then each is changed in all the ways there are, and has to show it. Where anything is not as expected, the
answer is None, and callers ask each tensor.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lncompile.lowering import torch_private

log = logging.getLogger("lncompile")

_WORD = 8
# Words that are looked at from the beginning of a Python object, a TensorImpl, a StorageImpl and a version counter.
_OBJECT, _TENSOR, _STORAGE, _COUNTER = 8, 24, 8, 4


class TensorLayout(NamedTuple):
    """Distances in bytes.

    Attributes:
        tensor: in a Python object, of the address of the TensorImpl that it holds.
        storage: in a TensorImpl, of the address of its StorageImpl.
        offset: in a TensorImpl, of the first element's distance in the storage, in elements.
        counter: in a TensorImpl, of the address of its version counter.
        version: in a version counter, of the 4-byte count.
        memory: in a StorageImpl, of the address of its memory.
    """

    tensor: int
    storage: int
    offset: int
    counter: int
    version: int
    memory: int


class Places(NamedTuple):
    """Addresses of the numbers that say where a tensor is and how often it was written to.

    Attributes:
        words: of 8-byte numbers: what changes if it is moved, swapped or resized.
        version: of the 4-byte version.
    """

    words: tuple[int, ...]
    version: int


def places_of(tensor: Tensor, layout: TensorLayout) -> Places:
    """Return where the numbers of a tensor stand at present; they stay there while it lives and is not swapped.

    Args:
        tensor: a plain one with a storage, no wrapper around others.
        layout: what :func:`tensor_layout` found.
    """
    implementation = _number(id(tensor) + layout.tensor)
    storage, counter = _number(implementation + layout.storage), _number(implementation + layout.counter)
    inside = (implementation + distance for distance in (layout.storage, layout.offset, layout.counter))
    return Places((id(tensor) + layout.tensor, *inside, storage + layout.memory), counter + layout.version)


def read(places: Places) -> tuple[tuple[int, ...], int]:
    """Return the numbers at some places, one after the other; to read those of many tensors NumPy is faster."""
    return tuple(map(_number, places.words)), ctypes.c_uint32.from_address(places.version).value


@functools.cache
def tensor_layout() -> TensorLayout | None:
    """Return how this torch keeps its tensors; None where that is not found out beyond doubt."""
    if sys.implementation.name != "cpython" or struct.calcsize("P") != _WORD or sys.byteorder != "little":
        return None
    try:
        layout = _search()
        if layout is not None and _shows_every_change(layout):
            return layout
    except Exception as error:
        log.debug("each tensor is asked for its version and place: %s", error)
    return None


def _number(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def _words(address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", ctypes.string_at(address, count * _WORD))


def _only(found: Iterable[int]) -> int | None:
    """The one place that was found; None where there are several or none."""
    places = list(found)
    return places[0] if len(places) == 1 else None


def _samples() -> list[Tensor]:
    """Tensors on storages of their own, with unlike offsets and versions."""
    made = []
    for offset, version in ((3, 7), (5, 11), (1001, 23), (17, 2)):
        tensor = torch.zeros(1100)[offset : offset + 4].detach()
        for _ in range(version - tensor_version(tensor)):
            tensor.add_(1)
        made.append(tensor)
    return made


def tensor_version(tensor: Tensor) -> int:
    """Return the version that torch says a tensor has."""
    return torch_private.version_of(tensor)


def _search() -> TensorLayout | None:
    samples = _samples()
    implementations = [torch_private.implementation_address(sample) for sample in samples]
    storages = [torch_private.storage_identity(sample) for sample in samples]
    objects = [_words(id(sample), _OBJECT) for sample in samples]
    tensors = [_words(address, _TENSOR) for address in implementations]
    # An alias made by `detach` counts with its original, one made by `data` by itself.
    aliases = [(sample.detach(), sample.data) for sample in samples]
    counted, uncounted = (
        [_words(torch_private.implementation_address(pair[side]), _TENSOR) for pair in aliases] for side in (0, 1)
    )

    def where(rows: Sequence[tuple[int, ...]], wanted: Sequence[int | None]) -> list[int]:
        return [i for i in range(len(rows[0])) if all(row[i] == w for row, w in zip(rows, wanted, strict=True))]

    tensor = _only(where(objects, implementations))
    storage = _only(where(tensors, storages))
    offset = _only(where(tensors, [int(sample.storage_offset()) for sample in samples]))
    counter = _only(
        i
        for i in range(_TENSOR)
        if all(a[i] and a[i] == b[i] != c[i] for a, b, c in zip(tensors, counted, uncounted, strict=True))
    )
    if tensor is None or storage is None or offset is None or counter is None:
        return None
    counts = [struct.unpack(f"<{2 * _COUNTER}I", ctypes.string_at(row[counter], _COUNTER * _WORD)) for row in tensors]
    version = _only(where(counts, [tensor_version(sample) for sample in samples]))
    # The memory's owner may stand at the same address as the memory, and behind it; of a foreign buffer it does not.
    buffers = [bytearray(64), bytearray(64)]
    foreign = [torch.frombuffer(buffer, dtype=torch.float32) for buffer in buffers]
    contents = [_words(torch_private.storage_identity(each) or 0, _STORAGE) for each in (*samples, *foreign)]
    memory = _only(where(contents, [each.untyped_storage().data_ptr() for each in (*samples, *foreign)]))
    if version is None or memory is None:
        return None
    return TensorLayout(tensor * _WORD, storage * _WORD, offset * _WORD, counter * _WORD, version * 4, memory * _WORD)


def _shows_every_change(layout: TensorLayout) -> bool:
    """Whether each way to write to a tensor, or to move it, changes a number, and nothing else does."""

    swap_tensors: Any = torch.utils.swap_tensors  # it has no types

    def noticed(change: str) -> bool:
        tensor, other = torch.zeros(4, 4), torch.ones(4, 4)
        kept = tensor.untyped_storage()
        places = places_of(tensor, layout)
        before = read(places)
        if read(places_of(tensor, layout)) != before or before[1] != tensor_version(tensor):
            return False
        match change:
            case "nothing":
                tensor.add(1)
            case "write":
                tensor.add_(1)
            case "other memory":
                tensor.data = other
            case "another part":
                tensor.data = tensor.data[1:3]
            case "swap":
                swap_tensors(tensor, other)
            case "resized":
                kept.resize_(1 << 16)
        return read(places) != before

    changes = ("write", "other memory", "another part", "swap", "resized")
    return all(map(noticed, changes)) and not noticed("nothing")
