"""Making a fold plan, and folding a copy of a model with it."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lncompile.lowering import torch_private_dynamo
from lncompile.models.stand_ins import is_on_meta
from lncompile.nn import CenteredEmbedding
from lncompile.plans.absorbing import plan_absorptions
from lncompile.plans.answers import require_same_answers
from lncompile.plans.application import require_no_inference_mode
from lncompile.plans.capture import Call, capture, ready_to_capture
from lncompile.plans.entries import (
    AbsorbedNorm,
    CenteredLookup,
    CenteredParameter,
    Centering,
    KeptParameter,
    PlannedNorm,
    ReplacedNorm,
    class_name,
)
from lncompile.plans.fold_plan import FoldPlan
from lncompile.plans.forms import form_of, without_state
from lncompile.plans.holdings import Holdings, Slot
from lncompile.plans.keeping import kept_as_it_was
from lncompile.plans.legality import Settled, all_lookups, settle
from lncompile.plans.reading import Reading
from lncompile.plans.untying import can_be_untied

#: What the layers behind a folded norm may take of it: β, or γ and β.
ABSORB = ("bias", "affine")


def plan(
    model: nn.Module,
    *args: Any,
    more_calls: Sequence[Call] = (),
    untie: bool = False,
    absorb: str | None = None,
    **kwargs: Any,
) -> FoldPlan:
    """Decide how a model folds, as data that can be kept, read and applied. The model stays as it is.

    The plan folds every norm that folds in all example calls, by centering parameters. What another call would read of
    the same parameters is not known: give an example of each way in which the model is called (a prompt and a step of
    decoding, an encoder and a decoder). A parameter that no example reaches is not touched. Hidden states that a model
    has inside lose their mean; where an example returns them, that stream does not fold.

    On the meta device a model of any size is planned without its weights.

    Args:
        model: in evaluation mode.
        args: an example of what it is called with.
        more_calls: further examples.
        untie: whether a tied table that is looked up in gets a centered copy of its own, where nothing reads it by the
            embedding's own attribute. By default the tie stays, and what is looked up is centered at each call, if two
            norms or more fold for that.
        absorb: what goes from folded norms into the layers that read them, wherever nothing else reads those.
            ``"bias"``: β, into their biases (``b + Wβ``; one is added to an ``nn.Linear`` without); ``"affine"``: γ as
            well, into their weights. What is left is an RMSNorm without β, with γ = 1; None: nothing.
        kwargs: as ``args``.

    Returns:
        The plan. It is empty where nothing folds, or everything is folded already.

    Raises:
        ValueError: for a model in training mode, one that cannot be captured as one program, or another ``absorb``.

    Example:
        >>> plan = lncompile.plan(model, input_ids)
        >>> print(plan)
        >>> plan.save("model.fold.json")
    """
    model = torch_private_dynamo.original_callable(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"plan() takes a module, not a {type(model).__name__}")
    if model.training:
        raise ValueError("the model is in training mode, and folding is for inference: call model.eval() first")
    if absorb is not None and absorb not in ABSORB:
        raise ValueError(f"absorb takes {' or '.join(map(repr, ABSORB))} or None, not {absorb!r}")
    calls = [*([Call(*args, **kwargs)] if args or kwargs or not more_calls else []), *more_calls]
    form = form_of(model)
    has_values = not is_on_meta(model)
    with torch.no_grad(), kept_as_it_was(model), ready_to_capture(model, calls) as ready:
        holdings = Holdings(model)
        programs = [capture(model, call) for call in ready]
        form = without_state(form, form_of(model))
        lookups = all_lookups(programs, holdings) if untie else ()
        own_tables = can_be_untied(model, ready, holdings, lookups)
        settled = settle(programs, holdings, own_tables, with_readers=absorb is not None)
        replace, not_replaced = _norm_modules(settled.readings, holdings)
        center = _centered(settled, holdings)
        if not replace and has_values and all(_is_done(entry, holdings) for entry in center):
            center = []  # a model that was folded before. One with new weights has some that are zero, and others.
        readers = [reading.readers for reading in settled.readings if reading.readers is not None]
        absorbed: tuple[AbsorbedNorm, ...] = ()
        unabsorbed: dict[str, str] = {}
        if absorb is not None:
            absorbed, unabsorbed = plan_absorptions(absorb, replace, readers, holdings, own_tables)
        return FoldPlan(
            form,
            tuple(center),
            tuple(replace.values()),
            _lookups(settled, holdings, own_tables),
            absorbed,
            _norms(settled.readings, replace, not_replaced, unabsorbed, holdings),
            _kept(settled, holdings),
            _unreached(settled.readings, holdings),
        )


def fold(
    model: nn.Module,
    *args: Any,
    more_calls: Sequence[Call] = (),
    untie: bool = False,
    absorb: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Return a copy of a model with its LayerNorms folded: centered weights, and RMSNorms in the norms' places.

    It is a module of the same class, is called as the model is, and has the same names in its state dict. Save, export,
    quantize, shard or compile it like the model.

    Args:
        model: in evaluation mode. It stays as it is.
        args: an example of what it is called with.
        more_calls: further examples, see :func:`plan`.
        untie: as for :func:`plan`.
        absorb: as for :func:`plan`; names of β then leave the state dict, and those of added biases come.
        kwargs: as ``args``.

    Raises:
        ValueError: as for :func:`plan`, and where a weight cannot be written.
        PlanError: where the folded model answers an example in another way: its code depends on what a fold changes,
            such as the class of a norm's module; under ``torch.inference_mode()``; and as for :meth:`FoldPlan.apply`.

    Example:
        >>> folded = lncompile.fold(model, input_ids)
        >>> torch.save(folded.state_dict(), "folded.pt")
    """
    model = torch_private_dynamo.original_callable(model)
    require_no_inference_mode("fold a model")
    found = plan(model, *args, more_calls=more_calls, untie=untie, absorb=absorb, **kwargs)
    folded = found.apply(copy.deepcopy(model))
    if not found.is_empty and not is_on_meta(model):
        calls = [*([Call(*args, **kwargs)] if args or kwargs or not more_calls else []), *more_calls]
        require_same_answers(model, folded, calls)
    return folded


