"""Applying a fold plan to a model: everything is checked first, then modules are exchanged and parameters centered."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.passes.graph.sharding import is_sharded, sharded_like
from lncompile.passes.rewrites.arithmetic import EXACT, add_means
from lncompile.plans.absorbed_values import (
    TOO_LARGE,
    Absorption,
    Means,
    absorbed,
    lost_in,
    means_in,
    shifted,
    whole_tensor,
    zero_biases,
)
from lncompile.plans.entries import CenteredLookup, CenteredParameter, Centering, PlanError, ReplacedNorm
from lncompile.plans.fitting import is_one, misfits, require, unwritable
from lncompile.plans.keeping import undone_on_failure
from lncompile.plans.norm_modules import rms_norm_of

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan


def apply(plan: FoldPlan, model: nn.Module) -> nn.Module:
    """Do what :meth:`FoldPlan.apply` promises."""
    model = torch_private_dynamo.original_callable(model)
    require_no_inference_mode("apply a plan")
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = _named_tensors(model)
    require(model, [*misfits(plan, model), *unwritable(plan, tensors)])
    with torch.no_grad():
        exchanges = _exchanges(plan, modules)
        tables = _own_tables(plan, modules, tensors)
        means = means_in((*plan.center, *_own_rows(plan, modules, tensors)), tensors)
        absorption = absorbed(plan.absorb, tensors, means)
        require(model, [*_unrepresentable(tensors, means, absorption, tables)])
        with undone_on_failure(model):
            _put_tables(model, tables)
            _exchange(model, exchanges)
            _finish_absorption(plan, model, absorption.added)
            _write(tensors, means, absorption)  # last: what was written is put back to the rounding of its dtype alone
    return model


def require_no_inference_mode(what: str) -> None:
    """Raise PlanError under ``torch.inference_mode()``.

    Args:
        what: cannot be done there, in words.
    """
    if torch.is_inference_mode_enabled():
        raise PlanError(
            f"you cannot {what} under torch.inference_mode(): what is made and written there nothing can notice later. "
            "Do it before, outside of that context (torch.no_grad() is no obstacle)"
        )


def replace_modules(plan: FoldPlan, model: nn.Module) -> nn.Module:
    """Do what :meth:`FoldPlan.replace_modules` promises."""
    model = torch_private_dynamo.original_callable(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    tensors = _named_tensors(model)
    require(model, list(misfits(plan, model)))
    exchanges = _exchanges(plan, modules)
    made: dict[str, nn.Parameter] = {}
    tables = []
    for entry, module in _still_tied(plan, modules, tensors):
        if entry.table not in made:
            made[entry.table] = nn.Parameter(module.weight.detach().clone(), module.weight.requires_grad)
        tables.append((module, made[entry.table]))
    _warn_of_values(plan, model, tensors)
    with undone_on_failure(model):
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
            rows = _rows_of(entry.table, entry)
            value = add_means(module.weight, -rows.means(module.weight)[0], rows.axes()[0])
            made[entry.table] = nn.Parameter(value.to(module.weight.dtype), module.weight.requires_grad)
        tables.append((module, made[entry.table]))
    return tables


def _rows_of(name: str, entry: CenteredLookup) -> CenteredParameter:
    """How a table is centered that an embedding has for itself."""
    return CenteredParameter(name, (), entry.shape, (Centering(entry.shape, (1,)),))


def _still_tied(
    plan: FoldPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> Iterator[tuple[CenteredLookup, nn.Embedding]]:
    """The embeddings that are to be untied, and are not yet."""
    for entry, module, is_tied in _untied_lookups(plan, modules, tensors):
        if is_tied:
            yield entry, module


def _untied_lookups(
    plan: FoldPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]
) -> Iterator[tuple[CenteredLookup, nn.Embedding, bool]]:
    """The embeddings that are to have a table of their own, and whether theirs is still another one's as well."""
    untied = [entry for entry in plan.lookups if entry.untied]
    own = {f"{path}.weight" for entry in untied for path in (entry.path, *entry.also)}
    for entry in untied:
        module = modules[entry.path]
        others = {entry.table, *entry.tied} - own
        if isinstance(module, nn.Embedding):
            yield entry, module, any(is_one(tensors[name], module.weight) for name in others if name in tensors)


def _put_tables(model: nn.Module, tables: Sequence[tuple[nn.Embedding, nn.Parameter]]) -> None:
    for module, table in tables:
        module.weight = table
    config: Any = getattr(model, "config", None)
    if tables and getattr(config, "tie_word_embeddings", False):
        # transformers would tie them again where the model is loaded.
        config.tie_word_embeddings = False


def _own_rows(plan: FoldPlan, modules: dict[str, nn.Module], tensors: dict[str, Tensor]) -> Iterable[CenteredParameter]:
    """The tables that embeddings have for themselves already, where that is what the plan is to give them."""
    return {
        id(module.weight): _rows_of(f"{entry.path}.weight", entry)
        for entry, module, is_tied in _untied_lookups(plan, modules, tensors)
        if not is_tied
    }.values()


def _unrepresentable(
    tensors: dict[str, Tensor],
    means: Means,
    absorption: Absorption,
    tables: Sequence[tuple[nn.Embedding, nn.Parameter]],
) -> Iterator[str]:
    """Which values would not be the model's any more once they are rounded to the dtype they are kept in."""
    for name, (entry, taken) in means.items():
        tensor = whole_tensor(tensors[name])
        if name in absorption.values or tensor.numel() == 0:
            continue
        moved = max(float(mean.abs().max()) for mean in taken if mean.numel())
        largest = float(tensor.abs().max()) + moved  # NaN and infinity stay what they are
        if not largest <= torch.finfo(tensor.dtype).max:
            problem = lost_in(shifted(entry, tensor, [-mean for mean in taken]), tensor.dtype)
            if problem:
                yield f"'{name}' {problem}"
    for name, value in absorption.values.items():
        problem = lost_in(value(), tensors[name].dtype)
        if problem:
            yield f"'{name}' {problem}"
    for name, bias in absorption.added.items():
        if not bool(bias.isfinite().all()):
            yield f"'{name}' {TOO_LARGE.format(bias.dtype)}"
    for module, table in tables:
        if not bool(table.isfinite().all()):
            yield f"the table of {module} {TOO_LARGE.format(table.dtype)}"


def _write(tensors: dict[str, Tensor], means: Means, absorption: Absorption) -> None:
    """Write into parameters. A failure puts back what was there; what was centered to one rounding."""
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
