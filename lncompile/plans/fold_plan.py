"""The fold plan itself: what it holds, how it is kept in a file, applied, and printed."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from lncompile.console import plain_console
from lncompile.plans import application, checkpoint, table
from lncompile.plans.checkpoint import FoldedCheckpoint
from lncompile.plans.consistency import require_consistent
from lncompile.plans.entries import (
    AbsorbedNorm,
    CenteredLookup,
    CenteredParameter,
    KeptParameter,
    ModelForm,
    PlanError,
    PlannedNorm,
    ReplacedNorm,
)
from lncompile.plans.serialization import from_dict, to_dict
from lncompile.progress import Say


@dataclass(frozen=True)
class FoldPlan:
    """The fold of an architecture as data: made by :func:`lncompile.plan`, applied to any model of that architecture.

    Attributes:
        form: what a model must have so that the plan fits it.
        center: parameters that are centered.
        replace: norms that become :class:`lncompile.nn.RMSNorm`.
        lookups: embeddings with a tied table.
        absorb: norms whose γ or β the layers behind them take, where that was asked for.
        norms: every LayerNorm of the example calls, and what becomes of it.
        kept: parameters that norms would need centered and that stay as they are, with why.
        unreached: names of the parameters that no example call reads. They stay as they are.

    Example:
        >>> plan = lncompile.plan(model, input_ids)
        >>> print(plan)
        >>> plan.apply(model)
    """

    form: ModelForm
    center: tuple[CenteredParameter, ...] = ()
    replace: tuple[ReplacedNorm, ...] = ()
    lookups: tuple[CenteredLookup, ...] = ()
    absorb: tuple[AbsorbedNorm, ...] = ()
    norms: tuple[PlannedNorm, ...] = ()
    kept: tuple[KeptParameter, ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def folded(self) -> int:
        """How many norms get an input of zero mean."""
        return sum(norm.folded for norm in self.norms)

    @property
    def total(self) -> int:
        """How many LayerNorms the example calls run."""
        return len(self.norms)

    @property
    def is_empty(self) -> bool:
        """Whether applying it changes nothing."""
        return not (self.center or self.replace or self.lookups or self.absorb)

    def apply(self, model: nn.Module) -> nn.Module:
        """Fold a model in place.

        Everything is checked before anything is changed. What is centered already stays as it is, so that a plan that
        is applied twice is a plan that is applied once. Compiled models notice the change by themselves.

        Each parameter is centered in float64 and rounded once.

        Args:
            model: of the architecture that the plan was made for, with its weights.

        Returns:
            The model.

        Raises:
            PlanError: where the plan does not fit the model (names, shapes, ties, classes, attributes, hooks), a weight
                cannot be written (quantized, on the meta device, made under ``torch.inference_mode()``), or its dtype
                cannot hold what it would become. The message lists what differs, and nothing was changed.

            What interrupts the writing itself (Ctrl-C, no memory) leaves the model as it was, too, but for centered
            weights, which are put back to one rounding of their dtype.

        Example:
            >>> lncompile.FoldPlan.load("opt.fold.json").apply(model)
        """
        return application.apply(self, model)

    def replace_modules(self, model: nn.Module) -> nn.Module:
        """Give a model the modules of a folded one, and leave its values as they are, for a folded state dict to come.

        Args:
            model: of the architecture that the plan was made for. It may be on the meta device.

        Returns:
            The model.

        Raises:
            PlanError: where the plan does not fit the model.

        Example:
            >>> torch.save(plan.apply(model).state_dict(), "folded.pt"); plan.save("model.fold.json")
            >>> model = FoldPlan.load("model.fold.json").replace_modules(Model(config))
            >>> model.load_state_dict(torch.load("folded.pt"))
        """
        return application.replace_modules(self, model)

    def apply_to_checkpoint(
        self, source: str | Path, target: str | Path, progress: Say | None = None
    ) -> FoldedCheckpoint:
        """Fold a checkpoint on disk: safetensors files in, safetensors files out, in memory for one tensor.

        Each tensor is centered in float64 and rounded once, as :meth:`apply` does it. The plan is written beside the
        weights as ``lncompile_fold.json``, and the other files of the folder are copied. Weights in other formats,
        which would stay as they were, are left out. Names may lack the prefix of a base model, or have it; where
        transformers renames tensors as it loads them, its own mapping says how.

        The target comes into being when everything is written and was read back: means of what was centered are near
        zero, the bytes of the rest are those of the source. Biases that are to take β are added where there were none,
        and β leaves the files: :func:`lncompile.load_folded` loads those. What a call had finished that was
        interrupted, at whatever moment, the next call with the same arguments takes over. Memory is for the largest
        tensor and some 200 MiB.

        Args:
            source: a folder as ``save_pretrained`` writes it, in one file or in several with an index; or one file.
            target: a folder to be made. It is on the disk of its parent folder, where it takes as much as the source.
            progress: told what goes on.

        Returns:
            What was written.

        Raises:
            PlanError: where the plan does not fit the checkpoint: tensors are missing, have other shapes or a dtype
                in which they cannot be centered. Nothing was written.
            CheckpointError: where the source cannot be read, has weights in folders inside of it or of something else,
                the target exists, another process is writing it, or a tensor with values that are not finite, before or
                after, cannot be centered.

        Example:
            >>> lncompile.FoldPlan.load("opt.fold.json").apply_to_checkpoint("opt-13b", "opt-13b-folded")
            >>> model = lncompile.load_folded(OPTForCausalLM, "opt-13b-folded")
        """
        return checkpoint.apply_to_checkpoint(self, Path(source), Path(target), progress)

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, as JSON that people can read."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FoldPlan:
        """Read a plan from a file.

        Raises:
            PlanError: where the file is not a plan, one of a newer version than this one reads, or one whose parts do
                not fit each other. The message says what is wrong.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{path} is not a fold plan: {error}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Any) -> FoldPlan:
        """Make it of what :meth:`to_dict` returned.

        Raises:
            PlanError: where it is something else, or its parts do not fit each other.
        """
        plan = from_dict(cls, values)
        require_consistent(plan)
        return plan

    def __str__(self) -> str:
        buffer = io.StringIO()
        plain_console(buffer).print(self)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it."""
        return table.lines(self)