def _centered(settled: Settled, holdings: Holdings) -> list[CenteredParameter]:
    entries = []
    for slot, way in settled.centered.items():
        if slot.lookup or way.becomes_one:
            continue
        held = holdings.named(slot.name)
        centerings = tuple(Centering.of(part) for part in way.axes)
        scales = tuple(scale.name for scale in way.scales)
        shape = tuple(held.tensor.shape)
        entries.append(CenteredParameter(held.names[0], held.names[1:], shape, centerings, scales, way.dimension))
    order = {name: index for index, name in enumerate(dict(holdings.model.named_parameters()))}
    return sorted(entries, key=lambda entry: order.get(entry.name, len(order)))


def _is_done(entry: CenteredParameter, holdings: Holdings) -> bool:
    scales = [holdings.named(name).tensor for name in entry.scaled_by]
    return entry.is_done(holdings.named(entry.name).tensor, scales)


def _lookups(settled: Settled, holdings: Holdings, own_tables: Collection[Slot]) -> tuple[CenteredLookup, ...]:
    entries = []
    for slot in sorted(settled.separate):
        held, paths = holdings.named(slot.name), holdings.paths_of(slot.lookup)
        entries.append(
            CenteredLookup(
                paths[0],
                paths[1:],
                class_name(holdings.modules[slot.lookup]),
                slot.name,
                held.names[1:],
                tuple(held.tensor.shape),
                slot in own_tables,
                held.tensor.numel() * held.tensor.element_size(),
            )
        )
    return tuple(entries)


def _norm_modules(readings: Sequence[Reading], holdings: Holdings) -> tuple[dict[str, ReplacedNorm], dict[str, str]]:
    """Modules that RMSNorm replaces, all programs agreeing, and why it does not replace others."""
    obstacles: dict[str, str] = {}
    found: dict[str, ReplacedNorm] = {}
    for reading in readings:
        for path, obstacle in reading.norm_modules.obstacles.items():
            obstacles.setdefault(path, obstacle)
        for path, entry in reading.norm_modules.replaceable.items():
            if found.setdefault(path, entry) != entry:
                obstacles.setdefault(path, "its calls differ")
    for path in found:
        if any(
            path in reading.norm_modules.called and path not in reading.norm_modules.replaceable for reading in readings
        ):
            obstacles.setdefault(path, "another call of it does not fold")
    return {path: entry for path, entry in found.items() if path not in obstacles}, obstacles


def _norms(
    readings: Sequence[Reading],
    replace: Mapping[str, ReplacedNorm],
    not_replaced: Mapping[str, str],
    unabsorbed: Mapping[str, str],
    holdings: Holdings,
) -> tuple[PlannedNorm, ...]:
    """Every norm of every call, once: the k-th of a name in one call is the k-th of that name in the others."""
    norms: dict[tuple[str, int], PlannedNorm] = {}
    for number, reading in enumerate(readings, 1):
        seen: dict[str, int] = defaultdict(int)
        for verdict in reading.verdicts:
            if verdict.folded_before:
                continue  # it is no LayerNorm any more
            key = verdict.name, seen[verdict.name]
            seen[verdict.name] += 1
            path = verdict.name.partition(":")[0]
            if verdict.folded_before or isinstance(holdings.modules.get(path), CenteredEmbedding):
                continue  # its centering and the next norm's root mean square are a LayerNorm, if one looks for it
            first = holdings.paths_of(path)[0] if path in holdings.modules else path
            becomes, detail = "layer_norm", verdict.detail
            if verdict.folded:
                becomes = "rms_norm" if first in replace else "centered"
                reason = not_replaced.get(first, "its module does not compute it alone")
                detail = verdict.detail if becomes == "rms_norm" else f"{verdict.detail}; {reason}"
                detail += f"; γ and β stay: {unabsorbed[first]}" if first in unabsorbed else ""
            norm = PlannedNorm(verdict.name, verdict.location, becomes, detail)
            known = norms.get(key)
            if known is None:
                norms[key] = norm
            elif known.folded and not norm.folded:
                norms[key] = dataclasses.replace(
                    norm, calls=known.calls + 1, detail=f"{norm.detail} (in call {number})"
                )
            else:
                norms[key] = dataclasses.replace(known, calls=known.calls + 1)
    return tuple(norms.values())


def _kept(settled: Settled, holdings: Holdings) -> tuple[KeptParameter, ...]:
    untouchable = {name for name, _ in holdings.obstacles()}
    separate = {slot.name for slot in settled.separate}
    return tuple(
        KeptParameter(slot.name, reason)
        for slot, reason in settled.kept.items()
        if slot.name not in untouchable | separate
    )


def _unreached(readings: Sequence[Reading], holdings: Holdings) -> tuple[str, ...]:
    read = {slot.name for reading in readings for slot in reading.read}
    return tuple(name for name in holdings.parameters() if name not in read)
