"""What folding a checkpoint writes: the tensors of each file, and what is done to each. Nothing is written here."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lncompile.plans import safetensors_file
from lncompile.plans.checkpoint_names import Naming, naming_of
from lncompile.plans.entries import AbsorbedNorm, CenteredParameter, Centering, PlanError
from lncompile.plans.safetensors_file import CheckpointError, SafetensorsFile, StoredTensor

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

#: How the name of a file of weights ends.
SUFFIX = ".safetensors"
#: How the name of a checkpoint's index ends.
INDEX = f"{SUFFIX}.index.json"


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
        is_one: whether it is such a scale itself, or a γ that is absorbed, and becomes one.
        absorbing: what it takes of a norm, where it does; nothing above is needed then.
        is_new: whether the files do not have it.
    """

    name: str
    stored: StoredTensor
    entry: CenteredParameter | None = None
    scales: tuple[Place, ...] = ()
    is_one: bool = False
    absorbing: Absorbing | None = None
    is_new: bool = False


@dataclass(frozen=True)
class Absorbing:
    """How a weight or bias comes to be that takes γ or β of a norm.

    Attributes:
        name: in the plan.
        entry: what is absorbed, with the layer in question alone.
        center: how the layer's weight and bias are centered.
        places: what that is computed of, by names in the plan.
    """

    name: str
    entry: AbsorbedNorm
    center: tuple[CenteredParameter, ...]
    places: Mapping[str, Place]


@dataclass(frozen=True)
class Shard:
    """A file to be written, and the one it is made of."""

    source: SafetensorsFile
    outputs: tuple[Output, ...]

    @property
    def name(self) -> str:
        """Of what is written: that of the source, unless that is one of a cache that does not say what it is."""
        name = self.source.path.name
        return name if name.endswith(SUFFIX) else f"model{SUFFIX}"

    @property
    def read_from(self) -> tuple[Path, ...]:
        """The files that its tensors are made of, its source first."""
        places = [place for output in self.outputs for place in output.scales]
        for output in self.outputs:
            places += [] if output.absorbing is None else output.absorbing.places.values()
        return tuple(dict.fromkeys((self.source.path, *sorted(place.path for place in places))))


def shards_of(plan: FoldPlan, source: Path) -> list[Shard]:
    """The files to write, with every tensor of the plan found in them."""
    paths = [source] if source.is_file() else _weight_files(source)
    files = [SafetensorsFile.read(path) for path in paths]
    names = {stored.name for file in files for stored in file.tensors}
    naming = naming_of(plan, names, source if source.is_dir() else source.parent)
    _require_no_others(plan, files, naming)
    renamed = naming.in_plan
    entries = {name: entry for entry in plan.center for name in (entry.name, *entry.also)}
    tables, added = _tables(plan, set(renamed.values()))
    places = {renamed[stored.name]: Place(file.path, stored) for file in files for stored in file.tensors}
    ones = {name for entry in plan.center for name in entry.scaled_by}
    ones |= {entry.weight for entry in plan.absorb if entry.weight is not None}
    gone = {entry.bias for entry in plan.absorb}
    absorbing = _absorbing(plan, places)
    shards, problems = [], []
    for file in files:
        outputs = []
        for stored in file.tensors:
            name = renamed[stored.name]
            if name in gone:
                continue
            shown = name if tables and not naming.by_transformers else stored.name
            entry = tables.get(name) or entries.get(name)
            problems += [] if entry is None else _misfits(entry, stored)
            scales = () if entry is None else tuple(places[scale] for scale in entry.scaled_by)
            outputs.append(Output(shown, stored, entry, scales, name in ones, absorbing.get(name)))
            outputs += [
                Output(naming.in_files(other), stored, tables.get(other), absorbing=absorbing.get(other), is_new=True)
                for other in added.get(name, ())
            ]
            outputs += [
                Output(naming.in_files(bias), _of_shape(stored, bias, size), absorbing=absorbing[bias], is_new=True)
                for bias, size in _new_biases(plan, name, stored, places)
            ]
        shards.append(Shard(file, tuple(outputs)))
    problems += [problem for entry in plan.absorb for problem in _misfits_of_absorption(plan, entry, places)]
    if problems:
        shown_problems = "".join(f"\n  {problem}" for problem in problems[:8])
        raise PlanError(f"the plan does not fit '{source}', and nothing was written:{shown_problems}")
    return shards


