"""Whether a parameter may be overwritten with its centered weight: only where every use of its storage is that one.

Its uses in the graph are known (``uses``). All others are ruled out, or the weight gets a copy, with the reason:

* *other tensors on its storage* (ties by ``.data``, views, a ``state_dict()`` somebody keeps, NumPy arrays): torch
  counts them.
* *other modules that hold it* (tied heads, shared layers): every living module is asked.
* *other parts of the model*: the graph must be a whole call of a module, without graph breaks, and the parameter must
  be reached through this module alone: nobody else holds a module on the way to it.
* *other graphs of ours* that read it as it is. One that is compiled later restores it first (``in_place.give_back``).

What cannot be seen is code outside of all this that reads ``module.layer.weight`` by itself, and who ties a parameter
after it was overwritten: :func:`lncompile.restore` is for that. (torch's hooks for registered parameters would tell,
but while one is set, Dynamo traces it wherever a model slices a ModuleList.)
"""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, fx, nn

from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.passes.graph.axes import Axes
from lncompile.runtime import in_place
from lncompile.runtime.parameter_identity import ParameterReference, Place


class Reader:
    """How a compiled graph reads its parameters. Lives as long as the graph's code.

    Args:
        parameters: those among its inputs, by position.
        uses: how it reads its inputs, by position (``uses.uses_of``).
    """

    def __init__(
        self, parameters: Mapping[int, ParameterReference], uses: Mapping[int, tuple[Axes, ...] | None]
    ) -> None:
        self._parameters = dict(parameters)
        self._uses = dict(uses)
        _readers.add(self)

    def parameters(self) -> set[int]:
        """The ``id()`` of each of its parameters that lives."""
        identities = (parameter.identity() for parameter in self._parameters.values())
        return {identity for identity in identities if identity is not None}

    def reads_otherwise(self, parameter: Tensor, axes: tuple[Axes, ...]) -> bool:
        """Whether it reads a parameter, alone on its storage, in any other way than centered along these axes."""
        return any(
            along != axes and position in self._parameters and self._parameters[position].identity() == id(parameter)
            for position, along in self._uses.items()
        )


_readers: weakref.WeakSet[Reader] = weakref.WeakSet()


class Survey:
    """Who holds what: one look at every living module of the process, made when it is first asked.

    To be thrown away after use: it keeps the modules alive.
    """

    def __init__(self) -> None:
        self._modules: dict[int, nn.Module] | None = None
        self._owners: dict[int, list[Place]] = defaultdict(list)
        self._parents: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)

    def _look(self) -> None:
        if self._modules is not None:
            return
        # By type(), not isinstance(): other people's objects may do anything when asked for their class.
        self._modules = {id(value): value for value in gc.get_objects() if issubclass(type(value), nn.Module)}
        for module in self._modules.values():
            for name, parameter in (module.__dict__.get("_parameters") or {}).items():
                self._owners[id(parameter)].append(Place(module, name))
            for name, child in (module.__dict__.get("_modules") or {}).items():
                self._parents[id(child)].append((module, name))

    def owners(self, parameter: Tensor) -> list[Place]:
        """The places where modules hold a parameter."""
        self._look()
        return self._owners.get(id(parameter), [])

    def parents(self, module: nn.Module) -> list[tuple[nn.Module, str]]:
        """The modules that hold a module, and under which name; torch.compile's wrapper is none."""
        self._look()
        return [
            (p, name)
            for p, name in self._parents.get(id(module), [])
            if not torch_private_dynamo.is_compiled_wrapper(p)
        ]

    def is_compiled(self, module: nn.Module) -> bool:
        """Whether somebody compiled this very module, not one that it is a part of."""
        self._look()
        wrapped = any(
            torch_private_dynamo.is_compiled_wrapper(parent) for parent, _ in self._parents.get(id(module), [])
        )
        return wrapped or torch_private_dynamo.is_compiled_by_itself(module)

    def way_to(self, parameter: Tensor, root: nn.Module) -> list[tuple[nn.Module, str]] | None:
        """The modules through which a parameter is reached, from the one that holds it to ``root``, with the names."""
        pending: list[list[tuple[nn.Module, str]]] = [[owner] for owner in self.owners(parameter)]
        seen: set[int] = set()
        while pending:
            way = pending.pop()
            module, _ = way[-1]
            if module is root:
                return way
            if id(module) not in seen:
                seen.add(id(module))
                pending += [[*way, parent] for parent in self.parents(module)]
        return None

    def roots(self, parameter: Tensor, name: str) -> list[nn.Module]:
        """The modules in which a parameter has this name."""
        *path, last = name.split(".")
        found = {id(module): module for module, own in self.owners(parameter) if own == last}
        for step in reversed(path):
            found = {id(p): p for module in found.values() for p, own in self.parents(module) if own == step}
        return list(found.values())

    def way_around(self, parameter: Tensor, root: nn.Module) -> nn.Module | None:
        """A module through which a parameter is reached without going through ``root``; None if there is none."""
        pending = [module for module, _ in self.owners(parameter)]
        seen = {id(root)}
        while pending:
            module = pending.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            parents = [parent for parent, _ in self.parents(module)]
            if not parents:
                return module
            pending += parents
        return None


