"""The work of ``lncompile fold``."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lncompile.cli.parameters import InputError
from lncompile.cli.running import Run
from lncompile.models.loading import LoadedModel
from lncompile.models.names import Kind, kind_of
from lncompile.plans.checkpoint import OTHER_WEIGHTS, FoldedCheckpoint
from lncompile.plans.fold_plan import FoldPlan
from lncompile.plans.planning import plan as make_plan


def run_fold(run: Run, target: Path, plan_file: Path | None, untie: bool) -> None:
    """Fold a checkpoint on disk.

    Args:
        run: the run; its model is a folder, a file of weights, or a model of the hub.
        target: the folder to write.
        plan_file: a plan; by default one is made of the model's configuration.
        untie: whether tied tables are untied, where the plan is made.
    """
    name = run.asked.model
    loaded = LoadedModel(name, "", nn.Module(), {})
    if plan_file is None:
        if kind_of(name) not in (Kind.FOLDER, Kind.HUB):
            raise InputError(f"'{name}' is not a folder with a config.json or a model of the hub: give a plan (--plan)")
        loaded = run.load()
        with run.steps.step("The plan") as say:
            say("reading an example call")
            plan = make_plan(loaded.model, *loaded.arguments, untie=untie, **loaded.inputs)
        run.note(f"{plan.folded} of {plan.total} LayerNorms fold")
    else:
        if not plan_file.is_file():
            raise InputError(f"there is no file '{plan_file}' (--plan)")
        if untie:
            raise InputError("--untie is for a plan that is made here: make yours with untie=True, or leave --plan out")
        plan = FoldPlan.load(plan_file)
    if plan.is_empty:
        raise InputError(f"nothing is written: the plan changes nothing of '{name}' (lncompile explain says why)")
    with run.steps.step("The checkpoint") as say:
        say("looking for its files")
        written = plan.apply_to_checkpoint(_source(name), target, say)
    found = {
        "target": str(written.path),
        "files": list(written.files),
        "centered": list(written.centered),
        "tables": list(written.tables),
        "resumed": list(written.resumed),
        "left_out": list(written.left_out),
        "folded": plan.folded,
        "total": plan.total,
    }
    run.show(loaded, found, _words(written, plan))


def _source(name: str) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, ignore_patterns=[f"*{suffix}" for suffix in OTHER_WEIGHTS]))


def _words(written: FoldedCheckpoint, plan: FoldPlan) -> str:
    files = f"{len(written.files)} file{'s' if len(written.files) > 1 else ''}"
    lines = [
        f"Folded: {plan.folded} of {plan.total} LayerNorms, {len(written.centered)} tensors centered in {files} in "
        f"'{written.path}'."
    ]
    if written.resumed:
        lines.append(f"{len(written.resumed)} of them an earlier run had written.")
    if written.left_out:
        lines.append(f"Left out, because they are not folded: {', '.join(written.left_out)}.")
    lines += [
        "To load it:",
        f"  model = lncompile.load_folded({plan.form.class_name.rpartition('.')[2]}, {str(written.path)!r})",
    ]
    return "\n".join(lines)
