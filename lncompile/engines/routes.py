"""Where the tensors of a checkpoint go in an engine's model, as the engine's own loading code sends them.

The model loads tensors without values once, with loaders that take notes in the place of its own. Whatever renames,
transposes, merges or ties it does, the notes say which of its parameters each tensor feeds. Nothing is written.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lncompile.engines.architecture import Unfit, first_line
from lncompile.lowering import torch_private
from lncompile.lowering.torch_private_copies import CopiesFromMeta


@dataclass(frozen=True)
class StoredForm:
    """What is known of a tensor in a checkpoint before it is read.

    Attributes:
        shape: its shape.
        dtype: its dtype.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


#: The names of the parameters that each tensor of a checkpoint feeds, all names of each.
Routes = Mapping[str, frozenset[str]]


def find_routes(
    model: nn.Module, load: Callable[[Iterable[tuple[str, Tensor]]], Any], stored: Mapping[str, StoredForm]
) -> Routes:
    """Send every tensor of a checkpoint through a model's loading code, without values.

    Args:
        model: its parameters have loaders of their own as attributes, ``weight_loader``, or none.
        load: loads names and tensors into the model.
        stored: what the checkpoint holds, by name.

    Raises:
        Unfit: where the loading code needs values.
    """
    names: dict[int, set[str]] = defaultdict(set)
    for name, tensor in _tensors(model):
        names[id(tensor)].add(name)
    empty = {name: torch.empty(form.shape, dtype=form.dtype, device="meta") for name, form in stored.items()}
    sources = {torch_private.storage_identity(tensor): name for name, tensor in empty.items()}
    routes: dict[str, set[str]] = defaultdict(set)

    def note(parameter: Tensor, loaded: Tensor, *_: Any, **__: Any) -> None:
        source = sources.get(torch_private.storage_identity(loaded))
        if source is not None:  # what was computed of several tensors belongs to none
            routes[source] |= names[id(parameter)]

    def skip(destination: Tensor, loaded: Tensor) -> None:
        source = sources.get(torch_private.storage_identity(loaded))
        if source is not None:
            routes[source] |= owners.get(torch_private.storage_identity(destination), set())

    owners = {torch_private.storage_identity(tensor): names[id(tensor)] for _, tensor in _tensors(model)}
    # Code that does not ask a parameter for its loader copies by itself.
    with _loaders(model, note), CopiesFromMeta(skip):
        try:
            load(iter(empty.items()))
        except Exception as error:  # whatever an engine's loading code raises without values
            raise Unfit(f"where its tensors go is not known: {first_line(error)}") from error
    return {name: frozenset(found) for name, found in routes.items()}


@contextlib.contextmanager
def _loaders(model: nn.Module, loader: Callable[..., None]) -> Iterator[None]:
    """Context in which one loader stands in the place of all parameters' own."""
    own: list[tuple[Any, Any]] = []
    seen: set[int] = set()
    try:
        for _, tensor in _tensors(model):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                own.append((tensor, getattr(tensor, "weight_loader", None)))
                tensor.weight_loader = loader  # type: ignore[attr-defined]
        yield
    finally:
        for tensor, before in own:
            if before is None:
                del tensor.weight_loader
            else:
                tensor.weight_loader = before


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
