"""Applying a fold plan to a model: everything is checked first, then modules are exchanged and parameters centered."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.passes.graph.sharding import is_sharded, sharded_like
from lncompile.passes.rewrites.arithmetic import EXACT, add_means
from lncompile.plans.absorbed_values import Absorption, Means, absorbed, scales_of, shifted, whole_tensor, zero_biases
from lncompile.plans.entries import CenteredLookup, CenteredParameter, Centering, PlanError, ReplacedNorm
from lncompile.plans.holdings import form_of
from lncompile.plans.norm_modules import rms_norm_of

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

_SHOWN = 8


def apply(plan: FoldPlan, model: nn.Module) -> nn.Module:
    """Do what :meth:`FoldPlan.apply` promises."""
    model = torch_private_dynamo.original_callable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = _named_tensors(model)
    _require(model, [*_misfits(plan, model), *_unwritable(plan, tensors)])
    with torch.no_grad():
        exchanges = _exchanges(plan, modules)
        tables = _own_tables(plan, modules, tensors)
        means = {entry.name: (entry, taken) for entry, taken in _means(plan, tensors)}
        absorption = absorbed(plan, tensors, means)
        _write(tensors, means, absorption)
        _put_tables(model, tables)
        _exchange(model, exchanges)
        _finish_absorption(plan, model, absorption.added)
    return model


def replace_modules(plan: FoldPlan, model: nn.Module) -> nn.Module:
    """Do what :meth:`FoldPlan.replace_modules` promises."""
    model = torch_private_dynamo.original_callable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = _named_tensors(model)
    _require(model, list(_misfits(plan, model)))
    exchanges = _exchanges(plan, modules)
    made: dict[str, nn.Parameter] = {}
    tables = []
    for entry, module in _still_tied(plan, modules, tensors):
        if entry.table not in made:
            made[entry.table] = nn.Parameter(module.weight.detach().clone(), module.weight.requires_grad)
        tables.append((module, made[entry.table]))
    _warn_of_values(plan, model, tensors)
    _put_tables(model, tables)
    _exchange(model, exchanges)
    _finish_absorption(plan, model, zero_biases(plan, tensors))
    return model


def _warn_of_values(plan: FoldPlan, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Warn where a model has values that were not folded: with other modules alone it computes something else."""
    with torch.no_grad():
        for entry in plan.center:
            tensor = tensors[entry.name]
            if tensor.device.type == "meta" or torch_private.is_opaque_tensor(tensor):
                continue
            if _has_means(entry, tensor):
                warnings.warn(
                    f"'{entry.name}' of this {type(model).__name__} is not centered: load the state dict of a folded "
                    "model next, or call plan.apply(model) instead of plan.replace_modules(model), which folds these",
                    stacklevel=4,
                )
                return


def _has_means(entry: CenteredParameter, tensor: Tensor) -> bool:
    """Whether a parameter is far from centered, and not only by the rounding of its dtype.

    Means of n independent numbers are as large as these numbers divided by √n. What rounding to bfloat16 leaves of them
    is a thousandth of that.
    """
    size = tensor.to(EXACT).square().mean().sqrt()
    left = (
        mean.square().mean().sqrt() * math.sqrt(int(axes.count))
        for mean, axes in zip(entry.means(whole_tensor(tensor)), entry.axes(), strict=True)
    )
    return any(bool(part > 0.1 * size) for part in left)


def _require(model: nn.Module, problems: list[str]) -> None:
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
        more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise PlanError(f"the plan does not fit this {type(model).__name__}, which stays as it is:{shown}{more}")


# --- what is checked ---


def _misfits(plan: FoldPlan, model: nn.Module) -> Iterator[str]:
    """In what a model differs from the one that the plan was made for."""
    ours, theirs = plan.form, form_of(model)
    if ours.class_name != theirs.class_name:
        yield f"the plan is of a {ours.class_name}, not of a {theirs.class_name}"
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
            continue
        has, had = theirs.settings.get(path, {}), ours.settings.get(path, {})
        for name in dict.fromkeys((*had, *has)):
            if has.get(name) != had.get(name):
                yield f"'{name}' of module '{path}' is {has.get(name)!r}, not {had.get(name)!r}"


def _unwritable(plan: FoldPlan, tensors: dict[str, Tensor]) -> Iterator[str]:
    """Which parameters cannot be centered as they are."""
    names = [name for entry in plan.center for name in (entry.name, *entry.scaled_by)]
    names += [entry.table for entry in plan.lookups if entry.untied]
    for absorbing in plan.absorb:
        names += [name for name in (absorbing.weight, absorbing.bias) if name is not None]
        for layer in absorbing.layers:
            names += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
            if layer.adds_bias and is_sharded(tensors.get(layer.weight)):
                yield f"'{layer.weight}' is sharded, and a bias is to be added beside it: fold first, then shard"
    for name in dict.fromkeys(names):
        tensor = tensors.get(name)
        if tensor is None:
            continue  # said already
        problem = _problem_with(tensor)
        if problem:
            yield f"'{name}' {problem}"
    for entry in plan.center:
        tensor = tensors.get(entry.name)
        names_here = {name for name, other in tensors.items() if other is tensor}
        for name in sorted({entry.name, *entry.also} ^ names_here) if tensor is not None else ():
            was = "not tied" if name in names_here else "tied"
            yield f"'{name}' is {'tied' if name in names_here else 'not tied'} to '{entry.name}': it was {was}"


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


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


