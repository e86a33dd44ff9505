"""The backend: ``torch.compile(model, backend="lnfold")``.

One readable pipeline. Whatever goes wrong inside our passes is logged with its reason, and the graph is compiled as
stock torch.compile would have compiled it.
"""

from __future__ import annotations

import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.analysis import Analysis, analyse
from lncompile.lowering import persistent_norms, torch_private
from lncompile.options import Options, parse_options
from lncompile.passes.canonical import tensor_of
from lncompile.passes.decisions import Reason, WeightRewrite
from lncompile.passes.materialize import Materializer
from lncompile.passes.provenance import parameter_name, parameter_names
from lncompile.passes.sharding import local_bytes
from lncompile.passes.sites import find_sites
from lncompile.passes.verdicts import describe_centerings, left_alone
from lncompile.report import FoldReport
from lncompile.transform import Transformed, transform
from lncompile.versions import warn_if_untested

log = logging.getLogger("lncompile")

#: Whether a failure of our own is logged and the graph compiled untouched (True), or raised (False; our tests).
safety_net = os.environ.get("LNCOMPILE_SAFETY_NET", "1") != "0"


@dataclass(eq=False)
class CompiledGraph:
    """What was compiled: the report, with enough to find it again from a compiled model. Lives as long as the code."""

    report: FoldReport
    tensors: tuple[weakref.ref[Tensor], ...]
    code: Any
    arguments: Mapping[str, Any]
    materializer: Materializer | None = None

    def served(self) -> set[int]:
        """Ids of the parameters it was compiled with and, where Dynamo reused the code, called with since."""
        seen = {id(tensor) for reference in self.tensors if (tensor := reference()) is not None}
        return seen | (self.materializer.seen() if self.materializer else set())


compiled_graphs: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()
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
    ours, inductor_config = parse_options(mode, options)
    warn_if_untested()
    _used_configurations.append(inductor_config)
    example_inputs = list(example_inputs)
    started = time.perf_counter()
    arguments = {"mode": mode, "options": dict(options or {})}
    try:
        analysis = analyse(graph_module, example_inputs, ours)
        untouched = analysis.placement is None and (ours.nonfoldable == "inductor" or not analysis.sites)
        transformed = None if untouched else transform(analysis, ours)
        materializer = Materializer(transformed.expressions if transformed else (), ours.check)
        values = materializer(example_inputs)
        report = make_report(graph_module, analysis, transformed, values, time.perf_counter() - started)
    except Exception as error:
        if not safety_net:
            raise
        return _untouched(graph_module, example_inputs, inductor_config, arguments, error)
    _publish(report)
    if not report.sites:
        return torch_private.inductor_compile(graph_module, example_inputs, inductor_config)
    if transformed is None:
        compiled = torch_private.inductor_compile(graph_module, example_inputs, inductor_config)
        return _remember(compiled, example_inputs, report, arguments)
    try:
        static = torch_private.static_fake_tensors(values)
        with persistent_norms(transformed.graph_module, inductor_config):
            compiled = torch_private.inductor_compile(
                transformed.graph_module, [*example_inputs, *values], inductor_config
            )
        del static  # had to live until here
    except torch_private.DynamoException:
        raise  # Dynamo talks to itself in exceptions: "start again with other assumptions"
    except Exception as error:
        if not safety_net:
            raise
        return _untouched(graph_module, example_inputs, inductor_config, arguments, error)
    return _remember(compiled, example_inputs, report, arguments, materializer)


def _reset() -> None:
    """What ``torch._dynamo.reset()`` calls: drop CUDA graphs, as stock torch.compile does."""
    for configuration in _used_configurations:
        torch_private.inductor_reset(configuration)
    _used_configurations.clear()


lnfold.reset = _reset  # type: ignore[attr-defined]


def make_report(
    graph_module: fx.GraphModule,
    analysis: Analysis,
    transformed: Transformed | None,
    values: Sequence[Tensor],
    seconds: float,
) -> FoldReport:
    """Put the decisions for one graph, and the weights materialised for it, into a report."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    weights = []
    for expression, value in zip(transformed.expressions if transformed else (), values, strict=True):
        name = " · ".join(parameter_name(placeholders[leaf]) for leaf in expression.leaves)
        weights.append(WeightRewrite(name, local_bytes(value), "copy"))
    weights += centered_in_the_graph(transformed)
    centerings = (
        describe_centerings(analysis.placement, analysis.variables, analysis.costs) if analysis.placement else ()
    )
    return FoldReport(analysis.verdicts, tuple(weights), centerings, 1, seconds)


def centered_in_the_graph(transformed: Transformed | None) -> list[WeightRewrite]:
    """The weights that a transformed graph centers at every call."""
    weights = []
    for node in transformed.in_graph if transformed else ():
        tensor = tensor_of(node)
        assert tensor is not None  # what was emitted carries its value
        weights.append(WeightRewrite(" · ".join(parameter_names(node)), tensor.nbytes, "graph"))
    return weights


def _untouched(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: dict[str, Any],
    arguments: Mapping[str, Any],
    error: Exception,
) -> Callable[..., Any]:
    """Log our failure and do what stock torch.compile does."""
    reason = f"{type(error).__name__}: {error}"
    log.warning("lnfold failed and compiles this graph as stock torch.compile would. Please report it: %s", reason)
    log.debug("where it failed", exc_info=error)
    torch_private.count("internal_errors")
    try:
        sites = find_sites(graph_module.graph)
    except Exception as second:  # the failure may be in finding sites itself; it was logged above
        log.debug("no list of sites: %s", second)
        sites = ()
    report = FoldReport(left_alone(sites, Reason.INTERNAL_ERROR, reason))
    return _remember(
        torch_private.inductor_compile(graph_module, example_inputs, config), example_inputs, report, arguments
    )


def _publish(report: FoldReport) -> None:
    torch_private.count("graphs")
    torch_private.count("sites", report.total)
    torch_private.count("folded", report.folded)
    torch_private.trace_artifact("lnfold_report", lambda: json.dumps(report.to_dict(), indent=2))
    if report.sites:
        log.info("%s", report.summary())
        log.debug("fold report\n%s", report)


def _remember(
    compiled: Callable[..., Any],
    example_inputs: Sequence[Any],
    report: FoldReport,
    arguments: Mapping[str, Any],
    materializer: Materializer | None = None,
) -> Callable[..., Any]:
    """Return the function Dynamo calls, with the report tied to it and freed with it."""
    tensors: tuple[weakref.ref[Tensor], ...] = tuple(
        weakref.ref(value)
        for value in example_inputs
        # Of quantized weights `module.to()` swaps the contents, which torch refuses where there are weak references.
        if isinstance(value, torch.nn.Parameter) and not torch_private.is_tensor_subclass(value)
    )
    record = CompiledGraph(report, tensors, torch_private.code_being_compiled(), arguments, materializer)
    compiled_graphs.add(record)

    # A function of our own: Dynamo unwraps Inductor's, and would drop what is attached to it.
    if materializer is None:

        def run(*arguments: Any) -> Any:
            return compiled(*arguments)

    else:

        def run(*arguments: Any) -> Any:
            return compiled(*arguments, *materializer(arguments))

    run.record = record  # type: ignore[attr-defined]
    return run


__all__ = ["CompiledGraph", "Options", "compiled_graphs", "lnfold", "make_report"]
