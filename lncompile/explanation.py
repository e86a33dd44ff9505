"""Asking what would fold, or what did."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from lncompile import safety_net
from lncompile.compiled_graphs import CompiledGraph, are_same, arguments_of, compiled_graphs
from lncompile.lowering import torch_private, torch_private_breaks, torch_private_dynamo, torch_private_inductor
from lncompile.models.stand_ins import is_on_meta, stand_ins
from lncompile.options import parse_options
from lncompile.passes.graph.graph_breaks import in_words
from lncompile.pipeline import plan
from lncompile.reporting.captured import inside, norms_outside, with_paths
from lncompile.reporting.model_reports import Reports
from lncompile.reporting.report import FoldReport, merge
from lncompile.runtime.materialize import forget_all


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> FoldReport:
    """Say of every LayerNorm of a model whether it folds, and why not. Compiles nothing and changes no weight.

    The model runs once, eagerly, while Dynamo captures its graphs, under the gradient mode of the caller: use
    ``torch.no_grad()`` to ask about inference. On the meta device, where it takes no memory, a module of any size is
    answered for as if its weights were on the GPU, or on the CPU where there is none; only that a weight happens to be
    centered already cannot be known then.

    Args:
        model: a module or function, compiled (its ``lnfold`` options then hold) or not.
        args: what it is called with.
        kwargs: likewise.

    Returns:
        One report for all graphs of the model.

    Raises:
        ValueError: for a model on the meta device that decides by the values of tensors what it does.

    Example:
        >>> with torch.no_grad():
        ...     print(lncompile.explain(model, input_ids))

        >>> with torch.device("meta"):
        ...     model, input_ids = OPTForCausalLM(config_of_66b), torch.zeros(1, 64, dtype=torch.int64)
        >>> with torch.no_grad():
        ...     lncompile.explain(model.eval(), input_ids).folded
        129
    """
    options, inductor = parse_options(None, None)
    settings = settings_of(model)
    if settings is not None:
        options, inductor = parse_options(settings.get("mode"), settings.get("options"))
    original = torch_private_dynamo.original_callable(model)
    ran: dict[int, tuple[FoldReport, Sequence[Any]]] = {}
    parameters: set[int] = set()

    def capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            report = plan(graph_module, example_inputs, options, inductor)
        except Exception as error:
            if not safety_net.enabled:
                raise
            reason = safety_net.log_failure("lncompile.explain failed and cannot say what folds in a graph", error)
            report = safety_net.report_untouched(graph_module, reason)
        parameters.update(map(id, example_inputs))
        if not _is_own_code(torch_private_dynamo.code_being_compiled(), original):
            report = inside(report)

        def run(*arguments: Any) -> Any:
            with torch_private.as_plain_tensors():
                outputs = graph_module(*arguments)
            ran[id(report)] = report, outputs
            return outputs

        return run

    breaks = torch_private_breaks.watch_graph_breaks()
    try:
        with _with_stand_ins(original, args, kwargs) as (args, kwargs):
            with torch_private_dynamo.many_recompiles(), torch_private_inductor.without_freezing():
                captured: Callable[..., Any] = torch.compile(original, backend=capture)
                result = captured(*args, **kwargs)
            is_whole = len(ran) == 1 and not breaks()
            found = merge(with_paths(report, outputs, result, is_whole) for report, outputs in ran.values())
            outside = norms_outside(original, parameters, [site.name for site in found.sites])
    finally:
        ran.clear()  # Dynamo keeps what it compiled, and the results would stay with it
    return dataclasses.replace(
        found,
        graph_breaks=tuple(dict.fromkeys((*in_words(breaks()), *found.graph_breaks))),
        norms_outside=outside,
    )


@contextlib.contextmanager
def _with_stand_ins(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Put fake tensors in the place of those on the meta device, which have no values."""
    if not is_on_meta(model):
        yield args, kwargs
        return
    with stand_ins(model, (args, kwargs)) as exchanged:
        try:
            yield exchanged
        except Exception as error:
            operation = torch_private.values_missed_by(error)
            if not operation:
                raise
            raise ValueError(
                f"what the model does depends on the values of its tensors ({operation}), and on the meta device there "
                "are none: it has to be explained with its weights"
            ) from error


