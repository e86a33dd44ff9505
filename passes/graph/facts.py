"""What must be known of a graph before anything is decided: whose values are parameters, and which of them are trained.

Everything here errs on the side of "not a parameter": a site then stays a LayerNorm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private, torch_private_dynamo
from lncompile.passes.graph import sharding
from lncompile.passes.graph.canonical import canonicalise, tensor_of
from lncompile.passes.graph.effects import Writes, examples_of, written_arguments
from lncompile.passes.graph.operands import CONSTANTS_STAY, KEPT, WRITTEN
from lncompile.passes.graph.parameter_expressions import AutocastEffect, autocast_effect, find_autocast, is_settled
from lncompile.passes.graph.provenance import parameter_name


class GraphFacts:
    """Facts about one graph, computed once.

    Args:
        graph: any graph of Dynamo's.
        example_inputs: the value of each placeholder.
        writes: what the graph writes to.
        training: whether the graph computes gradients.

    Attributes:
        examples: the real tensor of each placeholder.
        parametric: nodes whose value is a function of parameters and buffers only.
        trained: those of them whose gradient is wanted; empty where the graph computes no gradients.
        unsupported: parameters that cannot be rewritten, with why.
        switches_gradients: whether gradients are wanted, and turned on or off inside of the graph.
        constants_stay: whether what is the same for all features has to stay in the graph (``meta[CONSTANTS_STAY]``).
        written: as of :class:`Writes`, like ``assigned``, ``writers`` and ``storages``.
    """

    def __init__(self, graph: fx.Graph, example_inputs: Sequence[Any], writes: Writes, training: bool = False) -> None:
        self._training = training
        self._writes = writes
        self.switches_gradients = training and any(
            node.op == "call_function" and node.target is torch_private.SET_GRAD_ENABLED for node in graph.nodes
        )
        self.constants_stay = any(node.meta.get(CONSTANTS_STAY) for node in graph.nodes if node.op == "output")
        self.examples = examples_of(graph, example_inputs)
        self.unsupported: dict[fx.Node, str] = {}
        self.parametric: set[fx.Node] = set()
        self.trained: set[fx.Node] = set()
        self.written, self.assigned, self.writers = writes.written, writes.assigned, writes.writers
        self.storages = writes.storages
        self._find_parameters(graph)

    def is_written_after(self, node: fx.Node, moment: fx.Node) -> bool:
        """Whether the storage of a node is written to behind another node of the graph."""
        return self._writes.is_written_after(node, moment)

    def _find_parameters(self, graph: fx.Graph) -> None:
        # Known are also masks and numbers, which cannot be centered themselves: buffers of integers, constants.
        # What was enlarged is better centered before that than kept in a copy.
        known: set[fx.Node] = set()
        from_parameters: set[fx.Node] = set()
        enlarged: set[fx.Node] = set()
        autocast = find_autocast(graph, list(self.examples.values()))
        for node in graph.nodes:
            if node.op == "placeholder":
                example = self.examples[node]
                is_parameter = isinstance(example, torch.nn.Parameter) or torch_private.is_static_input(node)
                if not (isinstance(example, Tensor) and is_parameter):
                    continue
                if self._training and example.requires_grad:
                    self.trained.add(node)
                problem = self._problem_with(node, example)
                if problem:
                    self.unsupported[node] = problem
                else:
                    self.parametric.add(node)
                if not problem or self._is_mask(node, example):
                    known.add(node)
                    from_parameters.add(node)
            elif node.op in ("call_function", "call_method") and not node.meta.get(WRITTEN):
                kind = autocast_effect(node)
                if kind is None or not all(source in known for source in node.all_input_nodes):
                    continue
                operands = [tensor for source in node.all_input_nodes if (tensor := tensor_of(source)) is not None]
                if written_arguments(node) or not is_settled(kind, operands, node in autocast):
                    continue
                known.add(node)
                if any(source in self.trained for source in node.all_input_nodes):
                    self.trained.add(node)
                if not any(source in from_parameters for source in node.all_input_nodes):
                    continue
                from_parameters.add(node)
                tensor = tensor_of(node)
                if kind is AutocastEffect.ENLARGING or self._is_enlarged(node, enlarged):
                    enlarged.add(node)
                elif tensor is None or tensor.is_floating_point():
                    self.parametric.add(node)  # a tuple of pieces is as good as its pieces

    @staticmethod
    def _is_enlarged(node: fx.Node, enlarged: set[fx.Node]) -> bool:
        """Whether an expression's value is larger than all it reads, by way of an expanded parameter."""
        tensor = tensor_of(node)
        if tensor is None or enlarged.isdisjoint(node.all_input_nodes):
            return False
        others = [operand for n in node.all_input_nodes if n not in enlarged and (operand := tensor_of(n)) is not None]
        return tensor.numel() > max((operand.numel() for operand in others), default=0)

    def _is_mask(self, node: fx.Node, example: Tensor) -> bool:
        """Whether a buffer of integers or booleans may be read by a parameter expression."""
        plain = example.layout is torch.strided and example.device.type != "meta" and not example.is_inference()
        whole = not example.is_floating_point() and not torch_private.is_opaque_tensor(example)
        return plain and whole and node not in self.written

    def _problem_with(self, node: fx.Node, example: Tensor) -> str | None:
        name = parameter_name(node)
        if node.meta.get(KEPT):
            return f"parameter '{name}' {node.meta[KEPT]}"
        if node in self.written:
            return f"parameter '{name}' is written to in the graph: {self.written[node]}"
        if torch_private.is_gathered_for_the_call(node):
            return f"parameter '{name}' is gathered anew for each call (FSDP): a centered copy would be outdated unseen"
        if sharding.is_sharded(example):
            problem = sharding.problem_with(example)
            if problem is not None:
                return f"parameter '{name}' {problem}"
            if node in self.trained:
                return f"parameter '{name}' is sharded and trained: it would have to be centered at every step"
        elif torch_private.is_opaque_tensor(example):
            return f"parameter '{name}' is a {type(example).__name__}, whose values cannot be centered"
        if not example.is_floating_point():
            return f"parameter '{name}' has dtype {example.dtype}, whose values cannot be centered"
        if example.is_inference():
            return (
                f"parameter '{name}' was made under torch.inference_mode(), where changes of its value cannot be seen; "
                "make or load the model outside of it"
            )
        if node in self.trained and any(_has_sparse_gradient(user) for user in node.users):
            return f"parameter '{name}' gets a sparse gradient, which that of a centered copy would not be"
        if example.layout is not torch.strided or example.device.type == "meta":
            return f"parameter '{name}' has no plain dense values ({example.layout}, {example.device})"
        return None


