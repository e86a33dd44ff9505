"""Which parameter is which, without a weak reference to any of them.

``torch.utils.swap_tensors`` exchanges what two Python objects hold. ``module.to()`` and ``load_state_dict`` call it
where ``torch.__future__.set_swap_module_params_on_conversion(True)`` is set, and for some classes of parameters always.
It refuses for a tensor with weak references, to the Python object or to what it holds. So there are none here, and a
parameter is known in two other ways:

* by its **lifetime**: a small object among the parameter's own attributes, which nothing else holds. A weak reference
  to the lifetime tells when the parameter is freed, though its storage may live on and its ``id()`` be used again.
  ``swap_tensors`` moves the attributes along with the contents, so a lifetime belongs to what a parameter holds.
* by its **place**: the module that holds it, and its name there. Whatever a model computes with after a conversion or
  a load, it finds there.
"""

from __future__ import annotations

import ast
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from lncompile.lowering import torch_private, torch_private_dynamo

_ATTRIBUTE = "_lncompile_lifetime"


class _Lifetime:
    """An attribute of one tensor, freed together with it. A copy of the tensor gets one of its own, or none."""

    __slots__ = ("__weakref__", "owner")

    def __init__(self, owner: int) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, ()  # a class that every reader of saved tensors knows, `torch.load(weights_only=True)` too


LifetimeReference = weakref.ref[_Lifetime]


def watch(tensor: Tensor, ended: Callable[[LifetimeReference], object] | None = None) -> LifetimeReference:
    """Return a weak reference to the lifetime of what a tensor holds; it keeps nothing of the tensor alive.

    Args:
        tensor: the real one that a call passes, a parameter or a buffer.
        ended: called with the reference when the tensor is freed.
    """
    attributes = tensor.__dict__
    lifetime = attributes.get(_ATTRIBUTE)
    # Attributes that somebody copied from another tensor end with that one, or later.
    if not isinstance(lifetime, _Lifetime) or lifetime.owner != id(tensor):
        lifetime = attributes[_ATTRIBUTE] = _Lifetime(id(tensor))
    return weakref.ref(lifetime, ended)


class Place(NamedTuple):
    """Where a parameter or buffer is held.

    Attributes:
        module: that holds it.
        name: under which, without the module's own.
    """

    module: nn.Module
    name: str

    def tensor(self) -> Tensor | None:
        """What stands there at present. No property is computed, as one of a parametrization would be."""
        return held_by(self.module).get(self.name)


def held_by(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers that a module holds itself, by name."""
    held = {**(module.__dict__.get("_parameters") or {}), **(module.__dict__.get("_buffers") or {})}
    return {name: tensor for name, tensor in held.items() if isinstance(tensor, Tensor)}


def places_of(graph: fx.Graph) -> list[Place | None]:
    """Return the place of each placeholder's tensor, while Dynamo is compiling the graph; None where it is unknown.

    It is known where Dynamo reached the tensor through a module's parameters or buffers, whatever the module stands in.
    """
    scope = torch_private_dynamo.scope_being_compiled()
    return [_place_of(node, scope) for node in graph.nodes if node.op == "placeholder"]


def _place_of(placeholder: fx.Node, scope: Mapping[str, Any]) -> Place | None:
    source = torch_private.source_name(placeholder)
    match ast.parse(source, mode="eval").body if source else None:
        case ast.Subscript(ast.Attribute(module, "_parameters" | "_buffers"), ast.Constant(str(name))):
            holder = _look_up(module, scope)
        case ast.Attribute(module, name):
            holder = _look_up(module, scope)
        case _:
            return None
    return Place(holder, name) if isinstance(holder, nn.Module) and name in held_by(holder) else None


def _look_up(expression: ast.expr, scope: Mapping[str, Any]) -> Any:
    """The value of a chain of attributes and constant subscripts; None of anything else."""
    match expression:
        case ast.Name(name):
            return scope.get(name)
        case ast.Attribute(owner, name):
            return getattr(_look_up(owner, scope), name, None)
        case ast.Subscript(owner, ast.Constant(key)):
            container = _look_up(owner, scope)
            if isinstance(container, dict):
                return container.get(key)
            if isinstance(container, list | tuple) and isinstance(key, int) and key < len(container):
                return container[key]
    return None


class ParameterReference:
    """A parameter to be recognised later, whatever it holds by then.

    Args:
        tensor: the parameter or buffer.
        place: where it is held. Whatever stands there is the parameter from then on: what ``load_state_dict`` assigned,
            and what ``swap_tensors`` moved there. Without one it is this very object, until it is freed or swapped.
    """

    def __init__(self, tensor: Tensor, place: Place | None) -> None:
        self._id = id(tensor)
        self._module, self._name, self._lifetime = None, "", None
        if place is None:
            self._lifetime = watch(tensor)
        else:
            self._module, self._name = weakref.ref(place.module), place.name

    def identity(self) -> int | None:
        """The ``id()`` of the living parameter; None where it was freed."""
        if self._module is None:
            return self._id if self._lifetime is not None and self._lifetime() is not None else None
        module = self._module()
        tensor = None if module is None else Place(module, self._name).tensor()
        return None if tensor is None else id(tensor)


def parameters_of(graph: fx.Graph, example_inputs: Sequence[Any]) -> dict[int, ParameterReference]:
    """Return the parameters among the inputs of a graph that is being compiled, by position.

    Args:
        graph: as Dynamo made it.
        example_inputs: the real value of each placeholder.
    """
    pairs = zip(example_inputs, places_of(graph), strict=True)
    return {
        position: ParameterReference(value, place)
        for position, (value, place) in enumerate(pairs)
        if isinstance(value, nn.Parameter)
    }


__all__ = ["LifetimeReference", "ParameterReference", "Place", "held_by", "parameters_of", "places_of", "watch"]
