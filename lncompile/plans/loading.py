"""Loading a checkpoint that was folded: the model's class, the modules of the plan, and values that only they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lncompile.plans import safetensors_file
from lncompile.plans.checkpoint import PLAN_FILE
from lncompile.plans.checkpoint_names import naming_of
from lncompile.plans.checkpoint_tensors import SUFFIX
from lncompile.plans.fold_plan import FoldPlan
from lncompile.plans.safetensors_file import CheckpointError, SafetensorsFile


def load_folded(model_class: Any, folder: str | Path, **kwargs: Any) -> nn.Module:
    """Load a folded checkpoint, which ``lncompile fold`` or :meth:`FoldPlan.apply_to_checkpoint` has written.

    The model's class loads it with ``from_pretrained``; the norms of the plan become RMSNorms; biases that took β of a
    norm, which the class does not know, are read from the files.

    Args:
        model_class: a class with ``from_pretrained``, such as ``transformers.OPTForCausalLM``.
        folder: of the checkpoint.
        kwargs: for ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: where the folder has no plan, or lacks a tensor that the plan speaks of.
        PlanError: where the plan does not fit the model.

    Example:
        >>> model = lncompile.load_folded(transformers.OPTForCausalLM, "opt-13b-folded", dtype=torch.bfloat16)
    """
    folder = Path(folder)
    if not (folder / PLAN_FILE).is_file():
        raise CheckpointError(f"'{folder}' has no {PLAN_FILE}: it is not a folder that lncompile has folded")
    plan = FoldPlan.load(folder / PLAN_FILE)
    model: nn.Module = plan.replace_modules(model_class.from_pretrained(folder, **kwargs))
    added = {
        layer.bias for entry in plan.absorb for layer in entry.layers if layer.adds_bias and layer.bias is not None
    }
    if added:
        _read_into(model, plan, folder, added)
    return model.eval()


def _read_into(model: nn.Module, plan: FoldPlan, folder: Path, names: set[str]) -> None:
    """Read some parameters from a checkpoint's files."""
    files = [SafetensorsFile.read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))]
    naming = naming_of(plan, {stored.name for file in files for stored in file.tensors}, folder)
    missing = set(names)
    for file in files:
        with file.path.open("rb") as read:
            for stored in file.tensors:
                name = naming.in_plan[stored.name]
                if name in missing:
                    missing.discard(name)
                    with torch.no_grad():
                        model.get_parameter(name).copy_(safetensors_file.load(read, stored))
    if missing:
        raise CheckpointError(f"'{folder}' lacks {', '.join(sorted(missing))}")
