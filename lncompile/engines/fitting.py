"""Whether a plan fits an engine's model, decided before the first weight is read: all of it or nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lncompile.engines.architecture import Architecture, Unfit
from lncompile.engines.routes import Routes, StoredForm
from lncompile.plans.checkpoint_names import prefix_renaming
from lncompile.plans.entries import CenteredParameter, PlanError
from lncompile.plans.fold_plan import FoldPlan


@dataclass(frozen=True)
class Fit:
    """What folding does to an engine's model.

    Attributes:
        center: how each tensor is centered, by its name in the checkpoint.
        norms: the paths of the modules in the engine's model that become RMSNorms.
        lookups: the paths of embeddings whose look-up is centered at each call.
        streams: the paths of modules whose whole output is centered.
        stays: why a norm that the plan knows is not among ``norms``, by its name in the plan.
        total: how many LayerNorms the plan knows.
    """

    center: Mapping[str, CenteredParameter]
    norms: tuple[str, ...]
    lookups: tuple[str, ...]
    streams: tuple[str, ...]
    stays: Mapping[str, str]
    total: int


def fit(
    architecture: Architecture,
    model: nn.Module,
    stored: Mapping[str, StoredForm],
    find_routes: Callable[[], Routes],
    is_norm: Callable[[nn.Module], str],
    is_lookup: Callable[[nn.Module], bool],
) -> Fit:
    """Carry a plan over to an engine's model by where its checkpoint's tensors go.

    Args:
        architecture: what the plan is of.
        model: the engine's.
        stored: what the checkpoint holds, by name.
        find_routes: says where its tensors go in the model.
        is_norm: says why a module is not one that RMSNorm can replace; ``""`` where it is.
        is_lookup: whether a module looks up rows in its weight.

    Raises:
        Unfit: where nothing folds, or a tensor that the plan centers is not stored as such, does not go to one
            parameter, or goes to one that has another use.
    """
    plan = architecture.plan
    require_folds(plan)
    if any(entry.scaled_by for entry in plan.center) or plan.absorb or any(entry.untied for entry in plan.lookups):
        raise Unfit("its plan changes several tensors together, which arrive one by one")
    try:
        names = architecture.names_of(stored)
        renamed = prefix_renaming(plan, set(names.values()))
    except PlanError as error:
        raise Unfit(str(error)) from error
    by_plan = {renamed(name): before for before, name in names.items()}
    center = _centered(plan, by_plan, stored)
    routes = find_routes()
    for name, entry in center.items():
        _require_own(name, bool(entry.also), routes)
    modules = dict(model.named_modules(remove_duplicate=False))
    lookups = _lookups(plan, by_plan, routes, modules, is_lookup)
    norms, stays = _norms(plan, by_plan, routes, modules, is_norm)
    if not norms:
        raise Unfit(f"none of its {plan.total} LayerNorms can be replaced: {next(iter(stays.values()), '')}")
    return Fit(center, norms, lookups, _streams(center, routes, modules), stays, plan.total)


def require_folds(plan: FoldPlan) -> None:
    """Raise Unfit for a plan by which nothing folds, with why."""
    if plan.folded and not plan.is_empty:
        return
    reasons = Counter(norm.detail for norm in plan.norms)
    count = f"none of its {plan.total} LayerNorms folds" if plan.total else "it has no LayerNorm"
    raise Unfit(f"{count}: {reasons.most_common(1)[0][0]}" if reasons else count)


def _centered(
    plan: FoldPlan, by_plan: Mapping[str, str], stored: Mapping[str, StoredForm]
) -> dict[str, CenteredParameter]:
    center = {}
    for entry in plan.center:
        names = [by_plan[name] for name in (entry.name, *entry.also) if name in by_plan]
        if not names:
            raise Unfit(f"the checkpoint has no '{entry.name}'")
        for name in names:
            form = stored[name]
            if form.shape != entry.shape:
                raise Unfit(f"'{name}' is stored in shape {list(form.shape)}, not {list(entry.shape)}")
            if not form.dtype.is_floating_point or torch.finfo(form.dtype).bits < 16:
                raise Unfit(f"'{name}' is stored as {form.dtype}, in which it cannot be centered")
            center[name] = entry
    return center


def _reached(name: str, routes: Routes) -> frozenset[str]:
    """All names of the parameters that a tensor feeds."""
    return routes.get(name, frozenset())


def _require_own(name: str, is_tied: bool, routes: Routes) -> None:
    reached = sorted(_reached(name, routes))
    if not reached:
        raise Unfit(f"'{name}' goes to no parameter of the engine's model that is known")
    if len(reached) > 1 and not is_tied:
        raise Unfit(f"'{name}' goes to {' and '.join(repr(one) for one in reached)}, and the plan knows one use of it")


def _lookups(
    plan: FoldPlan,
    by_plan: Mapping[str, str],
    routes: Routes,
    modules: Mapping[str, nn.Module],
    is_lookup: Callable[[nn.Module], bool],
) -> tuple[str, ...]:
    paths: list[str] = []
    for entry in plan.lookups:
        stored = [by_plan[name] for name in (entry.table, *entry.tied) if name in by_plan]
        reached = {path for name in stored for path in _reached(name, routes)}
        found = sorted({one.rpartition(".")[0] for one in reached if is_lookup(modules[one.rpartition(".")[0]])})
        if len({id(modules[path]) for path in found}) != 1 or entry.also:
            raise Unfit(f"the table '{entry.table}' is looked up by {len(found)} embeddings, not by one")
        paths.append(found[0])
    return tuple(paths)


def _norms(
    plan: FoldPlan,
    by_plan: Mapping[str, str],
    routes: Routes,
    modules: Mapping[str, nn.Module],
    is_norm: Callable[[nn.Module], str],
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The engine's modules of norms that fold in every call, and why others stay."""
    calls: dict[str, list[str]] = defaultdict(list)
    for norm in plan.norms:
        calls[norm.name.partition(":")[0]].append("" if norm.folded else norm.detail)
    parameters = {replaced.path: replaced.weight for replaced in plan.replace}
    found: list[str] = []
    stays: dict[str, str] = {}
    for path, reasons in calls.items():
        name = by_plan.get(f"{path}.{parameters.get(path) or 'weight'}", "")
        reached = sorted(_reached(name, routes))
        target = reached[0].rpartition(".")[0] if len(reached) == 1 else ""
        reason = next(filter(None, reasons), "")
        if not reason and not target:
            reason = "which module of the engine's model it is is not known"
        reason = reason or is_norm(modules[target])
        if reason:
            stays[path] = reason
        elif target not in found:
            found.append(target)
    return tuple(found), stays


def _streams(
    center: Mapping[str, CenteredParameter], routes: Routes, modules: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    """The modules all of whose weights are centered, each along one whole axis: their output is."""
    owners: dict[str, set[str]] = defaultdict(set)
    for name in routes:
        for one in _reached(name, routes):
            owners[one.rpartition(".")[0]].add(name)
    return tuple(
        path
        for path, names in owners.items()
        if not list(modules[path].children())
        and all(name in center and _is_whole(center[name]) for name in names)
        and any(len(center[name].shape) > 1 for name in names)
    )


def _is_whole(entry: CenteredParameter) -> bool:
    return len(entry.centerings) == 1 and all(
        part.view == entry.shape and len(part.axes) == 1 and not part.rows for part in entry.centerings
    )
