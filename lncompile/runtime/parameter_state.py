"""Whether the parameters of a call are those of an earlier one, unchanged: asked at every call, so it has to be cheap.

Up to five things are compared, none of which keeps a parameter alive:

* *identity*. Comparing addresses is exact as long as every tensor lives, for an address is used again only after its
  owner is freed; when one is freed, its lifetime (``parameter_identity``) ends the state. ``torch.utils.swap_tensors``
  keeps the address and exchanges version and storage.
* *version*, torch's count of the in-place writes to a tensor.
* *storage*. ``parameter.data = other`` and ``module.to(dtype)`` exchange it under the same object and count nothing.
  Most often that frees the old storage, which ends the state as well. Where somebody else keeps it (a ``state_dict``),
  a conversion is noticed by the first parameter's storage, for it exchanges all of them.
* *place*, where values are looked at as well: the address of each parameter's first element, which any other exchange
  changes, also one for another part of the same storage.
* *values*, likewise: a few elements of each, for writes that torch does not count (:mod:`.weight_samples`). They are
  read by address, so they are read last: the parameters live and are where they were.

Where values are looked at, all of this is one call of a function in C (:mod:`.host_look`), if there is a compiler.
"""

from __future__ import annotations

import ctypes
import operator
import struct
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lncompile.lowering import HostWords, Look, torch_private
from lncompile.runtime.host_look import look_at
from lncompile.runtime.parameter_counters import counters_of
from lncompile.runtime.parameter_identity import watch
from lncompile.runtime.weight_samples import WeightSamples, lies_within, local

version_of = torch_private.version_of


def _read_addresses(objects: tuple[Any, ...]) -> bytes:
    """The addresses of a tuple's items as they stand in the tuple itself: for 200 items in half a microsecond.

    ``list(map(id, objects))`` takes seven, and the version of each tensor eleven.
    """
    return ctypes.string_at(id(objects) + tuple.__basicsize__, tuple.__itemsize__ * len(objects))


def _number_addresses(objects: tuple[Any, ...]) -> bytes:
    return struct.pack(f"{len(objects)}P", *map(id, objects))


def _choose_reader() -> Callable[[tuple[Any, ...]], bytes]:
    """Read memory only where an id is an address and a tuple is laid out as expected."""
    sample = (object(), object(), object())
    if sys.implementation.name == "cpython" and _read_addresses(sample) == _number_addresses(sample):
        return _read_addresses
    return _number_addresses


#: The identities of a tuple's items, to be compared with those of others.
addresses_of: Callable[[tuple[Any, ...]], bytes] = _choose_reader()


# What the addresses of no tuple are.
_ENDED = b"ended"


class ParameterState:
    """Which tensors there were at one moment, and which values they had.

    Args:
        tensors: at least one, with storages and versions, so none that was made under ``torch.inference_mode()``.
        ended: called with this state when it can never be current again: a tensor or its storage was freed.
        values: whether elements are compared as well, for writes that torch does not count.

    Example:
        >>> state = ParameterState((weight, bias))
        >>> state.is_current((weight, bias))
        True
        >>> weight.mul_(2)
        >>> state.is_current((weight, bias))
        False
    """

    def __init__(
        self,
        tensors: tuple[Tensor, ...],
        ended: Callable[[ParameterState], None] = lambda state: None,
        *,
        values: bool = False,
    ) -> None:
        own = weakref.ref(self)

        def end(_: object) -> None:
            state = own()
            if state is not None and state._addresses is not _ENDED:
                state._addresses = _ENDED
                if state._look is not None:
                    state._look.end()
                ended(state)

        self._look: HostWords | None = None
        self._is_whole_look = False
        # Held while memory is read by address: another thread may exchange a parameter's storage, which would free it.
        storages = [local(tensor).untyped_storage() for tensor in tensors]
        self._addresses = addresses_of(tensors)
        self._counters = counters_of(tensors, places=values)
        self._lifetimes = [(id(tensor), watch(tensor, end)) for tensor in tensors]
        self._storages = [weakref.ref(storage, end) for storage in storages]
        # A tensor whose storage was exchanged since is not where it is said to be, and is never found there.
        is_whole = values and all(map(lies_within, map(local, tensors), storages))
        self._samples = WeightSamples(tensors) if is_whole else None
        self._values = values
        if self._samples is not None:
            self._look = look_at(tensors, self._samples.in_host)
            self._is_whole_look = self._look is not None and self._samples.are_all_in_host
            if self._look is not None and self._is_whole_look:
                self.is_current = self._look.are_same  # type: ignore[assignment,method-assign]  # asked at every call
        del storages

    def is_current(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these are the same tensors, not written to since."""
        if not self._values:
            return (
                addresses_of(tensors) == self._addresses
                and self._counters.are_same(tensors)
                and self._storages[0]() is local(tensors[0]).untyped_storage()
            )
        if self._samples is not None and self._look is not None:
            return self._look.are_same(tensors) and not self._samples.differ_on_devices()
        held = self._hold(tensors)
        return held is not None and self._samples is not None and not self._samples.differ()

    def _hold(self, tensors: tuple[Tensor, ...]) -> list[torch.UntypedStorage | None] | None:
        """The storages, held so that no other thread frees what is read by address; None if torch counts a change."""
        held = list(map(operator.call, self._storages))
        return held if addresses_of(tensors) == self._addresses and self._counters.are_same(tensors) else None

    def look_within(self, places: Sequence[int], length: int) -> Look | None:
        """The same question, in one call of a function in C, of a longer tuple; None where that does not answer it.

        Args:
            places: where the tensors stand in it.
            length: of it.
        """
        return Look(self._look, places, length) if self._look is not None and self._is_whole_look else None

    def written_unseen(self, tensors: tuple[Tensor, ...]) -> list[int]:
        """Return the positions of tensors that were written to though torch counted no write, as far as it shows."""
        held = self._hold(tensors)
        return [] if held is None or self._samples is None else self._samples.different()

    def expect(self, index: int, version: int, tensors: tuple[Tensor, ...]) -> None:
        """Take a write of our own to one of the tensors into account: the version that it left it with."""
        self._counters.expect(index, version)
        held = self._hold(tensors)
        if held is not None and self._samples is not None:
            self._samples.record()
            if self._look is not None:
                self._look.record()

    def has_storages_of(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether these tensors have the same storages, freed or not: a closer look than each call can pay for."""
        pairs = zip(self._storages, tensors, strict=True)
        return all(storage() is local(tensor).untyped_storage() for storage, tensor in pairs)

    def living(self) -> set[int]:
        """The ``id()`` of each of the tensors that were not freed since."""
        return {identity for identity, lifetime in self._lifetimes if lifetime() is not None}