def _has_sparse_gradient(node: fx.Node) -> bool:
    """Whether a look-up gives its table a gradient of the rows it read alone (``sparse=True``)."""
    operation = canonicalise(node)
    if operation is None or operation.name not in ("embedding", "embedding_bag"):
        return False
    return operation["sparse"] is not False


def trained_parameter(graph: fx.Graph, example_inputs: Sequence[Any]) -> str | None:
    """Name of a parameter whose gradient is wanted by a graph that computes gradients, or None.

    Args:
        graph: a graph that is being compiled under the grad mode of its calls (Dynamo guards it).
        example_inputs: the value of each placeholder.
    """
    if not torch.is_grad_enabled():
        return None
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node, example in zip(placeholders, example_inputs, strict=True):
        if isinstance(example, Tensor) and example.requires_grad and (
            isinstance(example, torch.nn.Parameter) or torch_private.is_static_input(node)
        ):  # fmt: skip
            return parameter_name(node)
    return None


def turns_gradients_on(graph: fx.Graph) -> bool:
    """Whether a graph that is called without gradients turns them on inside (``with torch.enable_grad()``).

    What is put at its beginning, where parameters and inputs are, would be computed without.
    """
    return not torch.is_grad_enabled() and any(
        node.op == "call_function" and node.target is torch_private.SET_GRAD_ENABLED and node.args == (True,)
        for node in graph.nodes
    )


def is_in_evaluation(graph: fx.Graph) -> bool:
    """Whether Dynamo is compiling this graph for modules that are all in evaluation mode (``model.eval()``).

    They are those that the graph's parameters are reached through: ``self``, or what a function calls ``model``.
    False where none is known.
    """
    scope = torch_private_dynamo.scope_being_compiled()
    modules = []
    for placeholder in (node for node in graph.nodes if node.op == "placeholder"):
        root = re.match(r"([LG])\[(['\"])(\w+)\2\]", torch_private.source_name(placeholder) or "")
        value = scope.get(root.group(1), {}).get(root.group(3)) if root is not None else None
        if isinstance(value, torch.nn.Module):
            modules.append(value)
    frame = torch_private_dynamo.frame_being_compiled()
    if frame is not None and isinstance(frame.receiver, torch.nn.Module):
        modules.append(frame.receiver)
    return bool(modules) and not any(module.training for module in modules)
