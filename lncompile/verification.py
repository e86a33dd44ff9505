"""Measuring that predictions do not change: eager, stock Inductor and lnfold against a float64 reference."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from lncompile.console import plain_console
from lncompile.explanation import settings_of
from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.options import arms

#: lnfold passes where its error is at most this many times stock Inductor's ...
BUDGET = 1.25
#: ... or within this many roundings of the output's dtype, where both are as good as exact.
ROUNDINGS = 4.0


@dataclass(frozen=True)
class OutputError:
    """Errors of one output tensor: ``‖y - y64‖ / ‖y64‖`` over the elements where ``y64`` is finite.

    Attributes:
        output: where the tensor stands in the model's output, ``".logits"``.
        dtype: its dtype.
        eager: error of the model run eagerly.
        inductor: error of ``torch.compile(model)``.
        lnfold: error of ``torch.compile(model, backend="lnfold")``.
        same_non_finite: whether lnfold's NaNs and infinities are those of the reference, in the same elements.
        not_finite: in how many elements lnfold gives NaN or an infinity where the reference is finite.
        not_finite_inductor: in how many stock Inductor does.
        elements: how many there are.
    """

    output: str
    dtype: str
    eager: float
    inductor: float
    lnfold: float
    same_non_finite: bool
    not_finite: int = 0
    not_finite_inductor: int = 0
    elements: int = 0

    @property
    def passed(self) -> bool:
        """Whether lnfold is as good as stock Inductor: within 1.25 times its error, or within rounding.

        NaN and infinity pass nowhere, even where stock Inductor's error is not finite either. Where only that is not,
        eager's takes its place.
        """
        if not self.same_non_finite or self.not_finite or not math.isfinite(self.lnfold):
            return False
        stock = next((error for error in (self.inductor, self.eager) if math.isfinite(error)), math.inf)
        resolution = torch.finfo(getattr(torch, self.dtype)).eps
        return self.lnfold <= max(BUDGET * stock, ROUNDINGS * resolution)

    def in_words(self) -> str:
        """Say in a sentence what is wrong with it; ``""`` where it passed."""
        if self.passed:
            return ""
        if self.not_finite:
            return (
                f"{self.output} is not finite: lnfold gives NaN or infinity in {self.not_finite} of {self.elements} "
                f"elements where the reference is finite (stock torch.compile: {self.not_finite_inductor})."
            )
        if not self.same_non_finite:
            return f"{self.output} is not NaN or infinite in the elements where the reference is."
        stock = f"stock torch.compile: {self.inductor:.1e}"
        return f"{self.output} is a relative {self.lnfold:.1e} from the reference ({stock})."


@dataclass(frozen=True)
class Verification:
    """The errors of every floating-point output of a model. ``print`` shows a table."""

    outputs: tuple[OutputError, ...]

    @property
    def passed(self) -> bool:
        """Whether every output passed."""
        return all(output.passed for output in self.outputs)

    def sentence(self) -> str:
        """Say in a few words whether predictions stay the same, and if they do not, in which outputs and how."""
        if self.passed:
            return "Predictions stay the same."
        return " ".join(["Predictions got worse.", *filter(None, (output.in_words() for output in self.outputs))])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts, lists, strings and numbers, ready for JSON."""
        outputs = [{**dataclasses.asdict(output), "passed": output.passed} for output in self.outputs]
        return {"passed": self.passed, "outputs": outputs}

    def __str__(self) -> str:
        buffer = io.StringIO()
        plain_console(buffer, width=120).print(self)
        return buffer.getvalue().rstrip()

    def __rich_console__(self, console: Console, options: Any) -> Iterable[Any]:
        """How rich prints it."""
        table = Table(box=None, pad_edge=False)
        for header in ("output", "dtype", "eager", "inductor", "lnfold", ""):
            table.add_column(header)
        for output in self.outputs:
            errors = (f"{error:.2e}" for error in (output.eager, output.inductor, output.lnfold))
            table.add_row(Text(output.output), output.dtype, *errors, _verdict(output))
        yield table


def _verdict(output: OutputError) -> Text:
    if output.passed:
        return Text("ok", style="green")
    finite = output.same_non_finite and not output.not_finite and math.isfinite(output.lnfold)
    return Text("WORSE" if finite else "NOT FINITE" if output.not_finite else "NOT THE SAME", style="bold red")


