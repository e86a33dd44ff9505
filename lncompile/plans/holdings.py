"""What a model holds: the names of each tensor in its state dict, and what forbids to write into it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.plans.forms import named_tensors


class Slot(NamedTuple):
    """A place that a centered weight can be read from: a parameter, or the table of one embedding that is tied."""

    name: str
    lookup: str = ""


@dataclass(frozen=True)
class Held:
    """A tensor of a model.

    Attributes:
        tensor: the tensor.
        names: all its names, the first as in ``named_parameters()``.
        obstacle: why it cannot be centered, in words; ``""`` where nothing is known against it.
    """

    tensor: Tensor
    names: tuple[str, ...]
    obstacle: str = ""


class Holdings:
    """The tensors and modules of a model, by identity and by name.

    Args:
        model: with stand-ins where it is on the meta device.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paths: dict[int, list[str]] = defaultdict(list)
        for path, module in model.named_modules(remove_duplicate=False):
            self.paths[id(module)].append(path)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        names: dict[int, list[str]] = defaultdict(list)
        tensors: dict[int, Tensor] = {}
        transient: set[int] = set()
        for name, tensor, is_persistent in named_tensors(model):
            names[id(tensor)].append(name)
            tensors[id(tensor)] = tensor
            if not is_persistent:
                transient.add(id(tensor))
        storages: dict[int, list[int]] = defaultdict(list)
        for key, tensor in tensors.items():
            storage = torch_private.storage_identity(tensor)
            if storage is not None:
                storages[storage].append(key)
        self._held: dict[int, Held] = {}
        for key, tensor in tensors.items():
            others = storages.get(torch_private.storage_identity(tensor) or 0, [key])
            obstacle = ""
            if key in transient:
                obstacle = "is a buffer that is not in the state dict: what makes it may make it anew"
            elif len(others) > 1:
                other = next(names[k][0] for k in others if k != key)
                obstacle = f"shares its memory with '{other}'"
            elif tensor.numel() > 0 and 0 in tensor.stride() and not torch_private.is_opaque_tensor(tensor):
                obstacle = "is expanded: several of its elements are one number in memory"
            self._held[key] = Held(tensor, tuple(names[key]), obstacle)
        self._by_name = {name: held for held in self._held.values() for name in held.names}

    def find(self, value: Any) -> Held | None:
        """The tensor of the model that a value is, or None."""
        return self._held.get(id(value))

    def named(self, name: str) -> Held:
        """The tensor of a name."""
        return self._by_name[name]

    def obstacles(self) -> Iterator[tuple[str, Held]]:
        """The tensors that cannot be centered whatever reads them, by their first name."""
        for held in self._held.values():
            if held.obstacle:
                yield held.names[0], held

    def sharing_memory_with(self, value: Any) -> Iterator[str]:
        """The first names of the tensors whose memory a value lies in that has no name in the model."""
        storage = torch_private.storage_identity(value) if isinstance(value, Tensor) else None
        if storage is None or self.find(value) is not None:
            return
        for held in self._held.values():
            if torch_private.storage_identity(held.tensor) == storage:
                yield held.names[0]

    def parameters(self) -> Iterator[str]:
        """The first name of each parameter."""
        for held in self._held.values():
            if isinstance(held.tensor, nn.Parameter):
                yield held.names[0]

    def paths_of(self, path: str) -> tuple[str, ...]:
        """All paths of the module at a path, the first as in ``named_modules()``."""
        return tuple(self.paths[id(self.modules[path])])