def reports(compiled: Callable[..., Any]) -> Reports:
    """Return the reports of the graphs that were really compiled for a model, in the order of their compilation.

    Args:
        compiled: what ``torch.compile(..., backend="lnfold")`` returned (or the module it was made from, for all its
            compilations), after it was called.

    Returns:
        A list with one report for each compiled graph, which prints as one table. It is empty before the first call,
        and then says so where it is printed. A graph of a module is found by its parameters, one of a function by its
        source, one of a module's method by both.

    Example:
        >>> compiled = torch.compile(model, backend="lnfold"); compiled(x)
        >>> print(lncompile.reports(compiled))
        >>> sum(report.folded for report in lncompile.reports(compiled))
        25
    """
    original = torch_private_dynamo.original_callable(compiled)
    settings = settings_of(compiled)
    records = [
        record
        for record in sorted(compiled_graphs, key=lambda record: record.number)
        if settings is None or are_same(settings, record.arguments)
    ]
    owner = original if isinstance(original, torch.nn.Module) else getattr(original, "__self__", None)
    if owner is not original:
        records = [record for record in records if record.code is not None and _same_source(record.code, original)]
    if isinstance(owner, torch.nn.Module):
        # A method has its source in common with all modules of the class; without parameters that is all there is.
        ours = {id(parameter) for parameter in owner.parameters()}
        records = [record for record in records if _is_of(record, ours, original is not owner)]
    found = [record.report for record in records]
    found = [
        report if _is_own_code(record.code, original) else inside(report)
        for report, record in zip(found, records, strict=True)
    ]
    served = set().union(*(record.served() for record in records))
    outside = norms_outside(original, served, [site.name for report in found for site in report.sites])
    return Reports(found, _why_none(compiled, original), outside if found else ())


def _is_of(record: CompiledGraph, parameters: set[int], without_any: bool) -> bool:
    """Whether a graph was called with some of these parameters; or has none at all, where that is asked for.

    Code outlives a model: Dynamo keeps it with the class's method. Then it has parameters, and none of them is alive.
    """
    return bool(record.served() & parameters) or (without_any and not record.parameters)


def _why_none(compiled: Any, original: Any) -> str:
    """What to say of a model without reports."""
    backend = torch_private_dynamo.innermost_backend(compiled)
    if backend is not None and settings_of(compiled) is None:
        name = getattr(backend, "compiler_name", None) or getattr(backend, "__name__", type(backend).__name__)
        return f"This was compiled with backend '{name}', not with lnfold: torch.compile(model, backend=\"lnfold\")."
    what = "model" if isinstance(original, torch.nn.Module) else "function"
    if not torch_private_dynamo.is_compiled(compiled):
        return (
            f"No graph of this {what} was compiled with lnfold. Compile it and call what torch.compile(model, "
            'backend="lnfold") returns: the first call compiles.'
        )
    return (
        f"No graph of this {what} is compiled: it was not called yet (the first call compiles), or not since "
        "torch._dynamo.reset(). If it was called, Dynamo captured no graph of it; torch._dynamo.explain(model)(inputs) "
        "says why."
    )


def settings_of(compiled: Any) -> Mapping[str, Any] | None:
    """Return the ``mode`` and ``options`` a compiled callable hands to lnfold; None if it is not compiled with it."""
    return arguments_of(torch_private_dynamo.innermost_backend(compiled))


def _is_own_code(code: Any, original: Any) -> bool:
    """Whether a code object is a model's own forward or a function itself, and not code that it calls."""
    if code is None:
        return True  # a backend that was called by hand
    if isinstance(original, torch.nn.Module):
        return torch_private_breaks.original_code(code) in torch_private_dynamo.codes_of_call(original)
    return _same_source(code, original)


def _same_source(code: Any, function: Any) -> bool:
    """Whether a code object is a function's own, or the continuation of it after a graph break."""
    own, code = getattr(inspect.unwrap(function), "__code__", None), torch_private_breaks.original_code(code)
    return own is not None and (code.co_filename, code.co_firstlineno) == (own.co_filename, own.co_firstlineno)


def refresh() -> None:
    """Forget every centered weight, so that the next call of each compiled model computes them anew.

    Graphs whose weights changed at nearly every call fold again.

    Needed after a write that torch does not count and that leaves nearly all elements as they are, such as
    ``parameter.data[row] = ...`` of a large table. With ``lnfold.check="versions"`` or ``"off"`` needed after any write
    that is not looked for. All others are noticed by themselves.
    """
    forget_all()