def _weight_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise CheckpointError(
            f"there are no safetensors files in '{folder}': save the model with save_pretrained first"
        )
    inside = sorted(str(path.relative_to(folder)) for path in folder.glob(f"*/**/*{SUFFIX}"))
    if inside:
        raise CheckpointError(
            f"'{folder}' has weights in folders inside of it, which would stay as they are: {', '.join(inside[:4])}. "
            "Fold each of these folders by itself, or take out what does not belong to the model"
        )
    for index in folder.glob(f"*{INDEX}"):
        listed = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(name for name in listed if not (folder / name).exists())
        if missing:
            raise CheckpointError(f"'{index.name}' lists {', '.join(missing)}, which '{folder}' does not have")
    return paths


def _require_no_others(plan: FoldPlan, files: Sequence[SafetensorsFile], naming: Naming) -> None:
    """Refuse files of something else beside the model's: they would be copied, and nothing in them folded."""
    others = [
        file.path.name
        for file in files
        if file.tensors and all(naming.in_plan[stored.name] not in plan.form.tensors for stored in file.tensors)
    ]
    if others:
        raise CheckpointError(
            f"{', '.join(others)} holds no tensor of the plan's model: is it another model's, or an adapter's? Take it "
            "out of the folder, or give the file of the model instead of the folder"
        )


# --- what layers take of norms ---


def _absorbing(plan: FoldPlan, places: Mapping[str, Place]) -> dict[str, Absorbing]:
    """How weights and biases come to be that take γ or β, by their names in the plan."""
    found: dict[str, Absorbing] = {}
    center = {name: entry for entry in plan.center for name in (entry.name, *entry.also)}
    for entry in plan.absorb:
        for layer in entry.layers:
            own = dataclasses.replace(entry, layers=(layer,))
            parts = [center[name] for name in (layer.weight, layer.bias) if name in center]
            read = {name for part in parts for name in (part.name, *part.scaled_by)}
            read |= {name for name in (entry.weight, entry.bias, layer.weight, layer.bias) if name is not None}
            near = {name: place for name in sorted(read) if (place := _place_of(plan, name, places)) is not None}
            if entry.weight is not None:
                for name in _names_of(plan, layer.weight):
                    found[name] = Absorbing(layer.weight, own, tuple(parts), near)
            if layer.bias is not None and entry.bias in near:
                found[layer.bias] = Absorbing(layer.bias, own, tuple(parts), near)
    return found


def _names_of(plan: FoldPlan, name: str) -> tuple[str, ...]:
    """All names that a tensor has when the plan is applied."""
    own = {f"{path}.weight" for lookup in plan.lookups if lookup.untied for path in (lookup.path, *lookup.also)}
    return tuple(other for other in _tied_names(plan, name) if other not in own) or (name,)


def _tied_names(plan: FoldPlan, name: str) -> tuple[str, ...]:
    return next((group for group in plan.form.tied if name in group), (name,))


def _place_of(plan: FoldPlan, name: str, places: Mapping[str, Place]) -> Place | None:
    """Where a tensor is stored, under whichever of its names."""
    return next(
        (places[other] for other in (*_names_of(plan, name), *_tied_names(plan, name)) if other in places), None
    )


def _new_biases(
    plan: FoldPlan, name: str, stored: StoredTensor, places: Mapping[str, Place]
) -> Iterator[tuple[str, int]]:
    """The biases that are added beside a weight, with their sizes."""
    for entry in plan.absorb:
        for layer in entry.layers:
            place = _place_of(plan, layer.weight, places)
            is_new = layer.adds_bias and layer.bias not in places and entry.bias in places
            is_this = place is not None and place.stored == stored and name in _tied_names(plan, layer.weight)
            if is_new and is_this and layer.bias is not None:
                yield layer.bias, stored.shape[1 - layer.dimension]


def _of_shape(stored: StoredTensor, name: str, size: int) -> StoredTensor:
    """A row of numbers of the dtype of something that is stored."""
    width = stored.bytes // math.prod(stored.shape)
    return StoredTensor(name, stored.dtype, (size,), -1, size * width)


def _misfits_of_absorption(plan: FoldPlan, entry: AbsorbedNorm, places: Mapping[str, Place]) -> Iterator[str]:
    names = {name for name in (entry.weight, entry.bias) if name is not None}
    for layer in entry.layers:
        names |= {name for name in (layer.weight, layer.bias) if name is not None}
        if layer.adds_bias and entry.bias not in places and layer.bias not in places:
            yield f"'{entry.bias}' is missing, and '{layer.bias}' is not there either"
    for name in sorted(names):
        place, shape = _place_of(plan, name, places), plan.form.tensors.get(name)
        if place is not None and shape is not None:
            yield from _misfits(CenteredParameter(name, (), shape, ()), place.stored)


# --- what is centered ---


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
    return [output.name for output in shard.outputs if output.is_new]
