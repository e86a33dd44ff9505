"""How the names of tensors in a checkpoint's files become the names in a plan's model, and the way back."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lncompile.plans.entries import PlanError

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan


@dataclass(frozen=True)
class Naming:
    """The names of a checkpoint.

    Attributes:
        in_plan: the name in the plan of each name in the files.
        rename: the same for any name.
        by_transformers: whether transformers changes names as it loads the files.
    """

    in_plan: dict[str, str]
    rename: Callable[[str], str]
    by_transformers: bool = False

    def in_files(self, name: str) -> str:
        """What a tensor of the plan is called in the files, where it may be a new one.

        Raises:
            PlanError: where no name in the files would become this one.
        """
        path, _, attribute = name.rpartition(".")
        candidates = [file_name for file_name, known in self.in_plan.items() if known == name]
        for file_name, known in self.in_plan.items():
            beside, _, other = known.rpartition(".")
            if beside == path and file_name.endswith(f".{other}"):
                candidates.append(file_name[: -len(other)] + attribute)
        candidates.append(name)
        candidates += [name.partition(".")[2]] if "." in name else []
        for candidate in candidates:
            if candidate and self.rename(candidate) == name:
                return candidate
        raise PlanError(f"'{name}' is to be added to the checkpoint, and no name in its files would become that one")


def naming_of(plan: FoldPlan, names: Collection[str], folder: Path) -> Naming:
    """Find out how a checkpoint's names become those of a plan.

    A checkpoint of a base model has no prefix (``wte.weight``) where the model with a head has one
    (``transformer.wte.weight``), and the other way round. Of some models transformers changes names as it loads them:
    its own mapping is asked for these.

    Args:
        plan: the plan.
        names: all names in the files.
        folder: of the checkpoint, with a ``config.json`` where transformers wrote it.

    Raises:
        PlanError: where tensors of the plan are not among them, whatever they are called.
    """
    wanted = list(_wanted(plan))
    way = _prefix_renaming(plan, names, wanted)
    if way is not None:
        return Naming({name: way(name) for name in names}, way)
    way = _renaming_of_transformers(plan, folder, {name for one in wanted for name in one})
    if way is not None and _finds_all(wanted, names, way):
        return Naming({name: way(name) for name in names}, way, by_transformers=True)
    raise _missing(wanted, names)


def prefix_renaming(plan: FoldPlan, names: Collection[str]) -> Callable[[str], str]:
    """Find out how a checkpoint's names become those of a plan, where at most a prefix is missing or too many.

    Args:
        plan: the plan.
        names: all names in the files, as the library that reads them renames them.

    Raises:
        PlanError: where tensors of the plan are not among them.
    """
    wanted = list(_wanted(plan))
    way = _prefix_renaming(plan, names, wanted)
    if way is None:
        raise _missing(wanted, names)
    return way


def _prefix_renaming(
    plan: FoldPlan, names: Collection[str], wanted: Collection[set[str]]
) -> Callable[[str], str] | None:
    known = set(plan.form.tensors)
    known |= {layer.bias for entry in plan.absorb for layer in entry.layers if layer.bias is not None}
    prefixes = dict.fromkeys(name.partition(".")[0] + "." for name in (*sorted(known), *sorted(names)) if "." in name)
    ways: list[Callable[[str], str]] = [lambda name: name]
    ways += [lambda name, prefix=prefix: prefix + name if prefix + name in known else name for prefix in prefixes]  # type: ignore[misc]
    ways += [
        lambda name, prefix=prefix: (  # type: ignore[misc]
            name[len(prefix) :] if name.startswith(prefix) and name[len(prefix) :] in known else name
        )
        for prefix in prefixes
    ]
    return next((way for way in ways if _finds_all(wanted, names, way)), None)


def _missing(wanted: Collection[set[str]], names: Collection[str]) -> PlanError:
    missing = sorted(min(one) for one in wanted if one.isdisjoint(names))
    return PlanError(
        f"the checkpoint lacks {len(missing)} of the {len(wanted)} tensors that the plan changes: "
        f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}. If a library changes names as it loads files: "
        "load the model, call plan.apply(model), save it with save_pretrained, and save the plan beside it"
    )


def _wanted(plan: FoldPlan) -> Iterable[set[str]]:
    """Names of which one has to be there."""
    gone = {entry.bias for entry in plan.absorb}
    for entry in plan.center:
        yield {entry.name, *entry.also}
        yield from ({name} for name in entry.scaled_by)
    for lookup in plan.lookups:
        yield {lookup.table, *lookup.tied, f"{lookup.path}.weight"}
    for absorbing in plan.absorb:
        if absorbing.weight is not None:
            yield {absorbing.weight}
        for layer in absorbing.layers:
            tied = next((set(group) for group in plan.form.tied if layer.weight in group), {layer.weight})
            yield tied
            if layer.bias is not None and not layer.adds_bias and layer.bias not in gone:
                yield {layer.bias}


def _finds_all(wanted: Collection[set[str]], names: Collection[str], way: Callable[[str], str]) -> bool:
    renamed = {way(name) for name in names}
    return len(renamed) == len(names) and all(not one.isdisjoint(renamed) for one in wanted)


def _renaming_of_transformers(plan: FoldPlan, folder: Path, wanted: Collection[str]) -> Callable[[str], str] | None:
    """What transformers makes of names as it loads a checkpoint of the plan's class; None where it is not its class."""
    module, _, name = plan.form.class_name.rpartition(".")
    if not module.startswith("transformers.models.") or not (folder / "config.json").is_file():
        return None
    try:
        loading = importlib.import_module("transformers.core_model_loading")
        mapping = importlib.import_module("transformers.conversion_mapping")
    except ImportError:
        return None  # versions before 5 have no such mapping
    kind = getattr(importlib.import_module(module), name)
    with torch.device("meta"):
        model = kind(kind.config_class.from_pretrained(folder))
    conversions = mapping.get_model_conversion_mapping(model)
    renamings = [conversion for conversion in conversions if isinstance(conversion, loading.WeightRenaming)]
    converters = [conversion for conversion in conversions if isinstance(conversion, loading.WeightConverter)]
    state = dict.fromkeys(model.state_dict(), True)

    def rename(name: str) -> str:
        renamed, pattern = loading.rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is None:
            return str(renamed)
        if renamed in wanted:
            raise PlanError(
                f"transformers makes '{renamed}' of '{name}' and others, and does not only rename it: load the model, "
                "call plan.apply(model), save it with save_pretrained, and save the plan beside it"
            )
        return name

    return rename
