"""Folding a checkpoint on disk: safetensors files in, safetensors files out, in memory for one tensor.

What is written grows in a folder beside the target, and gets the target's name when all of it is there and was read
back. Whatever stops the program, there is no half target; called again, it goes on behind the last finished file::

    .target.folding/records/model-00001-of-00002.safetensors.json    what a finished file was made of, and its digest
    .target.folding/model/...                                        becomes target/
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lncompile.passes.rewrites.arithmetic import EXACT
from lncompile.plans import safetensors_file
from lncompile.plans.absorbed_values import absorbed, lost_in, means_in
from lncompile.plans.checkpoint_tensors import INDEX, SUFFIX, Absorbing, Output, Place, Shard, added_to, shards_of
from lncompile.plans.entries import CenteredParameter
from lncompile.plans.safetensors_file import CheckpointError, SafetensorsFile, StoredTensor
from lncompile.plans.slices import center_in_place, is_rounded
from lncompile.progress import Say

if TYPE_CHECKING:
    from lncompile.plans.fold_plan import FoldPlan

#: The plan beside the weights that were folded with it.
PLAN_FILE = "lncompile_fold.json"
#: Weights in other formats, which would stay as they were: they are left out.
OTHER_WEIGHTS = frozenset({".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"})


@dataclass(frozen=True)
class FoldedCheckpoint:
    """What was written.

    Attributes:
        path: the folder.
        files: names of its safetensors files.
        centered: names of the tensors that were centered, as they stand in the files.
        tables: names of tensors that were added: tables that were untied, biases that take β.
        resumed: names of the files that an earlier, interrupted call had finished.
        left_out: names of files that were not taken over: weights in other formats, which are not folded.
    """

    path: Path
    files: tuple[str, ...]
    centered: tuple[str, ...]
    tables: tuple[str, ...]
    resumed: tuple[str, ...]
    left_out: tuple[str, ...]


def apply_to_checkpoint(plan: FoldPlan, source: Path, target: Path, progress: Say | None = None) -> FoldedCheckpoint:
    """Do what :meth:`FoldPlan.apply_to_checkpoint` promises."""
    say = progress or _say_nothing
    source, target = source.absolute(), target.absolute()  # a link may have the name that its file lacks
    work = target.parent / f".{target.name}.folding"
    folder = source if source.is_dir() else source.parent
    _check_places(source, folder, target)
    shards = shards_of(plan, source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone(work):
        model, records = work / "model", work / "records"
        model.mkdir(exist_ok=True)
        records.mkdir(exist_ok=True)
        digest = hashlib.sha256(json.dumps(plan.to_dict(), sort_keys=True).encode()).hexdigest()
        total = sum(shard.source.path.stat().st_size for shard in shards) or 1
        done, resumed = 0, []
        _clear(model, {shard.name for shard in shards})
        for number, shard in enumerate(shards, 1):
            words = f"{number} of {len(shards)}: {shard.name}"
            say(words, done / total)
            record = {"plan": digest, "sources": [_identity(path) for path in shard.read_from]}
            if _is_finished(model / shard.name, records / f"{shard.name}.json", record):
                resumed.append(shard.name)
            else:
                for written in _write(shard, model / shard.name):
                    say(words, min(1.0, (done + written) / total))
                record["sha256"] = _digest(model / shard.name)
                _write_text(records / f"{shard.name}.json", json.dumps(record))
            done += shard.source.path.stat().st_size
        left_out = _copy_the_rest(plan, folder, model, shards) if source.is_dir() else ()
        plan.save(model / PLAN_FILE)
        _sync(model / PLAN_FILE)
        _sync(model)
        if target.exists():
            raise CheckpointError(f"'{target}' came into being meanwhile; what was written is in '{model}'")
        model.rename(target)
        _sync(target.parent)
        shutil.rmtree(work)
    return FoldedCheckpoint(
        target,
        tuple(shard.name for shard in shards),
        tuple(output.name for shard in shards for output in shard.outputs if output.entry is not None),
        tuple(name for shard in shards for name in added_to(shard)),
        tuple(resumed),
        tuple(left_out),
    )


def _say_nothing(words: str, share: float | None = None) -> None:
    """Where nobody watches."""


def _check_places(source: Path, folder: Path, target: Path) -> None:
    if not source.exists():
        raise CheckpointError(f"there is no checkpoint '{source}'")
    if target.exists():
        raise CheckpointError(f"'{target}' exists already: nothing is overwritten")
    if target.resolve().is_relative_to(folder.resolve()) and source.is_dir():
        raise CheckpointError(f"'{target}' is inside of the checkpoint itself")


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Hold the folder that is worked in: two processes would write the same files."""
    work.mkdir(exist_ok=True)
    if os.name != "posix":
        yield
        return
    import fcntl  # there is none elsewhere

    held = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(f"another process is writing into '{work}'") from error
        yield
    finally:
        os.close(held)


