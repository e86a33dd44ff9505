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
from lncompile.plans import application, table
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
            PlanError: where the plan does not fit the model, or a weight cannot be written (quantized, on the meta
                device, made under ``torch.inference_mode()``). The message lists what differs, and nothing was changed.

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

    def save(self, path: str | Path) -> None:
        """Write the plan to a file, as JSON that people can read."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> FoldPlan:
        """Read a plan from a file.

        Raises:
            PlanError: where the file is not a plan, or one of a newer version than this one reads.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{path} is not a fold plan: {error}") from error
        return cls.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Any) -> FoldPlan:
        """Make it of what :meth:`to_dict` returned.

        Raises:
            PlanError: where it is something else.
        """
        return from_dict(cls, values)

    def __str__(self) -> str:
        buffer = io.StringIO()
        plain_console(buffer, width=160).print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it."""
        return table.lines(self)
