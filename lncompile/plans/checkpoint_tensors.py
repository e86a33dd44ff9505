"""What folding a checkpoint writes: the tensors of each file, and what is done to each. Nothing is written here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lncompile.plans import safetensors_file
from lncompile.plans.entries import CenteredParameter, Centering, PlanError
from lncompile.plans.safetensors_file import CheckpointError, SafetensorsFile, StoredTensor

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

#: How the name of a checkpoint's index ends.
INDEX = ".safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A tensor in a file."""

    path: Path
    stored: StoredTensor


@dataclass(frozen=True)
class Output:
    """A tensor to be written.

    Attributes:
        name: its name.
        stored: what it is read from.
        entry: how it is centered; None where it is not.
        scales: what its channels are multiplied with before.
        is_one: whether it is such a scale itself, and becomes one.
    """

    name: str
    stored: StoredTensor
    entry: CenteredParameter | None = None
    scales: tuple[Place, ...] = ()
    is_one: bool = False


@dataclass(frozen=True)
class Shard:
    """A file to be written, and the one it is made of."""

    source: SafetensorsFile
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        """Of both."""
        return self.source.path.name


def shards_of(plan: FoldPlan, source: Path) -> list[Shard]:
    """The files to write, with every tensor of the plan found in them."""
    if plan.absorb:
        raise PlanError(
            "this plan lets layers absorb γ and β, which adds names to the state dict and takes some away: such files "
            "cannot be loaded before the modules are replaced. Apply it to the loaded model, plan.apply(model), and "
            "save that, or make a plan without absorb"
        )
    paths = [source] if source.is_file() else _weight_files(source)
    files = [SafetensorsFile.read(path) for path in paths]
    names = {stored.name for file in files for stored in file.tensors}
    renamed = renaming(plan, names)
    entries = {name: entry for entry in plan.center for name in (entry.name, *entry.also)}
    tables, added = _tables(plan, {renamed(name) for name in names})
    places = {renamed(stored.name): Place(file.path, stored) for file in files for stored in file.tensors}
    ones = {name for entry in plan.center for name in entry.scaled_by}
    shards, problems = [], []
    for file in files:
        outputs = []
        for stored in file.tensors:
            name = renamed(stored.name)
            shown = name if tables else stored.name
            entry = tables.get(name) or entries.get(name)
            problems += [] if entry is None else _misfits(entry, stored)
            scales = () if entry is None else tuple(places[scale] for scale in entry.scaled_by)
            outputs.append(Output(shown, stored, entry, scales, name in ones))
            outputs += [Output(other, stored, tables.get(other)) for other in added.get(name, ())]
        shards.append(Shard(file, tuple(outputs)))
    if problems:
        shown_problems = "".join(f"\n  {problem}" for problem in problems[:8])
        raise PlanError(f"the plan does not fit '{source}', and nothing was written:{shown_problems}")
    return shards


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(
            f"there are no safetensors files in '{folder}': save the model with save_pretrained first"
        )
    for index in folder.glob(f"*{INDEX}"):
        listed = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in listed if not (folder / name).exists())
        if missing:
            raise CheckpointError(f"'{index.name}' lists {', '.join(missing)}, which '{folder}' does not have")
    return paths


def renaming(plan: FoldPlan, names: set[str]) -> Any:
    """How names in the files become names in the plan.

    A checkpoint of a base model has no prefix (``wte.weight``) where the model with a head has one
    (``transformer.wte.weight``), and the other way round.
    """
    wanted = [{entry.name, *entry.also} for entry in plan.center]
    wanted += [{name} for entry in plan.center for name in entry.scaled_by]
    wanted += [{entry.table, *entry.tied, f"{entry.path}.weight"} for entry in plan.lookups]
    known = set(plan.form.tensors)
    prefixes = dict.fromkeys(name.partition(".")[0] + "." for name in (*sorted(known), *sorted(names)) if "." in name)
    ways: list[Any] = [lambda name: name]
    ways += [lambda name, prefix=prefix: prefix + name if prefix + name in known else name for prefix in prefixes]
    ways += [
        lambda name, prefix=prefix: (
            name[len(prefix) :] if name.startswith(prefix) and name[len(prefix) :] in known else name
        )
        for prefix in prefixes
    ]
    for way in ways:
        renamed = {way(name) for name in names}
        if len(renamed) == len(names) and all(not one.isdisjoint(renamed) for one in wanted):
            return way
    missing = sorted(min(one) for one in wanted if one.isdisjoint(names))
    raise PlanError(
        f"the checkpoint lacks {len(missing)} of the {len(wanted)} tensors that the plan centers: "
        f"{', '.join(missing[:4])}{' ...' if len(missing) > 4 else ''}. Some libraries change names as they load files "
        "(transformers does for some models): then load the model, call plan.apply(model), save it with "
        "save_pretrained, and save the plan beside it"
    )


def _tables(plan: FoldPlan, names: set[str]) -> tuple[dict[str, CenteredParameter], dict[str, list[str]]]:
    """Tables of embeddings that are untied: how each is centered, and which names are added beside one in the files."""
    tables: dict[str, CenteredParameter] = {}
    added: dict[str, list[str]] = {}
    untied = [entry for entry in plan.lookups if entry.untied]
    for entry in untied:
        own = {f"{path}.weight" for path in (entry.path, *entry.also)}
        rows = CenteredParameter(entry.table, (), entry.shape, (Centering(entry.shape, (1,)),))
        tables |= dict.fromkeys(own, rows)
    for entry in untied:
        group = {entry.table, *entry.tied, f"{entry.path}.weight", *(f"{path}.weight" for path in entry.also)}
        present = sorted(group & names, key=lambda name: (name in tables, name))
        if present:
            missing = sorted(group - names - {name for others in added.values() for name in others})
            added.setdefault(present[0], []).extend(missing)
    return tables, added


def _misfits(entry: CenteredParameter, stored: StoredTensor) -> list[str]:
    if stored.shape != tuple(entry.shape):
        return [f"'{stored.name}' has shape {list(stored.shape)}, not {list(entry.shape)}"]
    if stored.dtype not in safetensors_file.FLOATING:
        return [f"'{stored.name}' has dtype {stored.dtype}, in which it cannot be centered: fold first, then quantize"]
    return []


def added_to(shard: Shard) -> list[str]:
    """Names of tensors that its source does not have."""
    seen: set[StoredTensor] = set()
    names = []
    for output in shard.outputs:
        names += [output.name] if output.stored in seen else []
        seen.add(output.stored)
    return names
