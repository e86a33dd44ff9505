"""What a model has, against what of it Dynamo captured: norms in no graph, and where results of graphs end up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from lncompile.lowering import torch_private
from lncompile.passes.decisions import ReturnedTensor
from lncompile.reporting.report import FoldReport


def norms_outside(model: Callable[..., Any], parameters: Collection[int], sites: Collection[str]) -> tuple[str, ...]:
    """Names of a model's LayerNorm modules that no captured graph holds.

    Args:
        model: a module; of anything else nothing is known.
        parameters: the ``id()`` of each parameter that the graphs read.
        sites: the names of the norms in the graphs. Those of a graph behind a graph break may begin in the middle of
            the model. They tell of modules without parameters of their own.

    Returns:
        The names, as ``named_modules()`` gives them: instances of ``torch.nn.LayerNorm`` and of its subclasses.
    """
    if not isinstance(model, nn.Module):
        return ()
    names = []
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            own = [id(parameter) for parameter in module.parameters(recurse=False)]
            known = any(p in parameters for p in own) if own else any(f".{name}".endswith(f".{s}") for s in sites)
            if not known:
                names.append(name)
    return tuple(names)


def with_paths(report: FoldReport, outputs: Sequence[Any], result: Any, is_whole: bool) -> FoldReport:
    """Name the tensors that a graph returns, and that keep norms from folding, by their place in the model's result.

    Args:
        report: of a graph.
        outputs: what the graph returned in one call.
        result: what the model returned in it: the same objects stand there.
        is_whole: whether this is the only graph of the model. Else what is not in the result goes to another one.
    """
    if not any(site.returned for site in report.sites):
        return report
    paths: dict[int, str] = {}
    for path, leaf in torch_private.leaves_with_path(result):
        if isinstance(leaf, Tensor):
            paths.setdefault(id(leaf), path)
    listed = outputs if isinstance(outputs, list | tuple) else [outputs]

    def named(found: ReturnedTensor) -> ReturnedTensor:
        path = paths.get(id(listed[found.position]))
        if path is None:
            return dataclasses.replace(found, is_inside=found.is_inside or not is_whole)
        return dataclasses.replace(found, path=path, graph_break="", is_inside=False)

    return _with_returned(report, named)


def inside(report: FoldReport) -> FoldReport:
    """The report of a graph that is not the model's own forward, but of code that it calls."""
    return _with_returned(report, lambda found: dataclasses.replace(found, is_inside=True))


def _with_returned(report: FoldReport, change: Callable[[ReturnedTensor], ReturnedTensor]) -> FoldReport:
    if not any(site.returned for site in report.sites):
        return report
    sites = tuple(dataclasses.replace(site, returned=tuple(map(change, site.returned))) for site in report.sites)
    return dataclasses.replace(report, sites=sites)
