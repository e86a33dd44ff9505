"""Asking what would fold, or what did."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lncompile.analysis import analyse
from lncompile.backend import centered_in_the_graph, compiled_graphs, make_report
from lncompile.lowering import torch_private
from lncompile.options import Options, parse_options
from lncompile.passes.canonical import tensor_of
from lncompile.passes.decisions import WeightRewrite
from lncompile.passes.materialize import forget_all
from lncompile.passes.provenance import parameter_name
from lncompile.report import FoldReport, merge
from lncompile.transform import transform


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> FoldReport:
    """Say of every LayerNorm of a model whether it folds, and why not. Compiles nothing and changes no weight.

    The model runs once, eagerly, while Dynamo captures its graphs, under the gradient mode of the caller: use
    ``torch.no_grad()`` to ask about inference.

    Args:
        model: a module or function, compiled (its ``lnfold`` options then hold) or not.
        args: what it is called with.
        kwargs: likewise.

    Returns:
        One report for all graphs of the model.

    Example:
        >>> with torch.no_grad():
        ...     print(lncompile.explain(model, input_ids))
    """
    options = Options()
    settings = _settings_of(model)
    if settings is not None:
        options, _ = parse_options(settings.get("mode"), settings.get("options"))
    reports: dict[int, FoldReport] = {}

    def capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        started = time.perf_counter()
        analysis = analyse(graph_module, example_inputs, options)
        report = make_report(graph_module, analysis, None, (), 0.0)
        if analysis.placement is not None:
            report = _with_weights(report, graph_module, analysis, options)
        report = FoldReport(report.sites, report.weights, report.centerings, 1, time.perf_counter() - started)

        def run(*arguments: Any) -> Any:
            reports[id(report)] = report
            return graph_module(*arguments)

        return run

    with torch_private.many_recompiles():
        captured: Callable[..., Any] = torch.compile(torch_private.original_callable(model), backend=capture)
        captured(*args, **kwargs)
    return merge(reports.values())


def _with_weights(report: FoldReport, graph_module: fx.GraphModule, analysis: Any, options: Options) -> FoldReport:
    """Add the weights a transformation would center, from shapes alone."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    transformed = transform(analysis, options)
    weights = centered_in_the_graph(transformed)
    materialised = [node for node in transformed.graph_module.graph.nodes if node.op == "placeholder"]
    for expression, value in zip(transformed.expressions, materialised[len(placeholders) :], strict=True):
        leaves = [placeholders[leaf] for leaf in expression.leaves]
        name = " · ".join(parameter_name(leaf) for leaf in leaves)
        # A bias that only absorbs a shift has the size of no parameter.
        tensor = tensor_of(value)
        tensor = tensor_of(leaves[0]) if tensor is None else tensor
        assert tensor is not None  # a parameter
        weights.append(WeightRewrite(name, tensor.numel() * tensor.element_size(), "copy"))
    return FoldReport(report.sites, tuple(weights), report.centerings)


def reports(compiled: Callable[..., Any]) -> list[FoldReport]:
    """Return the reports of the graphs that were really compiled for a model, in no particular order.

    Args:
        compiled: what ``torch.compile(..., backend="lnfold")`` returned (or the module it was made from, for all its
            compilations), after it was called.

    Returns:
        One report a compiled graph; empty before the first call. A graph of a module is found by its parameters, one of
        a function by its source.

    Example:
        >>> compiled = torch.compile(model, backend="lnfold"); compiled(x)
        >>> sum(report.folded for report in lncompile.reports(compiled))
        25
    """
    original = torch_private.original_callable(compiled)
    settings = _settings_of(compiled)
    records = [
        record for record in list(compiled_graphs) if settings is None or _same_settings(settings, record.arguments)
    ]
    if isinstance(original, torch.nn.Module):
        ours = {id(parameter) for parameter in original.parameters()}
        return [record.report for record in records if record.served() & ours]
    return [record.report for record in records if record.code is not None and _same_source(record.code, original)]


def _settings_of(compiled: Any) -> Mapping[str, Any] | None:
    """The ``mode`` and ``options`` a compiled callable hands to lnfold; None if it is not compiled with it."""
    backend = torch_private.innermost_backend(compiled)
    if getattr(backend, "compiler_name", None) != "lnfold":
        return None
    settings: Mapping[str, Any] = backend.kwargs
    return settings


def _same_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return all(
        (left.get("mode") == right.get("mode"), dict(left.get("options") or {}) == dict(right.get("options") or {}))
    )


def _same_source(code: Any, function: Any) -> bool:
    """Whether a code object is a function's own, or the continuation of it after a graph break."""
    own = getattr(inspect.unwrap(function), "__code__", None)
    return own is not None and (code.co_filename, code.co_firstlineno) == (own.co_filename, own.co_firstlineno)


def refresh() -> None:
    """Forget every centered weight, so that the next call of each compiled model computes them anew.

    Needed only after a write that torch does not count: ``parameter.data.copy_(...)`` or a write through NumPy.
    In-place updates, optimizer steps, ``load_state_dict`` and swapped Parameters are noticed by themselves.
    """
    forget_all()