def verify(
    model: Callable[..., Any],
    *args: Any,
    progress: Callable[[str], None] | None = None,
    **kwargs: Any,
) -> Verification:
    """Compare eager, stock Inductor and lnfold with a float64 reference, on the model's own weights and these inputs.

    Runs under ``torch.no_grad()``. Needs memory for a float64 copy of the model.

    Args:
        model: a module in evaluation mode, or a function; one compiled with lnfold is verified with its mode and
            options, which stock Inductor gets as well, our own apart.
        args: what it is called with.
        progress: called with a few words before each step, which may take a minute.
        kwargs: as ``args``.

    Returns:
        The error of each floating-point tensor among the outputs.

    Raises:
        ValueError: for a model in training mode (dropout draws other numbers at each call), one on the meta device, or
            one without outputs in floating point.

    Example:
        >>> lncompile.verify(model, input_ids).passed
        True
    """
    settings = settings_of(model) or {}
    model = torch_private_dynamo.original_callable(model)
    if isinstance(model, torch.nn.Module) and model.training:
        raise ValueError("the model is in training mode, where dropout makes outputs random: call model.eval() first")
    if any(value.device.type == "meta" for value in _tensors(model, args, kwargs)):
        raise ValueError("the model or its input is on the meta device, where there are no values to compare")
    say = progress or (lambda _: None)
    with torch.no_grad():
        say("float64 reference")
        reference = _reference(model, args, kwargs)
        if not reference:
            raise ValueError("the model returns no floating-point tensor, so there is nothing to compare")
        say("eager")
        eager = floating_outputs(model(*args, **kwargs))
        compiled = {}
        for backend, arguments in arms(settings.get("mode"), settings.get("options")).items():
            say(f"torch.compile(backend={backend!r})")
            with torch_private_dynamo.many_recompiles():
                outputs = torch.compile(model, backend=backend, **arguments)(*args, **kwargs)
                # Outputs of CUDA graphs (mode="reduce-overhead") are overwritten by the next run of any.
                compiled[backend] = {name: value.clone() for name, value in floating_outputs(outputs).items()}
    return Verification(
        tuple(
            _compare(name, expected, eager[name], compiled["inductor"][name], compiled["lnfold"][name])
            for name, expected in reference.items()
        )
    )


def _tensors(model: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[Tensor]:
    if isinstance(model, torch.nn.Module):
        yield from itertools.chain(model.parameters(), model.buffers())
    yield from (value for value in torch_private.tree_leaves((args, kwargs)) if isinstance(value, Tensor))


def _compare(name: str, expected: Tensor, eager: Tensor, inductor: Tensor, lnfold: Tensor) -> OutputError:
    finite = expected.isfinite()
    return OutputError(
        name,
        str(eager.dtype).removeprefix("torch."),
        relative_error(eager, expected),
        relative_error(inductor, expected),
        relative_error(lnfold, expected),
        _same_non_finite(lnfold, expected),
        int((finite & ~lnfold.isfinite()).sum()),
        int((finite & ~inductor.isfinite()).sum()),
        expected.numel(),
    )


def _same_non_finite(value: Tensor, expected: Tensor) -> bool:
    """Whether NaNs stand where NaNs are expected, and infinities where those of the same sign are."""
    kinds = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(kind(value), kind(expected)) for kind in kinds)


def _reference(model: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Tensor]:
    def widen(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = torch_private.tree_map(widen, (args, kwargs))
    wide = copy.deepcopy(model).double() if isinstance(model, torch.nn.Module) else model
    with _default_dtype(torch.float64):
        return floating_outputs(wide(*args, **kwargs))


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Models make constants of the default dtype (position tables, masks): the reference wants them wide too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def floating_outputs(output: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors of a model's output, by where they stand in it."""
    return {
        path or "output": value
        for path, value in torch_private.leaves_with_path(output)
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return ``‖value - expected‖ / ‖expected‖`` in float64, over the elements where ``expected`` is finite."""
    finite = expected.isfinite()
    wide, expected = value.to(torch.float64)[finite], expected.to(torch.float64)[finite]
    scale = expected.norm()
    difference = (wide - expected).norm()
    return float(difference / scale) if scale > 0 else float(difference)
