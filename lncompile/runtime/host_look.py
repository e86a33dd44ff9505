"""The look at weights in the host's memory, in one go: identity, place, version and values.

What is read stands in four groups, each of which says that the next one's memory is there::

    Python object: its TensorImpl ─► its storage, offset, version counter ─► memory of the storage, version ─► elements
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lncompile.lowering import HostWords, can_compare, places_of, tensor_layout
from lncompile.passes.graph.sharding import is_sharded

_ALL_BITS = 0xFFFFFFFF
_HALF_WORD = 4


def look_at(tensors: tuple[Tensor, ...], samples: Sequence[tuple[int, int]]) -> HostWords | None:
    """Note which tensors these are, where they lie, how often they were written to, and some of their words.

    Args:
        tensors: with storages and versions. They are alive whenever the look is asked.
        samples: addresses of 4-byte words in their memory, where that is the host's, and the bits of each that count.

    Returns:
        The look; None where it cannot be made in this way.
    """
    layout = tensor_layout()
    if layout is None or not can_compare() or any(map(is_sharded, tensors)):
        return None
    objects: list[tuple[int, int]] = []
    implementations: list[tuple[int, int]] = []
    owned: list[tuple[int, int]] = []
    for tensor in tensors:
        places = places_of(tensor, layout)
        python_object, *implementation, memory = places.words
        objects.extend(_halves(python_object))
        implementations.extend(half for word in implementation for half in _halves(word))
        owned.extend((*_halves(memory), (places.version, _ALL_BITS)))
    return HostWords(tensors, (objects, implementations, owned, samples))


def _halves(address: int) -> Iterator[tuple[int, int]]:
    yield address, _ALL_BITS
    yield address + _HALF_WORD, _ALL_BITS
