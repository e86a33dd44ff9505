"""The backend: ``torch.compile(model, backend="lnfold")``.

One readable pipeline. Whatever goes wrong inside our passes is logged with its reason, and the graph is compiled as
stock torch.compile would have compiled it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from lncompile import safety_net
from lncompile.compiled_graphs import CompiledGraph, compiled_graphs
from lncompile.folded_graph import FoldedGraph, record_for_other_processes
from lncompile.lowering import (
    persistent_norms,
    torch_private,
    torch_private_dynamo,
    torch_private_inductor,
    torch_private_precompile,
)
from lncompile.options import Options, parse_options
from lncompile.reporting import log_lines
from lncompile.reporting.report import FoldReport
from lncompile.runtime.parameter_identity import parameters_of
from lncompile.runtime.renewals import tell_again
from lncompile.runtime.unfolded import Unfolded
from lncompile.selection.entrance import prepare_selected
from lncompile.versions import warn_if_untested

_used_configurations: list[dict[str, Any]] = []


def lnfold(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph with Inductor after folding the LayerNorms that can be folded. The Dynamo backend "lnfold".

    Args:
        graph_module: the graph Dynamo captured; it is not changed.
        example_inputs: the value of each placeholder.
        mode: as for ``torch.compile``.
        options: ours under ``lnfold.`` (see :class:`lncompile.options.Options`), any other key an Inductor option.

    Returns:
        The compiled function.

    Raises:
        OptionError: for an unknown option or a value it does not take.

    Example:
        >>> compiled = torch.compile(model, backend="lnfold", options={"lnfold.nonfoldable": "eager"})
    """
    # Here, and not above: a process that loads what another has compiled does not need the passes.
    from lncompile.pipeline import prepare, prepare_frozen

    ours, inductor_config = parse_options(mode, options)
    warn_if_untested()
    if inductor_config not in _used_configurations:
        _used_configurations.append(inductor_config)
    example_inputs = list(example_inputs)
    arguments = {"mode": mode, "options": dict(options or {})}
    try:
        freezes = torch_private_inductor.freezes_weights(inductor_config)
        by = prepare_frozen if freezes else prepare
        prepared, inductor_config = prepare_selected(graph_module, example_inputs, ours, inductor_config, by)
    except Exception as error:
        if not safety_net.enabled:
            raise
        return _untouched(graph_module, example_inputs, inductor_config, arguments, error)
    _publish(prepared.report)
    record = functools.partial(CompiledGraph, prepared.report, torch_private_dynamo.code_being_compiled(), arguments)
    if prepared.graph_module is None:
        compiled = torch_private_inductor.inductor_compile(graph_module, example_inputs, inductor_config)
        return _remember(compiled, record(prepared.parameters))
    rewritten, materializer = prepared.graph_module, prepared.materializer
    try:
        has_other_inputs = materializer is None or materializer.expressions
        names = torch_private_precompile.rename_recorded(rewritten) if has_other_inputs else None
        inputs = [*example_inputs, *prepared.values]
        static = torch_private.static_fake_tensors(prepared.values)
        with persistent_norms(rewritten, inductor_config):
            compiled = torch_private_inductor.inductor_compile(rewritten, inputs, inductor_config)
        del static, inputs  # had to live until here
    except torch_private_dynamo.DynamoException:
        raise  # Dynamo talks to itself in exceptions: "start again with other assumptions"
    except Exception as error:
        if not safety_net.enabled:
            raise
        return _untouched(graph_module, example_inputs, inductor_config, arguments, error)
    recorded = record(prepared.parameters, materializer)
    if materializer is None or not materializer.expressions:
        return _remember(compiled, recorded)
    compiled = torch_private_dynamo.innermost_function(compiled)
    folded = FoldedGraph(compiled, recorded, ours, Unfolded(graph_module, inductor_config))
    if names is not None:
        record_for_other_processes(folded, names)
    return folded


def _reset() -> None:
    """What ``torch._dynamo.reset()`` calls: drop CUDA graphs, as stock torch.compile does."""
    for configuration in _used_configurations:
        torch_private_inductor.inductor_reset(configuration)
    _used_configurations.clear()
    tell_again()
    log_lines.tell_again()


lnfold.reset = _reset  # type: ignore[attr-defined]


def _untouched(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: dict[str, Any],
    arguments: Mapping[str, Any],
    error: Exception,
) -> Callable[..., Any]:
    """Log our failure and do what stock torch.compile does."""
    reason = safety_net.log_failure("lnfold failed and compiles this graph as stock torch.compile would", error)
    report = safety_net.report_untouched(graph_module, reason)
    compiled = torch_private_inductor.inductor_compile(graph_module, example_inputs, config)
    parameters = parameters_of(graph_module.graph, example_inputs)
    return _remember(compiled, CompiledGraph(report, torch_private_dynamo.code_being_compiled(), arguments, parameters))


def _publish(report: FoldReport) -> None:
    torch_private_dynamo.count("graphs")
    torch_private_dynamo.count("sites", report.total)
    torch_private_dynamo.count("folded", report.folded)
    try:
        torch_private_dynamo.trace_artifact("lnfold_report", lambda: json.dumps(report.to_dict(), indent=2))
        log_lines.say(report, torch_private_dynamo.frame_being_compiled())
    except Exception as error:
        if not safety_net.enabled:
            raise
        safety_net.log_failure("lnfold cannot say what it made of a graph, and goes on", error)


def _remember(compiled: Callable[..., Any], record: CompiledGraph) -> Callable[..., Any]:
    """Return what Inductor made, with the record tied to it. A call costs what it costs with stock."""
    compiled = torch_private_precompile.savable(torch_private_dynamo.innermost_function(compiled))
    try:
        return _tied(compiled, record)
    except AttributeError:  # a bound method, say

        def run(*arguments: Any) -> Any:
            return compiled(*arguments)

        return _tied(run, record)


def _tied(function: Callable[..., Any], record: CompiledGraph) -> Callable[..., Any]:
    """Have a record live as long as a function."""
    function.record = record  # type: ignore[attr-defined]
    return function


__all__ = ["CompiledGraph", "Options", "compiled_graphs", "lnfold"]
