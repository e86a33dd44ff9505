"""The versions of some parameters and the places of their elements, and whether they are what they were.

Both are read from memory in one go where it is known how torch keeps them (``lowering.tensor_layout``): 4 µs for 200
parameters. Otherwise each parameter is asked, which takes 25.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from lncompile.lowering import places_of, tensor_layout, torch_private
from lncompile.passes.graph.sharding import is_sharded
from lncompile.runtime.memory_words import HALF_WORDS, WORDS, index_of_half_word, index_of_word
from lncompile.runtime.weight_samples import local


class Counters(Protocol):
    """Versions, and places where they were asked for, as they were when this was made."""

    def are_same(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether the same tensors still have them."""

    def expect(self, index: int, version: int) -> None:
        """Take a write of our own into account."""


def counters_of(tensors: Sequence[Tensor], *, places: bool) -> Counters:
    """Note the versions of some tensors, and where their elements are.

    Args:
        tensors: with storages and versions. They are the same ones, alive, whenever the counters are asked.
        places: whether another place of the elements counts as well: another storage, a part of it, or other memory.
    """
    layout = tensor_layout() if places else None
    if layout is None or any(map(is_sharded, tensors)):
        return _Asked(tensors, places)
    return _Read(tensors)


class _Asked:
    """Each tensor is asked."""

    def __init__(self, tensors: Sequence[Tensor], places: bool) -> None:
        self._versions = list(map(torch_private.version_of, tensors))
        self._places = list(map(_place_of, tensors)) if places else None

    def are_same(self, tensors: tuple[Tensor, ...]) -> bool:
        if list(map(torch_private.version_of, tensors)) != self._versions:
            return False
        return self._places is None or list(map(_place_of, tensors)) == self._places

    def expect(self, index: int, version: int) -> None:
        self._versions[index] = version


def _place_of(tensor: Tensor) -> int:
    return local(tensor).data_ptr()


class _Read:
    """The numbers are read where they stand. Only of living tensors: the caller holds them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        layout = tensor_layout()
        assert layout is not None  # counters_of looked
        places = [places_of(tensor, layout) for tensor in tensors]
        self._words = np.array([index_of_word(word) for place in places for word in place.words], dtype=np.intp)
        self._versions = np.array([index_of_half_word(place.version) for place in places], dtype=np.intp)
        self._expected: bytes = WORDS[self._words].tobytes()
        self._counted = HALF_WORDS[self._versions]
        self._expected_versions: bytes = self._counted.tobytes()

    def are_same(self, tensors: tuple[Tensor, ...]) -> bool:
        # Places first: a tensor that was swapped has its version elsewhere.
        seen: bytes = WORDS[self._words].tobytes()
        if seen != self._expected:
            return False
        versions: bytes = HALF_WORDS[self._versions].tobytes()
        return versions == self._expected_versions

    def expect(self, index: int, version: int) -> None:
        self._counted[index] = version
        self._expected_versions = self._counted.tobytes()
