"""Weights are centered once, not per call: parameter expressions leave the graph and become extra inputs.

Each centered parameter expression of the graph was cut out into a small graph of its own (:mod:`.expressions`), and a
placeholder took its place. At each call a :class:`Materializer` supplies the values, computed under
``torch.no_grad()`` from the parameters *that arrive in this call* and kept while these are the same tensors and nobody
writes to them (``parameter_state``). A parameter that came centered is passed as it is. Nothing is baked in: Dynamo
reuses one compiled graph for several parameter sets, and in-place updates, ``load_state_dict`` or a swapped Parameter
cause no recompile.
"""

from __future__ import annotations

import itertools
import logging
import operator
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.overrides import has_torch_function

from lncompile.lowering import HostWords, Look, can_compare, torch_private
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.graph.sharding import local_bytes
from lncompile.passes.rewrites.arithmetic import is_centered
from lncompile.runtime.cuda_streams import CudaStreamOrder
from lncompile.runtime.parameter_identity import LifetimeReference, watch
from lncompile.runtime.parameter_state import ParameterState, addresses_of, version_of
from lncompile.runtime.renewals import Renewals, say_given_up, say_written_unseen
from lncompile.runtime.shared_values import Entry, lock, shared_values
from lncompile.runtime.weight_samples import lies_within, local

log = logging.getLogger("lncompile")


@dataclass(frozen=True)
class Stored:
    """How the value of an expression is kept.

    Attributes:
        storage: ``"copy"`` beside the model, ``"centered"``: the parameter as it came.
        bytes: what that takes of memory.
        version: of the parameter, where that is what holds the value.
    """

    storage: str
    bytes: int
    version: int | None = None


_materializers: weakref.WeakSet[Materializer] = weakref.WeakSet()


def forget_all() -> None:
    """Forget every materialised tensor: the next call of each compiled graph computes its own anew."""
    for materializer in list(_materializers):
        materializer.begin_anew()
    shared_values.clear()


def _forget_sets() -> None:
    for materializer in list(_materializers):
        materializer.refresh()


class _ParameterSet:
    """The values for one set of parameters that a graph was called with.

    Args:
        state: of the parameters.
        values: for each expression the copy that holds its value, or the position of the parameter that does. Of
            parameters no reference is kept: that they are freed ends the state.
        stored: how each is kept.
        arguments: how many the graph is called with.
        plain: whether no parameter's class has a ``__torch_function__`` of its own, which would be asked at every call.
    """

    def __init__(
        self,
        state: ParameterState,
        values: Sequence[Entry | int],
        stored: Sequence[Stored],
        arguments: int,
        plain: bool,
    ) -> None:
        self.state, self._plain = state, plain
        self.is_current = state.is_current if plain else _asked_plainly(state.is_current)
        self.stored = tuple(stored)
        self._entries = [value for value in values if isinstance(value, Entry)]
        self.values = [entry.value for entry in self._entries]
        copies = itertools.count(arguments)
        places = tuple(value if isinstance(value, int) else next(copies) for value in values)
        self._choose = None if len(self.values) == len(places) else chooser(places)
        on_gpus = [local(value) for value in self.values if value.device.type == "cuda"]
        self._order = CudaStreamOrder(on_gpus) if on_gpus else None

    @property
    def are_plain_values(self) -> bool:
        """Whether taking the values is no work, and asking for them no work but the look."""
        return self._choose is None and self._order is None and self._plain

    def take(self, arguments: Sequence[Any]) -> Sequence[Tensor]:
        """The values, some of which may be among the arguments."""
        if self._order is not None:
            self._order.join()
        return self.values if self._choose is None else self._choose((*arguments, *self.values))


