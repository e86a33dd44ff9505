"""Whether a fold plan fits a model: in what the model differs from the one that the plan was made for, in words."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.passes.graph.sharding import is_sharded
from lncompile.plans.entries import ModelForm, PlanError
from lncompile.plans.forms import form_of

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

_SHOWN = 8


def require(model: nn.Module, problems: list[str]) -> None:
    """Raise PlanError where something is wrong.

    Args:
        model: that a plan was to be applied to.
        problems: what is wrong, in words.
    """
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PlanError(f"the plan does not fit this {type(model).__name__}, which stays as it is:{shown}{more}")


def misfits(plan: FoldPlan, model: nn.Module) -> Iterator[str]:
    """In what a model differs from the one that the plan was made for."""
    ours, theirs = plan.form, form_of(model)
    if ours.class_name != theirs.class_name:
        yield f"the plan is of a {ours.class_name}, not of a {theirs.class_name}"
    yield from _other_tensors(plan, ours, theirs)
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = {path for entry in plan.replace for path in (entry.path, *entry.also)}
    lookups = {path for entry in plan.lookups for path in (entry.path, *entry.also)}
    for path in dict.fromkeys((*ours.modules, *theirs.modules)):
        wanted, found = ours.modules.get(path), theirs.modules.get(path)
        if path in replaced and isinstance(modules.get(path), RMSNorm):
            continue
        if path in lookups and isinstance(modules.get(path), CenteredEmbedding):
            continue
        if wanted != found:
            yield f"module '{path}' is {found or 'missing'}, not {wanted or 'there'}"
        else:
            yield from _other_behaviour(path, ours, theirs)


def _other_tensors(plan: FoldPlan, ours: ModelForm, theirs: ModelForm) -> Iterator[str]:
    gone = {entry.bias for entry in plan.absorb}
    added = {layer.bias for entry in plan.absorb for layer in entry.layers if layer.adds_bias}
    for name, shape in ours.tensors.items():
        if name not in theirs.tensors:
            if name in gone:
                continue  # it is absorbed already
            yield f"'{name}' is missing"
        elif tuple(theirs.tensors[name]) != tuple(shape):
            yield f"'{name}' has shape {list(theirs.tensors[name])}, not {list(shape)}"
    for name in theirs.tensors:
        if name not in ours.tensors and name not in added:
            yield f"'{name}' is not in the plan's model"


def _other_behaviour(path: str, ours: ModelForm, theirs: ModelForm) -> Iterator[str]:
    """What a module does otherwise than one of the same class with the same parameters."""
    had, has = ours.settings.get(path, {}), theirs.settings.get(path, {})
    for name in dict.fromkeys((*had, *has)):
        if name in had and had[name] is None:
            continue  # calls change it
        if has.get(name) != had.get(name) or type(has.get(name)) is not type(had.get(name)):
            yield f"'{name}' of module '{path}' is {has.get(name)!r}, not {had.get(name)!r}"
    before, now = ours.hooks.get(path, ()), theirs.hooks.get(path, ())
    if before != now:
        yield (
            f"module '{path}' has {_in_words(now)}, and in the plan's model {_in_words(before)}: remove hooks before "
            "you apply a plan, or make the plan with them"
        )


def _in_words(hooks: Collection[str]) -> str:
    return f"the hooks {', '.join(hooks)}" if hooks else "no hooks"


# --- what is written ---


def unwritable(plan: FoldPlan, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Which parameters cannot be changed as they are.

    Args:
        plan: the plan.
        tensors: all parameters and buffers of the model, by all their names.
    """
    names = [name for entry in plan.center for name in (entry.name, *entry.scaled_by)]
    names += [name for entry in plan.lookups if entry.untied for name in _own_names(entry.path, entry.also)]
    for absorbing in plan.absorb:
        names += [name for name in (absorbing.weight, absorbing.bias) if name is not None]
        for layer in absorbing.layers:
            names += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
            if layer.adds_bias and is_sharded(tensors.get(layer.weight)):
                yield f"'{layer.weight}' is sharded, and a bias is to be added beside it: fold first, then shard"
    memory = {name: _in_memory(tensor) for name, tensor in tensors.items()}
    for name in dict.fromkeys(names):
        tensor = tensors.get(name)
        if tensor is None:
            continue  # said already
        problem = _problem_with(tensor)
        if problem:
            yield f"'{name}' {problem}"
        else:
            yield from _other_ties(name, plan, tensors, memory)


def _own_names(path: str, also: Collection[str]) -> list[str]:
    """The names of an embedding's table that are its own."""
    return [f"{own}.weight" for own in (path, *also)]


def _problem_with(tensor: Tensor) -> str:
    if torch_private.is_opaque_tensor(tensor) and not is_sharded(tensor):
        return f"is a {type(tensor).__name__}, whose values cannot be centered: fold first, then quantize or wrap"
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
        return f"has dtype {tensor.dtype}, in which it cannot be centered"
    if tensor.is_inference():
        return "was made under torch.inference_mode(): make or load the model outside of it"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values"
    if tensor.layout is not torch.strided:
        return f"has layout {tensor.layout}"
    if tensor.numel() > 0 and 0 in tensor.stride():
        return "is expanded: several of its elements are one number in memory"
    return ""


def _other_ties(
    name: str, plan: FoldPlan, tensors: Mapping[str, Tensor], memory: Mapping[str, _Memory | None]
) -> Iterator[str]:
    """Names that are one tensor with a name where they were not in the plan's model, and the other way round."""
    was = next((set(group) for group in plan.form.tied if name in group), {name})
    free: set[str] = set()
    for entry in plan.lookups:
        own = set(_own_names(entry.path, entry.also))
        if entry.untied and was & {entry.table, *entry.tied, *own}:
            free |= own if name not in own else was  # the tie is to be cut, or is cut already
    tensor, own_memory = tensors[name], memory[name]
    for other, value in tensors.items():
        if other == name or other in free:
            continue
        if value is tensor or _are_one(memory[other], own_memory):
            if other not in was:
                yield f"'{other}' is tied to '{name}': it was not tied"
        elif other in was:
            yield f"'{other}' is not tied to '{name}': it was tied"
        elif _overlap(memory[other], own_memory):
            yield f"'{other}' shares its memory with '{name}', and centering that would change it"


def is_one(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same elements of memory in the same order."""
    return one is other or _are_one(_in_memory(one), _in_memory(other))


class _Memory(NamedTuple):
    """Where the elements of a tensor are.

    Attributes:
        device: whose memory it is.
        start: the address of the first byte.
        end: the address behind the last one.
        order: how the elements lie in it.
    """

    device: torch.device
    start: int
    end: int
    order: tuple[object, ...]


def _in_memory(tensor: Tensor) -> _Memory | None:
    """Where the elements of a tensor are; of a sharded one those of this process. None where that cannot be known."""
    shape = tuple(tensor.shape)
    if is_sharded(tensor):
        tensor = torch_private.local_tensor(tensor)
    if torch_private.is_opaque_tensor(tensor) or tensor.layout is not torch.strided or tensor.device.type == "meta":
        return None
    if tensor.numel() == 0:
        return None
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    order = (shape, tensor.stride(), tensor.dtype)
    return _Memory(tensor.device, start, start + length * tensor.element_size(), order)


def _are_one(one: _Memory | None, other: _Memory | None) -> bool:
    return one is not None and one == other


def _overlap(one: _Memory | None, other: _Memory | None) -> bool:
    """Whether the stretches of memory that two tensors lie in have bytes in common."""
    if one is None or other is None:
        return False
    return one.start < other.end and other.start < one.end and one.device == other.device
