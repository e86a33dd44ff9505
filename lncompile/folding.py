"""A folded module of its own: centered weights and RMSNorms in place, to save, export or quantize.

``torch.compile(backend="lnfold")`` leaves a model's weights as they are and keeps centered copies beside them. Where
the weights themselves are to be the centered ones, because they will be rounded, written to a file or handed to another
compiler, :func:`fold` returns a module that holds them.
"""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lncompile import safety_net
from lncompile.analysis import analyse
from lncompile.held_weights import Weight, hold_weights
from lncompile.lowering import torch_private, torch_private_dynamo, torch_private_inductor
from lncompile.options import Options, parse_options
from lncompile.passes.graph.copying import copy_graph_module
from lncompile.passes.graph.expressions import Expression
from lncompile.passes.graph.provenance import parameter_name
from lncompile.passes.graph.sharding import local_bytes
from lncompile.passes.rewrites.uses import remove_unread
from lncompile.pipeline import make_report
from lncompile.reporting.report import FoldReport
from lncompile.returned import Returned, Size
from lncompile.runtime.materialize import Stored
from lncompile.signature import Signature
from lncompile.transform import transform


class FoldedModule(nn.Module):
    """What :func:`fold` returns. It takes what the model took and returns what the model returned.

    Attributes:
        folded: the rewritten graph, with the weights under the names they had in the model. Where a failure of ours
            kept us from making one, it is a copy of the model.
        report: what folded.
    """

    def __init__(self, folded: nn.Module, signature: Signature | None, report: FoldReport) -> None:
        super().__init__()
        self.folded = folded
        self.report = report
        self._signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it like the model."""
        if self._signature is None:
            return self.folded(*args, **kwargs)
        outputs = self.folded(*self._signature.inputs(args, kwargs))
        return self._signature.outputs(outputs, args, kwargs)


@dataclass(frozen=True)
class Capture:
    """One call of a model that is one graph.

    Attributes:
        graph_module: the graph, as Dynamo hands it to a backend.
        example_inputs: the value of each of its placeholders.
        signature: what the model was called with.
        outputs: what the graph returned.
        result: what the model returned; the outputs stand in it.
    """

    graph_module: fx.GraphModule
    example_inputs: Sequence[Any]
    signature: Signature
    outputs: Sequence[Any]
    result: Any


def fold(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> FoldedModule:
    """Return a module that computes what ``model`` does, with the LayerNorms folded that ``backend="lnfold"`` folds.

    The model is called twice and captured as one graph, for inference. Its parameters are copied; the model itself
    stays as it is. A product with one weight is an ``nn.Linear`` under that weight's name, where quantization tools
    look for it. What the model writes into its buffers the folded module writes into its own. What else a call leaves
    behind in the model, such as a tensor put into an attribute, is not computed.

    Args:
        model: in evaluation mode.
        args: an example of what it is called with. Its sizes are those of every later call, except for dimensions that
            ``torch._dynamo.mark_dynamic`` was called for, and so are its numbers and flags.
        options: lnfold's, as for ``torch.compile``.
        kwargs: as ``args``.

    Returns:
        The folded module. Another call than the example's is a :class:`lncompile.CallError`.

    Raises:
        ValueError: for a model in training mode.
        RuntimeError: where Dynamo makes no graph of the model, because it is turned off.

    Example:
        >>> folded = lncompile.fold(model, input_ids)
        >>> torch.save(folded.state_dict(), "folded.pt")
    """
    model = torch_private_dynamo.original_callable(model)
    if model.training:
        raise ValueError("the model is in training mode, and folding is for inference: call model.eval() first")
    ours, _ = parse_options(None, options)
    with torch.no_grad():
        # What a first call makes and the model keeps, such as tables of a device, is there when the graph is captured.
        model(*args, **kwargs)
        return fold_capture(model, capture_call(model, Signature(args, kwargs)), ours)


def capture_call(model: nn.Module, signature: Signature) -> Capture:
    """Call a model with the example, and take its graph.

    Args:
        model: in evaluation mode; it was called before, so that it is what it is at later calls.
        signature: of the example.

    Raises:
        RuntimeError: where Dynamo makes no graph, because it is turned off. What it cannot capture it says itself.
    """
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
    returned: list[Sequence[Any]] = [()]

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((graph_module, list(example_inputs)))

        def run(*arguments: Any) -> Any:
            outputs = tuple(Size(value) if type(value) is int else value for value in graph_module(*arguments))
            returned.append(outputs)
            return outputs

        return run

    with torch_private_dynamo.many_recompiles(), torch_private_inductor.without_freezing():
        args, kwargs = signature.example_arguments()
        # Code that no call has seen. Of the model's own Dynamo remembers which sizes varied, and what it gave up on and
        # leaves to eager, whatever is asked for.
        call = types.FunctionType(_call.__code__.replace(), _call.__globals__)
        result = torch.compile(call, backend=backend, fullgraph=True, dynamic=False)(model, *args, **kwargs)
    if len(graphs) != 1:
        known = [*signature.examples, *model.parameters(), *model.buffers()]
        leaves = [leaf for leaf in torch_private.tree_leaves(result) if isinstance(leaf, Tensor)]
        if graphs or not all(any(leaf is tensor for tensor in known) for leaf in leaves):
            raise RuntimeError(
                f"Dynamo made {len(graphs)} graphs of the model, and fold() takes one; is it turned off?"
            )
        empty = fx.Graph()
        empty.output(())
        graphs.append((fx.GraphModule(nn.Module(), empty), []))
    return Capture(*graphs[0], signature, returned[-1], result)


def _call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # The model is "self" in the names that Dynamo gives to what it holds.
    return self(*args, **kwargs)


def fold_capture(model: nn.Module, capture: Capture, options: Options) -> FoldedModule:
    """Do what :func:`fold` does with a graph that is captured already.

    Args:
        model: what was captured, in evaluation mode.
        capture: the graph, of a call under ``torch.no_grad()``.
        options: our options.

    Returns:
        The folded module. Where our own code fails it is the model as it is, with nothing folded; see ``safety_net``.
    """
    try:
        return _module(model, capture, _rewrite(capture, options))
    except Exception as error:
        if not safety_net.enabled:
            raise
        reason = safety_net.log_failure("lncompile.fold failed and folds nothing", error)
    report = safety_net.report_untouched(capture.graph_module, reason)
    try:
        return _module(model, capture, _Rewritten(copy_graph_module(capture.graph_module), (), report))
    except Exception as error:
        safety_net.log_failure("lncompile.fold failed again, with nothing folded, and copies the model", error)
    return FoldedModule(copy.deepcopy(model), None, report).eval()


@dataclass(frozen=True)
class _Rewritten:
    """A graph to make a module of.

    Attributes:
        graph_module: the graph. It is changed.
        centered: what its placeholders behind those of the captured graph hold, each with the expression that makes it.
        report: what folded.
    """

    graph_module: fx.GraphModule
    centered: Sequence[tuple[Expression, Tensor]]
    report: FoldReport


def _rewrite(capture: Capture, options: Options) -> _Rewritten:
    graph_module, inputs = capture.graph_module, capture.example_inputs
    analysis = analyse(graph_module, inputs, options)
    transformed = transform(analysis, options)
    values: dict[tuple[Any, ...], Tensor] = {}
    for expression in transformed.expressions:
        if (expression.code, expression.leaves) not in values:
            value = expression.evaluate([inputs[leaf] for leaf in expression.leaves])
            values[expression.code, expression.leaves] = nn.Parameter(value, requires_grad=False)
    centered = [(expression, values[expression.code, expression.leaves]) for expression in transformed.expressions]
    stored = [Stored("copy", local_bytes(value)) for _, value in centered]
    report = make_report(graph_module, analysis, transformed, stored, 0.0)
    return _Rewritten(transformed.graph_module, centered, report)


def _module(model: nn.Module, capture: Capture, rewritten: _Rewritten) -> FoldedModule:
    """Make a module of a graph: weights are its attributes, and the rest of its inputs come from the caller."""
    graph = rewritten.graph_module.graph
    signature = copy.copy(capture.signature)
    returned = Returned(capture.result, capture.outputs, signature.examples)
    signature.start(returned)
    names = {id(t): name for name, t in (*model.named_buffers(), *model.named_parameters()) if t is not None}
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    originals = placeholders[: len(capture.example_inputs)]
    weights: dict[int, Weight] = {}
    original_names = []
    for placeholder, value in zip(originals, capture.example_inputs, strict=True):
        name = names.get(id(value)) or parameter_name(placeholder)
        original_names.append(name)
        if not signature.take(placeholder, value):
            _hold_once(weights, Weight(placeholder, value, name))
    for placeholder, (expression, value) in zip(placeholders[len(originals) :], rewritten.centered, strict=True):
        # Of several parameters, the one that was centered is the one of that shape.
        shapes = [capture.example_inputs[leaf].shape for leaf in expression.leaves]
        leaf = expression.leaves[shapes.index(value.shape) if value.shape in shapes else 0]
        _hold_once(weights, Weight(placeholder, value, original_names[leaf], "_centered"))
    _return_what_is_asked_for(graph, returned, weights, names)
    remove_unread(graph)
    attributes = {
        str(node.target): _own(operator.attrgetter(str(node.target))(rewritten.graph_module))
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    folded = fx.GraphModule(hold_weights(graph, list(weights.values()), attributes), graph, "Folded")
    folded.graph.lint()
    signature.forget_examples()
    return FoldedModule(folded, signature, rewritten.report).eval()


def _hold_once(weights: dict[int, Weight], weight: Weight) -> None:
    """Hold a weight, or let the placeholder that holds the same tensor take the place of its own."""
    known = weights.setdefault(id(weight.value), weight)
    if known is not weight:
        weight.placeholder.replace_all_uses_with(known.placeholder)
        weight.placeholder.graph.erase_node(weight.placeholder)


def _return_what_is_asked_for(
    graph: fx.Graph, returned: Returned, weights: dict[int, Weight], names: Mapping[int, str]
) -> None:
    """Let a graph return what stands in the model's result, and nothing that the model keeps for itself."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    (present,) = output.args
    for number, constant in enumerate(returned.constants):
        if id(constant) not in weights:
            with graph.inserting_before(next(iter(graph.nodes))):
                placeholder = graph.placeholder(f"returned_{number}")
            name = names.get(id(constant), placeholder.name)
            weights[id(constant)] = Weight(placeholder, constant, name)
    constants = [weights[id(constant)].placeholder for constant in returned.constants]
    output.args = ((*(present[index] for index in returned.outputs), *constants),)


def _own(attribute: Any) -> Any:
    """What a graph has as an attribute, with tensors of its own. The graphs inside of operators have none."""
    if isinstance(attribute, fx.GraphModule):
        return attribute
    return attribute.detach().clone() if isinstance(attribute, Tensor) else copy.deepcopy(attribute)