# --- what is done ---

_Exchange = tuple[tuple[str, ...], nn.Module]


def _exchanges(plan: FoldPlan, modules: dict[str, nn.Module]) -> list[_Exchange]:
    """The modules to put in, each with its paths. They are made before anything is changed: making one may fail."""
    exchanges: list[_Exchange] = []
    problems: list[str] = []

    def make(entry: ReplacedNorm | CenteredLookup, function: Callable[[nn.Module], nn.Module]) -> None:
        try:
            exchanges.append(((entry.path, *entry.also), function(modules[entry.path])))
        except ValueError as error:
            problems.append(f"module '{entry.path}': {error}")

    for norm in plan.replace:
        if not isinstance(modules[norm.path], RMSNorm):
            make(norm, lambda module, norm=norm: rms_norm_of(norm, module))  # type: ignore[misc]
    for lookup in plan.lookups:
        if not lookup.untied and not isinstance(modules[lookup.path], CenteredEmbedding):
            make(lookup, CenteredEmbedding.in_place_of)  # type: ignore[arg-type]
    if problems:
        raise PlanError("the plan cannot be applied, and nothing was changed:" + "".join(f"\n  {p}" for p in problems))
    return exchanges


def _exchange(model: nn.Module, exchanges: list[_Exchange]) -> None:
    for paths, module in exchanges:
        for path in paths:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)


def _own_tables(
    plan: FoldPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> list[tuple[nn.Embedding, nn.Parameter]]:
    """A centered table for each embedding that is untied; one for all embeddings that shared it."""
    made: dict[str, nn.Parameter] = {}
    tables = []
    for entry, module in _still_tied(plan, modules, tensors):
        if entry.table not in made:
            rows = CenteredParameter(entry.table, (), entry.shape, (Centering(entry.shape, (1,)),))
            value = add_means(module.weight, -rows.means(module.weight)[0], rows.axes()[0])
            made[entry.table] = nn.Parameter(value.to(module.weight.dtype), module.weight.requires_grad)
        tables.append((module, made[entry.table]))
    return tables


def _still_tied(
    plan: FoldPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> Iterator[tuple[CenteredLookup, nn.Embedding]]:
    """The embeddings that are to be untied, and are not yet."""
    untied = [entry for entry in plan.lookups if entry.untied]
    own = {f"{path}.weight" for entry in untied for path in (entry.path, *entry.also)}
    for entry in untied:
        module = modules[entry.path]
        others = {entry.table, *entry.tied} - own
        if isinstance(module, nn.Embedding) and any(tensors[name] is module.weight for name in others):
            yield entry, module


def _put_tables(model: nn.Module, tables: Sequence[tuple[nn.Embedding, nn.Parameter]]) -> None:
    for module, table in tables:
        module.weight = table
    config: Any = getattr(model, "config", None)
    if tables and getattr(config, "tie_word_embeddings", False):
        # transformers would tie them again where the model is loaded.
        config.tie_word_embeddings = False


def _means(plan: FoldPlan, tensors: dict[str, Tensor]) -> Iterator[tuple[CenteredParameter, Sequence[Tensor]]]:
    """The means of each parameter that is not centered yet. Those of a sharded one are of the whole tensor."""
    for entry in plan.center:
        whole, scales = whole_tensor(tensors[entry.name]), scales_of(entry, tensors)
        if not entry.is_done(whole, scales):
            yield entry, entry.means(entry.scaled(whole, scales))


def _write(tensors: dict[str, Tensor], means: Means, absorption: Absorption) -> None:
    """Write into parameters. A failure puts back what was there; means up to one rounding."""
    undo: list[Callable[[], object]] = []
    try:
        for name, (entry, taken) in means.items():
            if name not in absorption.values:
                tensor = tensors[name]
                _shift(entry, tensor, [-mean for mean in taken])
                undo.append(functools.partial(_shift, entry, tensor, taken))
        for name, value in absorption.values.items():
            before = tensors[name].clone()
            undo.append(functools.partial(tensors[name].copy_, before))
            _put(tensors[name], value())
    except BaseException:
        for step in undo:
            step()
        raise


def _shift(entry: CenteredParameter, tensor: Tensor, means: Sequence[Tensor]) -> None:
    """Add a number to each group of elements, in float64, and round once."""
    _put(tensor, shifted(entry, whole_tensor(tensor), means))


def _put(tensor: Tensor, value: Tensor) -> None:
    value = value.to(tensor.dtype)
    tensor.copy_(sharded_like(tensor, value) if is_sharded(tensor) else value)


def _finish_absorption(plan: FoldPlan, model: nn.Module, added: Mapping[str, nn.Parameter]) -> None:
    """Give layers the biases they had not, and take β from the norms."""
    for name, value in added.items():
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path).register_parameter(attribute, value)
    for entry in plan.absorb:
        if entry.bias is not None:
            model.get_submodule(entry.path).register_parameter(entry.bias.rpartition(".")[2], None)