def _clear(model: Path, keep: Collection[str]) -> None:
    """Take out what a call for something else left behind."""
    for path in model.rglob("*"):
        if not path.is_dir() and str(path.relative_to(model)) not in keep:
            path.unlink()


# --- one file ---


def _write(shard: Shard, path: Path) -> Iterator[int]:
    """Write a file, read it back, and give it its name; yields how many bytes of tensors are written."""
    unfinished = path.with_name(f"{path.name}.writing")
    digests: list[str] = []
    written = 0
    with shard.source.path.open("rb") as read, unfinished.open("wb") as file:
        file.write(safetensors_file.header([(o.name, o.stored) for o in shard.outputs], shard.source.metadata))
        for output in shard.outputs:
            digest = hashlib.sha256()
            for piece in _values(output, read):
                digest.update(piece)
                file.write(piece)
                written += len(piece)
                yield written
            digests.append(digest.hexdigest())
        file.flush()
        os.fsync(file.fileno())
    _verify(shard.outputs, digests, unfinished)
    unfinished.replace(path)
    _sync(path.parent)


def _values(output: Output, read: Any) -> Iterator[bytes | memoryview]:
    if output.absorbing is not None:
        yield from safetensors_file.pieces_of(_absorbed(output, output.absorbing))
        return
    if output.entry is None and not output.is_one:
        yield from safetensors_file.pieces(read, output.stored)
        return
    tensor: Tensor = safetensors_file.load(read, output.stored)
    if output.entry is None:
        tensor.fill_(1)
    elif output.scales:
        tensor = _scaled_and_centered(output.entry, tensor, [_load(place) for place in output.scales])
    else:
        center_in_place(output.entry, tensor)
    yield from safetensors_file.pieces_of(tensor)


