"""The programs of a plan: each example call of a model as one graph, with what each of its inputs is in the model."""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lncompile.lowering import torch_private, torch_private_dynamo, torch_private_inductor
from lncompile.models.stand_ins import is_on_meta, stand_ins


class Call:
    """An example of how a model is called.

    Args:
        args: what it is called with.
        kwargs: likewise.

    Attributes:
        method: which method of the model is called; ``"__call__"`` for the model itself.

    Example:
        >>> prompt, step = Call(input_ids=ids), Call(input_ids=ids[:, -1:], past_key_values=cache)
        >>> Call.of("get_image_features", pixel_values).method
        'get_image_features'
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.method = "__call__"

    @classmethod
    def of(cls, method: str, *args: Any, **kwargs: Any) -> Call:
        """An example of how a method of a model is called."""
        call = cls(*args, **kwargs)
        call.method = method
        return call


@dataclass(frozen=True)
class Program:
    """One call of a model as one graph.

    Attributes:
        graph_module: the graph, parameters as placeholders.
        example_inputs: the value of each placeholder; of a parameter the model's own.
    """

    graph_module: fx.GraphModule
    example_inputs: Sequence[Any]


def capture(model: nn.Module, call: Call) -> Program:
    """Take the graph of one call of a model. Where Dynamo breaks it in two, torch.export takes it as one.

    Args:
        model: in evaluation mode; with stand-ins where it is on the meta device.
        call: the example.

    Raises:
        ValueError: where the model is not one graph for either, because what it does depends on values of tensors.
    """
    try:
        return _capture_with_dynamo(model, call)
    except torch_private_dynamo.CAPTURE_ERRORS as error:
        first = error
    try:
        return _capture_with_export(model, call)
    except Exception as error:
        raise ValueError(
            "the model cannot be captured as one program: what it does depends on the values of its tensors, or calls "
            f"code that cannot be traced.\nDynamo: {_first_line(first)}\ntorch.export: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _capture_with_dynamo(model: nn.Module, call: Call) -> Program:
    graphs: list[Program] = []

    def backend(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(Program(graph_module, list(example_inputs)))
        return _run_plain(graph_module)

    with torch_private_dynamo.many_recompiles(), torch_private_inductor.without_freezing():
        # Code that no call has seen. Of the model's own Dynamo remembers which sizes varied, and what it gave up on and
        # leaves to eager, whatever is asked for.
        function = types.FunctionType(_call.__code__.replace(), _call.__globals__)
        args, kwargs = own_arguments(call)
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(model, call.method, args, kwargs)
    if len(graphs) > 1:
        raise RuntimeError(f"Dynamo made {len(graphs)} graphs of the model")
    return graphs[0] if graphs else Program(fx.GraphModule(nn.Module(), _empty_graph()), [])


def _run_plain(graph_module: fx.GraphModule) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with torch_private.as_plain_tensors():
            return graph_module(*arguments)

    return run


def _call(self: nn.Module, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    # The model is "self" in the names that Dynamo gives to what it holds.
    return self(*args, **kwargs) if method == "__call__" else getattr(self, method)(*args, **kwargs)


def _empty_graph() -> fx.Graph:
    graph = fx.Graph()
    graph.output(())
    return graph


def _capture_with_export(model: nn.Module, call: Call) -> Program:
    if call.method != "__call__":
        raise RuntimeError("torch.export takes the model's forward alone, not another method")
    args, kwargs = own_arguments(call)
    exported = torch.export.export(model, args, kwargs, strict=False)
    graph_module = exported.graph_module
    for node in list(graph_module.graph.nodes):
        if node.target is torch_private.ATEN_ASSERT_METADATA:
            graph_module.graph.erase_node(node)
    values: list[Any] = []
    held = {**exported.constants, **dict(_named_tensors(model))}
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    for placeholder, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.target is not None and isinstance(held.get(spec.target), Tensor):
            values.append(held[spec.target])
            if spec.kind is not torch.export.graph_signature.InputKind.CONSTANT_TENSOR:
                torch_private.mark_static_input(placeholder)
            torch_private.give_name_in_model(placeholder, spec.target)
        else:
            values.append(placeholder.meta.get("val"))
    return Program(graph_module, values)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers(remove_duplicate=False)
    yield from model.named_parameters(remove_duplicate=False)


def own_arguments(call: Call, copies: bool = False) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call in containers of their own: a cache that the model appends to stays as it was given.

    Args:
        call: the call.
        copies: whether its tensors are copied as well, for a model that writes into them.
    """
    memo: dict[int, Any] = {}
    for leaf in torch_private.tree_leaves((call.args, call.kwargs)):
        if isinstance(leaf, Tensor):
            memo[id(leaf)] = leaf.detach().clone() if copies else leaf
    args, kwargs = copy.deepcopy((call.args, call.kwargs), memo)
    return args, kwargs


@contextlib.contextmanager
def ready_to_capture(model: nn.Module, calls: Sequence[Call]) -> Iterator[Sequence[Call]]:
    """Context in which a model can be called: one on the meta device has stand-ins, another one was called before.

    What a first call makes and the model keeps, such as a table, is there when later calls are captured.

    Args:
        model: gets its own tensors back at the end.
        calls: the examples.

    Yields:
        The examples, with stand-ins for their tensors on the meta device.

    Raises:
        ValueError: for a model on the meta device that decides by the values of tensors what it does.
    """
    if not is_on_meta(model):
        for call in calls:
            args, kwargs = own_arguments(call)
            getattr(model, call.method)(*args, **kwargs)
        yield calls
        return
    with stand_ins(model, [(call.args, call.kwargs) for call in calls]) as exchanged:
        yield [_like(call, args, kwargs) for call, (args, kwargs) in zip(calls, exchanged, strict=True)]


def _like(call: Call, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    return Call.of(call.method, *args, **kwargs)
