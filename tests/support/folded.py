"""`lncompile.fold` on a model that is compiled anyway: the graph is captured once, and folded from there."""

from __future__ import annotations

from dataclasses import dataclass

from fuzzing import centering_left_out
from graphs import CapturedCall
from torch import nn

from lncompile.folding import Capture, FoldedModule, capture_call, fold_capture
from lncompile.options import Options
from lncompile.signature import Signature


@dataclass(frozen=True)
class Folded:
    """What fold() made of a model.

    Attributes:
        refused: what was said of a model that it cannot take; "" of all others.
        module: the folded module.
        uncentered: the same with centering left out, so that RMSNorms get what has a mean; None where nothing folds.
    """

    refused: str = ""
    module: FoldedModule | None = None
    uncentered: FoldedModule | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Sites, folded sites, and centerings at run time."""
        assert self.module is not None
        report = self.module.report
        return report.total, report.folded, len(report.centerings)


def fold_captured(model: nn.Module, call: CapturedCall) -> Folded:
    """Fold a model that was called compiled.

    Args:
        model: the model.
        call: the call of it, with its graphs. One that is whole is not captured again.
    """

    signature = Signature((), call.inputs)
    if call.is_whole:
        (graph,) = call.graphs
        capture = Capture(graph.graph_module, graph.example_inputs, signature, graph.outputs, call.result)
    else:
        try:
            capture = capture_call(model, signature)
        except Exception as error:
            return Folded(refused=f"{type(error).__name__}: {error}")
    module = fold_capture(model, capture, Options())
    if not module.report.folded:
        return Folded(module=module)
    with centering_left_out():
        return Folded(module=module, uncentered=fold_capture(model, capture, Options()))
