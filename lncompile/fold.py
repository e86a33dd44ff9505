"""A folded module of its own: centered weights and RMSNorms in place, to save, export or quantize.

``torch.compile(backend="lnfold")`` leaves a model's weights as they are and keeps centered copies beside them. Where
the weights themselves are to be the centered ones, because they will be rounded, written to a file or handed to another
compiler, :func:`fold` returns a module that holds them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lncompile.analysis import analyse
from lncompile.lowering import torch_private
from lncompile.options import parse_options
from lncompile.passes.canonical import canonicalise, tensor_of
from lncompile.passes.materialize import Stored, give_back
from lncompile.passes.provenance import parameter_name
from lncompile.passes.sharding import local_bytes
from lncompile.pipeline import make_report, uses_in
from lncompile.report import FoldReport
from lncompile.signature import Signature
from lncompile.transform import transform


class FoldedModule(nn.Module):
    """What :func:`fold` returns. It takes what the model took and returns what the model returned.

    Attributes:
        folded: the rewritten graph, with the weights under the names they had in the model.
        report: what folded.
    """

    def __init__(self, graph: fx.GraphModule, signature: Signature, report: FoldReport) -> None:
        super().__init__()
        self.folded = graph
        self.report = report
        self._signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it like the model."""
        return self._signature.outputs(self.folded(*self._signature.inputs(args, kwargs)))


def fold(model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> FoldedModule:
    """Return a module that computes what ``model`` does, with the LayerNorms folded that ``backend="lnfold"`` folds.

    The model is captured as one graph, for inference. Its parameters are copied; the model itself stays as it is. A
    product with one weight is an ``nn.Linear`` under that weight's name, where quantization tools look for it.

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

    Example:
        >>> folded = lncompile.fold(model, input_ids)
        >>> torch.save(folded.state_dict(), "folded.pt")
    """
    model = torch_private.original_callable(model)
    if model.training:
        raise ValueError("the model is in training mode, and folding is for inference: call model.eval() first")
    ours, _ = parse_options(None, options)
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def capture(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append((graph_module, list(example_inputs)))
        return graph_module.forward

    with torch.no_grad(), torch_private.many_recompiles(), torch_private.without_freezing():
        signature = Signature(args, kwargs, model(*args, **kwargs))

        def call(*tensors: Tensor) -> list[Tensor]:
            arguments, keywords = signature.arguments(tensors)
            return signature.tensors_of(model(*arguments, **keywords))

        torch.compile(call, backend=capture, fullgraph=True)(*signature.examples)
        ((graph_module, example_inputs),) = captured
        analysis = analyse(graph_module, example_inputs, ours)
        transformed = transform(analysis, ours)
        give_back((example_inputs[position], axes) for position, axes in uses_in(graph_module, transformed).items())
        values = [e.evaluate([example_inputs[leaf] for leaf in e.leaves]) for e in transformed.expressions]
        stored = [Stored("copy", local_bytes(value)) for value in values]
        report = make_report(graph_module, analysis, transformed, stored, 0.0)

    graph = transformed.graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    attributes = {
        str(node.target): operator.attrgetter(str(node.target))(transformed.graph_module)
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
    }
    weights = _Weights(model, graph, attributes)
    for placeholder, value in zip(placeholders, example_inputs, strict=False):
        if not signature.take(placeholder, value):
            weights.hold(placeholder, value, weights.name(placeholder, value))
    originals = placeholders[: len(example_inputs)]
    for expression, placeholder, value in zip(
        transformed.expressions, placeholders[len(example_inputs) :], values, strict=True
    ):
        first = expression.leaves[0]
        name = weights.name(originals[first], example_inputs[first])
        weights.hold(placeholder, nn.Parameter(value, requires_grad=False), name)
    weights.make_linear_layers()
    signature.forget_examples()
    folded = fx.GraphModule(attributes, graph, "Folded")
    folded.graph.lint()
    return FoldedModule(folded, signature, report).eval()


class _Weights:
    """Puts the tensors of a graph's placeholders into the module that the graph is to become."""

    def __init__(self, model: nn.Module, graph: fx.Graph, attributes: dict[str, Any]) -> None:
        self._graph = graph
        self._attributes = attributes
        self._first = next(node for node in graph.nodes if node.op != "placeholder")
        self._names = {
            id(tensor): name
            for name, tensor in (*model.named_buffers(), *model.named_parameters())
            if tensor is not None
        }

    def name(self, placeholder: fx.Node, value: Tensor) -> str:
        """Name of a tensor in the model."""
        return self._names.get(id(value)) or parameter_name(placeholder).replace(" ", "_")

    def hold(self, placeholder: fx.Node, value: Any, name: str) -> None:
        """Make a placeholder an attribute, if anything reads it; where the name is taken, ``..._centered``."""
        if placeholder.users:
            while name in self._attributes:
                name += "_centered"
            with torch_private.as_plain_tensors():
                copy = value.detach().clone()
            is_parameter = isinstance(value, nn.Parameter)
            self._attributes[name] = nn.Parameter(copy, requires_grad=False) if is_parameter else copy
            with self._graph.inserting_before(self._first):
                attribute = self._graph.create_node("get_attr", name)
            attribute.meta = {"example_value": placeholder.meta.get("example_value")}
            placeholder.replace_all_uses_with(attribute)
        self._graph.erase_node(placeholder)

    def make_linear_layers(self) -> None:
        """Turn each product with a weight that nothing else reads into a layer."""
        for node in list(self._graph.nodes):
            operation = canonicalise(node)
            if operation is None or operation.name != "linear":
                continue
            weight, bias = operation["weight"], operation["bias"]
            name = self._own(weight, 2)
            if name is None or (bias is not None and self._own(bias, 1) is None):
                continue
            path = name.removesuffix("_centered").removesuffix(".weight")
            while path in self._attributes or path == name:
                path += "_linear"
            with torch.device("meta"):
                layer = nn.Linear(1, 1, bias is not None)
            layer.weight = self._attributes.pop(name)
            layer.out_features, layer.in_features = layer.weight.shape
            if bias is not None:
                layer.bias = self._attributes.pop(str(bias.target))
            self._attributes[path] = layer.eval()
            with self._graph.inserting_before(node):
                call = self._graph.create_node("call_module", path, (operation["input"],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            for unused in (node, weight, *(() if bias is None else (bias,))):
                self._graph.erase_node(unused)

    def _own(self, node: Any, rank: int) -> str | None:
        """Name of the parameter that a node is, if it has one user and this many dimensions."""
        if not isinstance(node, fx.Node) or node.op != "get_attr" or len(node.users) != 1:
            return None
        value = self._attributes.get(str(node.target))
        tensor = tensor_of(node)
        plain = isinstance(value, nn.Parameter) and not torch_private.is_opaque_tensor(value)
        return str(node.target) if plain and tensor is not None and tensor.dim() == rank else None