def _keeps_nothing(leaf: Tensor) -> bool:
    """Whether nothing that is computed of a parameter at this moment may be kept for other calls.

    Changes of what was made under ``inference_mode`` cannot be seen, and what is computed while a CUDA graph is
    captured has no value until that graph is replayed.
    """
    return leaf.is_inference() or (leaf.device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _asked_plainly(is_current: Callable[[tuple[Tensor, ...]], bool]) -> Callable[[tuple[Tensor, ...]], bool]:
    def ask(tensors: tuple[Tensor, ...]) -> bool:
        with torch_private.as_plain_tensors():
            return is_current(tensors)

    return ask


class Materializer:
    """Supplies the values of a graph's expressions for the arguments of one call.

    Example:
        >>> values = materializer(arguments)      # arguments: what Dynamo passes to the compiled graph
        >>> outputs = compiled(*arguments, *values)

    Args:
        expressions: of the graph.
        names: of the graph's placeholders, for messages.
        check: how every call looks whether a parameter has changed since its values were computed: by ``"values"``, by
            ``"versions"``, or not at all (``"off"``), where a set of parameters is recognised by which ones they are.
        can_be_given_up: whether something else can be called where values do not last (``keeps_up``).

    Attributes:
        expressions: of the graph.
        names: of the graph's placeholders, for messages.
        settled: how to ask, in one call of a function in C, whether a call has the parameters of the last one,
            unchanged, and their values. None where there is more to do. A model's work pushes everything out of the
            cache, and each function in Python that runs then waits for memory.
        keeps_up: whether values last for more than a few calls. Where they did not, no more are supplied until the
            parameters have stayed for a while (:class:`Renewals`), or :func:`forget_all`.
    """

    def __init__(
        self,
        expressions: Sequence[Expression],
        names: Sequence[str] = (),
        check: str = "values",
        can_be_given_up: bool = True,
    ) -> None:
        self.expressions = tuple(expressions)
        self.settled: tuple[Look, Sequence[Tensor]] | None = None
        self.keeps_up = True
        self.names = tuple(names)
        self._check = check != "off"
        self._samples = check == "values"
        self._can_be_given_up = can_be_given_up
        self._renewals = Renewals()
        self._leaves = tuple(sorted({leaf for expression in expressions for leaf in expression.leaves}))
        self._choose_leaves = chooser(self._leaves)
        # By the identities of the parameters: one compiled graph may serve many equal blocks in turn.
        self._sets: dict[bytes, _ParameterSet] = {}
        # The first parameter of each set that there was, for reports: also of those whose values did not last.
        self._served: dict[int, LifetimeReference] = {}
        _materializers.add(self)

    def __call__(self, arguments: Sequence[Any]) -> Sequence[Tensor] | None:
        """Return the value of each expression for these arguments; None where that does not pay (``keeps_up``).

        Args:
            arguments: the values of the original placeholders, in order.
        """
        if not self._leaves:
            return []
        if not self.keeps_up:
            if not self._renewals.have_ended(arguments[self._leaves[0]]):
                return None
            self.keeps_up = True
        leaves = self._choose_leaves(arguments)
        known = self._sets.get(addresses_of(leaves))
        if known is not None and (not self._check or known.is_current(leaves)):
            self._renewals.spared()
            if self.settled is None and self._renewals.are_forgotten and len(self._sets) == 1:
                self._settle(known, arguments)
            return known.take(arguments)
        return self._renewed(arguments, leaves, known)

    def _settle(self, known: _ParameterSet, arguments: Sequence[Any]) -> None:
        """Leave the calls to come to the look in C, as long as they bring the same parameters."""
        look: Look | None = None
        leaves = self._choose_leaves(arguments)
        if known.are_plain_values and self._check:
            look = known.state.look_within(self._leaves, len(arguments))
        elif known.are_plain_values and can_compare():
            look = Look(HostWords(leaves, ()), self._leaves, len(arguments))  # which ones they are, and no more
        if look is not None:
            self.settled = look, known.values
            if self._sets.get(addresses_of(leaves)) is not known:  # another thread forgot it meanwhile
                self.settled = None

    def _forget(self, first: bytes | None = None) -> None:
        """Forget the values for one set of parameters, or for all."""
        if first is None:
            self._sets.clear()
        else:
            self._sets.pop(first, None)
        self.settled = None

    def _renewed(
        self, arguments: Sequence[Any], leaves: tuple[Tensor, ...], known: _ParameterSet | None
    ) -> Sequence[Tensor] | None:
        """The values for parameters that were not seen before or have changed."""
        with torch_private.as_plain_tensors(), lock:
            current = self._sets.get(addresses_of(leaves))
            if current is not None and current is not known and current.is_current(leaves):
                return current.take(arguments)  # another thread was faster
            # Where gradients are recorded a checkpoint may compute again later what was computed before, and has to get
            # the same: there it goes on.
            too_many = self._renewals.are_too_many(len(self._sets))
            if too_many and self._can_be_given_up and not torch.is_grad_enabled():
                self.keeps_up = False
                self._forget()
                say_given_up(self._name(0), len(leaves))
                return None
            if any(map(_keeps_nothing, leaves)):
                return [e.evaluate([arguments[index] for index in e.leaves]) for e in self.expressions]
            written = [] if known is None else known.state.written_unseen(leaves)
            if written:
                # torch counts no update of running statistics either, which is not a write of the user's.
                by_user = [index for index in written if isinstance(leaves[index], torch.nn.Parameter)]
                late = leaves[written[0]].device.type == "cuda"
                name = self._name((by_user or written)[0])
                say_written_unseen(name, len(written), late=late, by_user=bool(by_user))
            return self._refresh(arguments).take(arguments)

    def _name(self, leaf: int) -> str:
        return self.names[self._leaves[leaf]] if self.names else f"parameter {self._leaves[leaf]} of the graph"

    def begin(self, arguments: Sequence[Any]) -> tuple[Sequence[Tensor], tuple[Stored, ...]]:
        """Return the values for the arguments that a graph is compiled with, and how each is kept."""
        if not self._leaves:
            return (), ()
        known = self._refresh(arguments)
        return known.take(arguments), known.stored

    def seen(self) -> set[int]:
        """Ids of the living parameters that values were supplied for."""
        sets = {parameter for known in list(self._sets.values()) for parameter in known.state.living()}
        return sets | {parameter for parameter, lifetime in list(self._served.items()) if lifetime() is not None}

    def refresh(self) -> None:
        """Forget all values, so that the next call computes them anew."""
        self._renewals.excuse(len(self._sets))
        self._forget()

    def begin_anew(self) -> None:
        """Forget all values, and that they did not last."""
        self.refresh()
        self.keeps_up, self._renewals = True, Renewals()

    def forget(self, parameters: set[int]) -> None:
        """Forget the values made from any of these, given by their ids; none if changes are not to be looked for."""
        for first, known in list(self._sets.items()) if self._check else ():
            if not parameters.isdisjoint(known.state.living()):
                self._forget(first)

    def _refresh(self, arguments: Sequence[Any]) -> _ParameterSet:
        leaves = self._choose_leaves(arguments)
        # DDP has the pieces of a model compiled with fake parameters: no call has these.
        are_real = torch_private.fake_mode_of(leaves) is None
        for index, leaf in enumerate(leaves if are_real else ()):
            if not lies_within(local(leaf), local(leaf).untyped_storage()):
                raise RuntimeError(
                    f"weight '{self._name(index)}' has no memory: its storage was given back or made smaller (resize_)"
                )
        first = addresses_of(leaves)
        living = {parameter: lifetime for parameter, lifetime in self._served.items() if lifetime() is not None}
        self._served = {**living, id(leaves[0]): watch(leaves[0])}
        own = weakref.ref(self)

        def forget(ended: ParameterState) -> None:
            materializer = own()
            known = None if materializer is None else materializer._sets.get(first)
            # A later owner of the same id may have put its own set there.
            if materializer is not None and known is not None and known.state is ended:
                materializer._forget(first)

        values: list[Entry | int] = []
        kept: list[Stored] = []
        anything_outdated = False
        with lock, torch_private.as_plain_tensors():
            # Before the values are computed, see Entry.
            state = ParameterState(leaves, forget, values=self._samples and are_real)
            for index, expression in enumerate(self.expressions):
                held = self._held(index, arguments)
                if held is not None and held.version is not None:
                    (leaf,) = expression.leaves
                    values.append(leaf)
                    kept.append(held)
                    state.expect(self._leaves.index(leaf), held.version, leaves)
                else:
                    given = tuple(arguments[leaf] for leaf in expression.leaves)
                    entry, outdated = shared_values.get(expression, given)
                    values.append(entry)
                    kept.append(Stored("copy", local_bytes(entry.value)))
                    anything_outdated |= outdated
        if anything_outdated:
            log.debug("a weight was written to through .data: every compiled graph computes its centered weights anew")
            _forget_sets()
        fresh = _ParameterSet(state, values, kept, len(arguments), not has_torch_function(leaves))
        self._sets[first] = fresh
        self.settled = None
        return fresh

    def plan(self, arguments: Sequence[Any]) -> tuple[Stored, ...]:
        """Say how the values would be kept for these arguments, without computing any.

        The bytes of copies are left out: nothing is computed that has any.
        """
        with lock:
            held = [self._held(index, arguments) for index in range(len(self.expressions))]
        return tuple(Stored("copy", 0) if kept is None else kept for kept in held)

    def _held(self, index: int, arguments: Sequence[Any]) -> Stored | None:
        """How a parameter holds the value of an expression; None if it does not."""
        axes = self.expressions[index].centered_along
        # Without the check a copy outlives changes of the parameter, which holds nothing but the latest.
        if axes is None or not self._check:
            return None
        parameter = arguments[self.expressions[index].leaves[0]]
        if torch_private.is_opaque_tensor(parameter) or torch_private.fake_mode_of([parameter]) is not None:
            return None
        with torch_private.as_plain_tensors():
            version = version_of(parameter)
            return Stored("centered", 0, version=version) if is_centered(parameter.detach(), axes) else None


def _forget_after_step(optimizer: Optimizer, *_: object) -> None:
    """Fused optimizers count no write (torch 2.13), and others may not: what an optimizer stepped is outdated."""
    if torch.compiler.is_compiling():
        return  # a compiled step: what AOTAutograd compiles does count
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for materializer in list(_materializers):
        materializer.forget(stepped)


register_optimizer_step_post_hook(_forget_after_step)


def chooser(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the items at some indices out of a sequence, always as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    return lambda items: tuple(items[index] for index in indices)