def _scaled_and_centered(entry: CenteredParameter, tensor: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """What a layer becomes that takes in the scale behind it: both in float64, rounded once."""
    if entry.is_done(tensor, scales):
        return tensor
    exact = entry.scaled(tensor, scales).contiguous()
    center_in_place(entry, exact)
    return _rounded(entry.name, exact, tensor.dtype)


def _absorbed(output: Output, absorbing: Absorbing) -> Tensor:
    """What a weight or bias becomes that takes γ or β of a norm."""
    tensors = {name: _load(place) for name, place in absorbing.places.items()}
    absorption = absorbed([absorbing.entry], tensors, means_in(absorbing.center, tensors))
    if absorbing.name in absorption.added:
        return _rounded(output.name, absorption.added[absorbing.name].data.to(EXACT), _dtype_of(output))
    return _rounded(output.name, absorption.values[absorbing.name]().contiguous(), _dtype_of(output))


def _dtype_of(output: Output) -> torch.dtype:
    return safetensors_file.FLOATING[output.stored.dtype]


def _rounded(name: str, exact: Tensor, dtype: torch.dtype) -> Tensor:
    problem = lost_in(exact, dtype)
    if problem:
        raise CheckpointError(f"'{name}' {problem}")
    return exact.to(dtype)


def _load(place: Place) -> Tensor:
    with place.path.open("rb") as file:
        return safetensors_file.load(file, place.stored)


def _verify(outputs: Sequence[Output], digests: Sequence[str], path: Path) -> None:
    """Read a file back: what was centered has means near zero, and all bytes are those that were meant."""
    found = SafetensorsFile.read(path)
    with path.open("rb") as file:
        for output, digest, stored in zip(outputs, digests, _in_order(found, outputs, path), strict=True):
            actual = hashlib.sha256()
            for piece in safetensors_file.pieces(file, stored):
                actual.update(piece)
            if actual.hexdigest() != digest:
                raise CheckpointError(f"'{output.name}' reads back other than it was written to '{path}'")
            if output.entry is None or output.absorbing is not None:
                continue  # what takes a scale is centered along other elements than it was
            if not is_rounded(output.entry, safetensors_file.load(file, stored)):
                raise CheckpointError(
                    f"'{output.name}' cannot be centered: are all of its values finite, and once it is centered, too?"
                )


def _in_order(found: SafetensorsFile, outputs: Sequence[Output], path: Path) -> list[StoredTensor]:
    stored = {tensor.name: tensor for tensor in found.tensors}
    for output in outputs:
        tensor = stored.get(output.name)
        if tensor is None or (tensor.dtype, tensor.shape) != (output.stored.dtype, output.stored.shape):
            raise CheckpointError(f"'{output.name}' reads back other than it was written to '{path}'")
    return [stored[output.name] for output in outputs]


def _is_finished(path: Path, record: Path, expected: dict[str, Any]) -> bool:
    """Whether an earlier call has written a file whole, of the same source and by the same plan."""
    if not path.exists() or not record.exists():
        return False
    known = json.loads(record.read_text())
    return {key: known.get(key) for key in expected} == expected and known.get("sha256") == _digest(path)


def _identity(path: Path) -> dict[str, Any]:
    status = path.stat()
    return {"source": str(path), "bytes": status.st_size, "modified": status.st_mtime_ns}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the rest of the folder ---


def _copy_the_rest(plan: FoldPlan, folder: Path, model: Path, shards: Sequence[Shard]) -> list[str]:
    """Copy what is not weights; returns what was left out."""
    written = {shard.name for shard in shards}
    left_out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or str(name) in written or name.name == PLAN_FILE or path.suffix == SUFFIX:
            continue
        weights = path.name.removesuffix(".index.json")
        if Path(weights).suffix in OTHER_WEIGHTS:
            left_out.append(str(name))
            continue
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, model / name)
        if str(name).endswith(INDEX):
            _update_index(model / name, shards)
        if str(name) == "config.json" and any(entry.untied for entry in plan.lookups):
            config = json.loads((model / name).read_text())
            _write_text(model / name, json.dumps({**config, "tie_word_embeddings": False}, indent=2) + "\n")
        _sync(model / name)
    return left_out


def _update_index(path: Path, shards: Sequence[Shard]) -> None:
    """List the tensors as they are now: untied tables are there beside those that were."""
    index = json.loads(path.read_text())
    listed = set(index["weight_map"].values())
    outputs = [(shard.name, output) for shard in shards if shard.name in listed for output in shard.outputs]
    index["weight_map"] = {output.name: name for name, output in sorted(outputs, key=lambda pair: pair[1].name)}
    if "total_size" in index.get("metadata", {}):
        index["metadata"]["total_size"] = sum(output.stored.bytes for _, output in outputs)
    _write_text(path, json.dumps(index, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f"{path.name}.writing")
    unfinished.write_text(text)
    _sync(unfinished)
    unfinished.replace(path)


def _sync(path: Path) -> None:
    """Have what was written reach the disk; of a folder its names."""
    if os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
