"""The one driver of the passes: a graph and its inputs in; what Inductor gets, and the report, out.

The passes themselves, and their order, stand in :mod:`lncompile.passes.pipeline.order`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor, fx

from lncompile.analysis import analyse
from lncompile.graph_observers import observers
from lncompile.lowering import torch_private
from lncompile.options import Options
from lncompile.passes.decisions import GraphBreak, PassTime, RuntimeCentering, Verdict, WeightRewrite
from lncompile.passes.graph.canonical import tensor_of
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.graph.frozen_weights import lift_weights
from lncompile.passes.graph.graph_breaks import graph_break_of
from lncompile.passes.graph.provenance import parameter_name, parameter_names
from lncompile.passes.graph.sharding import local_bytes
from lncompile.passes.norms.rms_norms import count_rms_norms
from lncompile.passes.pipeline.analysis import Analysis
from lncompile.passes.pipeline.runner import Runner
from lncompile.passes.rewrites.uses import Use, uses_of
from lncompile.passes.verdicts.judge import describe_centerings
from lncompile.reporting.report import FoldReport
from lncompile.runtime.materialize import Materializer, Stored
from lncompile.runtime.parameter_identity import ParameterReference, parameters_of
from lncompile.transform import Transformed, transform


@dataclass(frozen=True)
class Prepared:
    """A graph that is ready for Inductor.

    Attributes:
        graph_module: the rewritten graph; None where the graph goes to Inductor as it came.
        materializer: supplies the values of its extra inputs; None where it has none.
        values: an example of them, none of which is one of the graph's other inputs.
        report: what was decided.
        parameters: those among its inputs, by position.
    """

    graph_module: fx.GraphModule | None
    materializer: Materializer | None
    values: tuple[Tensor, ...]
    report: FoldReport
    parameters: Mapping[int, ParameterReference]


@dataclass(frozen=True)
class Outcome:
    """What the passes made of a graph: the same for the backend, for ``explain`` and for ``fold``.

    Attributes:
        captured: the graph as Dynamo handed it out.
        analysis: what was decided.
        transformed: the rewritten graph; None where the graph stays as it came.
        times: how long each pass took.
    """

    captured: fx.GraphModule
    analysis: Analysis
    transformed: Transformed | None
    times: tuple[PassTime, ...]

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """The parameter expressions that are extra inputs of the rewritten graph."""
        return self.transformed.expressions if self.transformed else ()


def run(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
) -> Outcome:
    """Run the passes on a graph. No weight is looked at, and none is written to.

    Args:
        graph_module: the graph Dynamo captured; it is not changed.
        example_inputs: the value of each placeholder.
        options: our options.
        inductor: what differs from Inductor's own configuration.
    """
    runner = Runner(options.switched_off, observers())
    analysis = analyse(graph_module, example_inputs, options, inductor, runner)
    untouched = analysis.placement is None and (options.nonfoldable == "inductor" or not analysis.sites)
    transformed = None if untouched else transform(analysis, options, runner)
    return Outcome(graph_module, analysis, transformed, tuple(runner.times.values()))


def prepare(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
) -> Prepared:
    """Decide, rewrite, and center the weights.

    Args:
        graph_module: the graph Dynamo captured; it is not changed.
        example_inputs: the value of each placeholder.
        options: our options.
        inductor: what differs from Inductor's own configuration.
    """
    started = time.perf_counter()
    outcome = run(graph_module, example_inputs, options, inductor)
    materializer = _materializer(outcome, options)
    values, stored = materializer.begin(example_inputs)
    report = make_report(outcome, stored, time.perf_counter() - started)
    return Prepared(
        None if outcome.transformed is None else outcome.transformed.graph_module,
        materializer,
        # A parameter that is its own centered weight would be one input twice, and be compiled as if it always were.
        tuple(_apart(value) if any(value is other for other in example_inputs) else value for value in values),
        report,
        parameters_of(graph_module.graph, example_inputs),
    )


def _apart(parameter: Tensor) -> Tensor:
    """A plain tensor with the values of a parameter, on its storage."""
    with torch_private.as_plain_tensors():
        return parameter.detach()


def prepare_frozen(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
) -> Prepared:
    """Do what :func:`prepare` does where Inductor makes constants of weights, and of the centered ones as well.

    They are copies, and no later look says whether a weight has changed: as with stock Inductor, a model that was
    frozen keeps the values it had, and Dynamo compiles anew where a weight is another object.
    """
    lifted = lift_weights(graph_module)
    if not lifted.tensors:
        return prepare(graph_module, example_inputs, options, inductor)
    options = dataclasses.replace(options, check="off")
    weights = tuple(lifted.tensors.values())
    prepared = prepare(lifted.graph_module, [*example_inputs, *weights], options, inductor)
    if prepared.graph_module is not None:
        lifted.put_back(prepared.graph_module, prepared.values)
    return dataclasses.replace(prepared, materializer=None, values=())


def plan(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: Mapping[str, Any] = MappingProxyType({}),
) -> FoldReport:
    """Say what :func:`prepare` would do, without a look at weights that would not be asked for."""
    started = time.perf_counter()
    outcome = run(graph_module, example_inputs, options, inductor)
    stored = _materializer(outcome, options).plan(example_inputs)
    if outcome.transformed is not None:
        placeholders = [node for node in outcome.transformed.graph_module.graph.nodes if node.op == "placeholder"]
        stored = tuple(
            _with_bytes_of_copy(kept, node)
            for kept, node in zip(stored, placeholders[len(placeholders) - len(stored) :], strict=True)
        )
    return make_report(outcome, stored, time.perf_counter() - started)


def _with_bytes_of_copy(stored: Stored, placeholder: fx.Node) -> Stored:
    value = tensor_of(placeholder)
    assert value is not None  # what was emitted carries its value
    return dataclasses.replace(stored, bytes=local_bytes(value)) if stored.storage == "copy" else stored


def uses_in(graph_module: fx.GraphModule, transformed: Transformed | None) -> dict[int, Use]:
    """Return how a graph reads its inputs: as it came, or as it was rewritten."""
    count = sum(node.op == "placeholder" for node in graph_module.graph.nodes)
    if transformed is None:
        return uses_of(graph_module.graph, (), count)
    return uses_of(transformed.graph_module.graph, transformed.expressions, count, transformed.in_graph)


def _materializer(outcome: Outcome, options: Options) -> Materializer:
    """What supplies the extra inputs of a rewritten graph; it has supplied none yet."""
    expressions, graph_module = outcome.expressions, outcome.captured
    names = [parameter_name(node) for node in graph_module.graph.nodes if node.op == "placeholder"]
    return Materializer(expressions, names, options.check)


def make_report(outcome: Outcome, stored: Sequence[Stored], seconds: float) -> FoldReport:
    """Put the decisions for one graph, and how the weights centered for it are kept, into a report.

    Args:
        outcome: what the passes made of the graph.
        stored: how the value of each of its expressions is kept.
        seconds: what all of it took.
    """
    graph_module, analysis = outcome.captured, outcome.analysis
    weights = _centered_outside(graph_module, outcome.expressions, stored)
    weights += _centered_in_the_graph(outcome.transformed)
    budgeted = analysis.budgeted
    centerings: tuple[RuntimeCentering, ...] = ()
    if analysis.placement:
        without_budget = budgeted.unlimited if budgeted else None
        centerings = describe_centerings(analysis.placement, analysis.variables, analysis.costs, without_budget)
    graph_break = graph_break_of(graph_module)
    return FoldReport(
        _returned_at(analysis.verdicts, graph_break),
        tuple(weights),
        centerings,
        1,
        seconds,
        budgeted.budget if budgeted else None,
        analysis.streams,
        analysis.differences,
        () if graph_break is None else (graph_break,),
        rms_norms=0 if analysis.verdicts else count_rms_norms(graph_module.graph),
        folded_without_gradients=analysis.folded_without_gradients,
        passes=outcome.times,
    )


def _returned_at(verdicts: Sequence[Verdict], graph_break: GraphBreak | None) -> tuple[Verdict, ...]:
    """Verdicts that say of returned tensors at which graph break, where the graph does not end with the model."""
    if graph_break is None:
        return tuple(verdicts)
    return tuple(
        dataclasses.replace(
            site,
            returned=tuple(dataclasses.replace(found, graph_break=graph_break.location) for found in site.returned),
        )
        for site in verdicts
    )


def _centered_outside(
    graph_module: fx.GraphModule, expressions: Sequence[Expression], stored: Sequence[Stored]
) -> list[WeightRewrite]:
    """The weights that are centered once: one for each expression and parameters, however many placeholders take it."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    weights: dict[tuple[Any, ...], WeightRewrite] = {}
    for expression, kept in zip(expressions, stored, strict=True):
        name = " · ".join(parameter_name(placeholders[leaf]) for leaf in expression.leaves)
        variant = hashlib.sha256(expression.code.encode()).hexdigest()[:8]
        weights[expression.code, expression.leaves] = WeightRewrite(name, kept.bytes, kept.storage, variant)
    return list(weights.values())


def _centered_in_the_graph(transformed: Transformed | None) -> list[WeightRewrite]:
    """The weights that a transformed graph centers at every call."""
    weights = []
    for node in transformed.in_graph if transformed else ():
        tensor = tensor_of(node)
        assert tensor is not None  # what was emitted carries its value
        weights.append(WeightRewrite(" · ".join(parameter_names(node)), tensor.nbytes, "graph"))
    return weights
