"""A model on the meta device, asked about as if its weights were there: fake tensors stand in for them.

A tensor on the meta device has a shape and a dtype but neither values nor memory, so that a model of any size can be
made there in seconds. Much code asks where its tensors are, and some operations do not take meta tensors beside others.
torch's fake tensors have no values either and say that they are on a real device: with them a model is captured as it
would be with its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private


def is_on_meta(model: object) -> bool:
    """Whether a model is a module all of whose parameters, at least one, are plain tensors on the meta device.

    Args:
        model: anything that can be called.

    Example:
        >>> is_on_meta(nn.Linear(8, 8, device="meta"))
        True
    """
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    plain = (p.device.type == "meta" and p.layout is torch.strided for p in parameters)
    return bool(parameters) and all(plain) and not any(map(torch_private.is_opaque_tensor, parameters))


@contextlib.contextmanager
def stand_ins(model: nn.Module, arguments: Any) -> Iterator[Any]:
    """Context in which fake tensors stand in a model for its tensors on the meta device.

    They say that they are on a GPU where there is one, and on the CPU elsewhere. Tensors that share memory still share
    it, and a parameter of two modules stays one.

    Args:
        model: all of whose parameters are on the meta device. It gets its own tensors back at the end.
        arguments: what it is called with, in any containers.

    Yields:
        The arguments, with fake tensors for those on the meta device.

    Example:
        >>> with stand_ins(model, (input_ids,)) as (fake_ids,):
        ...     model(fake_ids).device
        device(type='cpu')
    """
    make = _Maker("cuda" if torch.cuda.is_available() else "cpu")
    exchanged: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for holder in _holders(model):
            for name, value in list(holder.items()):
                if isinstance(value, Tensor) and value.device.type == "meta":
                    exchanged.append((holder, name, value))
                    holder[name] = make(value)
        with make.mode:
            yield torch_private.tree_map(make, arguments)
    finally:
        for holder, name, value in exchanged:
            holder[name] = value


def _holders(model: nn.Module) -> Iterator[dict[str, Any]]:
    """The dicts in which modules keep parameters, buffers and other attributes."""
    for module in model.modules():
        attributes = vars(module)
        yield attributes
        yield attributes["_parameters"]
        yield attributes["_buffers"]


class _Maker:
    """Makes one fake tensor for each tensor on the meta device, and one storage for each storage."""

    def __init__(self, device: str) -> None:
        self.mode = torch_private.fake_mode()
        self._device = device
        self._made: dict[int, tuple[Tensor, Tensor]] = {}
        self._bases: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.device.type != "meta":
            return value
        if id(value) not in self._made:
            # What was made under inference_mode() is said to be, as its changes could not be seen.
            with self.mode, torch.inference_mode(value.is_inference()), torch.no_grad():
                fake = self._fake(value)
                if isinstance(value, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=value.requires_grad)
            self._made[id(value)] = value, fake  # with the value: its id is not used again while it lives
        return self._made[id(value)][1]

    def _fake(self, value: Tensor) -> Tensor:
        form: Mapping[str, Any] = {"dtype": value.dtype, "device": self._device}
        storage = value.untyped_storage()
        if storage.nbytes() == value.numel() * value.element_size() and torch_private.tensors_on(storage) == 1:
            return torch.empty_strided(value.shape, value.stride(), **form)
        key = torch_private.storage_identity(value), value.dtype
        if key not in self._bases:
            self._bases[key] = torch.empty(storage.nbytes() // value.element_size(), **form)
        return self._bases[key].as_strided(value.shape, value.stride(), value.storage_offset())