class Ownership:
    """Says for the parameters that one compiled graph is called with whether they may be overwritten.

    Args:
        graph_module: the graph as Dynamo handed it out, while Dynamo is compiling.
        uses: how the rewritten graph reads its inputs, by position (``uses.uses_of``).
    """

    def __init__(self, graph_module: fx.GraphModule, uses: Mapping[int, tuple[Axes, ...] | None]) -> None:
        self._uses = uses
        self._names: dict[int, str] = {}
        self._root: weakref.ref[nn.Module] | None = None
        self._kind: type[nn.Module] = nn.Module
        self._problem: str | None = None
        frame = torch_private_dynamo.frame_being_compiled()
        if frame is None or not isinstance(frame.receiver, nn.Module):
            self._problem = "what was compiled is not a module, so it is not known what else reads the weights"
        elif frame.code not in torch_private_dynamo.codes_of_call(
            frame.receiver
        ) or not torch_private_dynamo.is_whole_frame(graph_module):
            self._problem = "the graph is only a part of its model (a graph break), and the rest may read the weights"
        else:
            self._root, self._kind = weakref.ref(frame.receiver), type(frame.receiver)

    def obstacle(self, position: int, parameter: Tensor, survey: Survey) -> str | None:
        """Say why a parameter may not be overwritten with its centered weight; None if it may.

        Args:
            position: of the input that it is. The graph centers it.
            parameter: what this call passes there.
            survey: a fresh one.
        """
        axes = self._uses.get(position)
        if axes is None:
            return "the graph reads it uncentered as well, or in several ways"
        if self._problem is not None:
            return self._problem
        if in_place.anything_restored() and in_place.was_restored(survey.owners(parameter)):
            return "it was restored; lncompile.refresh() allows it again"
        problem = _problem_with(parameter, axes)
        if problem is not None:
            return problem
        return self._held_elsewhere(position, parameter, survey)

    def _held_elsewhere(self, position: int, parameter: Tensor, survey: Survey) -> str | None:
        if gc.get_freeze_count():
            return "gc.freeze() was called, so it cannot be seen which modules hold it"
        owners = survey.owners(parameter)
        if len(owners) != 1:
            kinds = ", ".join(sorted(f"{type(module).__name__}.{name}" for module, name in owners))
            return f"several modules hold it ({kinds})" if owners else "no module holds it"
        root = self._root_of(position, parameter, survey)
        way = None if root is None else survey.way_to(parameter, root)
        if root is None or way is None:
            return "it is not known which module the compiled graph is called for"
        if survey.parents(root) and not survey.is_compiled(root):
            return "the compiled graph is only a part of its model, and the rest may read the weights"
        other = survey.way_around(parameter, root)
        if other is not None:
            return f"it is reached through another module as well ({type(other).__name__})"
        self._names[position] = ".".join(name for _, name in reversed(way))
        return None

    def _root_of(self, position: int, parameter: Tensor, survey: Survey) -> nn.Module | None:
        """The module whose call this is: the one that was compiled, or one like it for which Dynamo took its code."""
        root = None if self._root is None else self._root()
        if root is not None and survey.way_to(parameter, root) is not None:
            return root
        name = self._names.get(position)
        roots = [] if name is None else [r for r in survey.roots(parameter, name) if type(r) is self._kind]
        return roots[0] if len(roots) == 1 else None


def _problem_with(parameter: Tensor, axes: tuple[Axes, ...]) -> str | None:
    """Say what of a tensor itself, and of its storage, forbids to overwrite it."""
    if not isinstance(parameter, nn.Parameter):
        return "it is a buffer"
    if torch_private.is_opaque_tensor(parameter):
        return f"it is a {type(parameter).__name__}"
    storage = parameter.untyped_storage()
    if storage.nbytes() != parameter.numel() * parameter.element_size():
        return "it is a view of a larger storage"
    if torch_private.tensors_on(storage) > 1:
        return "another tensor lies on its storage (a view, or a state_dict() that is kept)"
    if storage.device.type == "cpu" and (storage.is_shared() or storage.filename is not None):
        return "its storage is a file, or shared with other processes"
    if any(reader.reads_otherwise(parameter, axes) for reader in list(_readers)):
        return "another compiled graph reads it uncentered, or centers it in another way"
    return None


__all__ = ["Ownership", "Reader", "Survey"]
