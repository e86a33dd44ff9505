"""What a captured graph is called with and returns, told apart from what the model's caller passes and gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from lncompile.lowering import torch_private
from lncompile.returned import Returned


class CallError(ValueError):
    """A call that a folded module was not made for. The message says what differs."""


class Signature:
    """Between the arguments and results of a model and the flat tensors of a graph of it.

    Args:
        args: an example of positional arguments.
        kwargs: and of keyword arguments.

    Attributes:
        examples: the tensors among the arguments, each a tensor of its own.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        leaves, self._form = torch_private.tree_flatten((tuple(args), dict(kwargs)))
        self.examples: list[Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                # Dynamo makes one input of two that are the same object, and this need not be so at the next call.
                known = any(leaf is other for other in self.examples)
                self.examples.append(leaf.clone() if known else leaf)
        # Everything else is as it was at the first call.
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        # How each placeholder of the graph is filled: with a tensor, by position, or with a size, by its symbol.
        self._sources: list[int | tuple[str, Any]] = []
        self._shapes: dict[int, tuple[Any, ...]] = {}
        self._conditions: list[Any] = []
        self._returned: Returned | None = None

    # --- the graph's side, while it is made ---

    def example_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the example, each tensor among them a tensor of its own."""
        remaining = iter(self.examples)
        leaves = [
            next(remaining) if tensor else constant
            for tensor, constant in zip(self._is_tensor, self._constants, strict=True)
        ]
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = torch_private.tree_unflatten(leaves, self._form)
        return arguments

    def start(self, returned: Returned) -> None:
        """Begin with a graph, whose placeholders are then taken one by one.

        Args:
            returned: how the model's result is made of what the graph returns.
        """
        self._returned = returned
        self._sources, self._shapes, self._conditions = [], {}, []

    def take(self, placeholder: fx.Node, value: Any) -> bool:
        """Note how a placeholder is filled at each call; False if no argument of the caller fills it."""
        example: Any = placeholder.meta.get("example_value")
        if isinstance(value, Tensor):
            index = next((i for i, tensor in enumerate(self.examples) if tensor is value), None)
            if index is None:
                return False
            sizes: tuple[Any, ...] = tuple(example.shape) if isinstance(example, Tensor) else tuple(value.shape)
            self._sources.append(index)
            self._shapes[index] = tuple(
                torch_private.symbolic_expression(size) if isinstance(size, torch.SymInt) else size for size in sizes
            )
            for size in sizes:
                if isinstance(size, torch.SymInt) and not self._conditions:
                    self._conditions = torch_private.conditions_on_sizes(size)
            return True
        self._sources.append(("size", torch_private.symbolic_expression(example)))
        return True

    def forget_examples(self) -> None:
        """Free the tensors of the example, once all placeholders are taken."""
        self.examples = []

    # --- the caller's side ---

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """What the graph is called with for these arguments of the model.

        Raises:
            CallError: if they are not like the example's.
        """
        leaves, form = torch_private.tree_flatten((tuple(args), dict(kwargs)))
        if form != self._form:
            raise CallError(f"this module was folded for arguments of the form {self._form}, not {form}")
        for tensor, constant, leaf in zip(self._is_tensor, self._constants, leaves, strict=True):
            if isinstance(leaf, Tensor) != tensor or (not tensor and leaf != constant):
                raise CallError(f"this module was folded for {'a tensor' if tensor else repr(constant)}, not {leaf!r}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        sizes = self._sizes(tensors)
        return [tensors[source] if isinstance(source, int) else int(source[1].subs(sizes)) for source in self._sources]

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[Any, int]:
        """The value of each symbol in the shapes of the example."""
        sizes: dict[Any, int] = {}
        for index, expected in self._shapes.items():
            shape = tuple(tensors[index].shape)
            fits = len(shape) == len(expected)
            for size, wanted in zip(shape, expected, strict=False):
                fits = fits and size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            if not fits:
                raise CallError(
                    f"this module was folded for a tensor of shape {list(expected)}, not {list(shape)}; sizes are "
                    "free where torch._dynamo.mark_dynamic(example, dimension) was called before folding"
                )
        for condition in self._conditions:
            if condition.subs(sizes) == sympy.false:
                raise CallError(f"this module was folded for sizes with {condition}, not {sizes}")
        return sizes

    def outputs(self, results: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns, from what the graph does, and from the arguments as the caller gave them."""
        assert self._returned is not None  # no graph without a start
        leaves = torch_private.tree_leaves((tuple(args), dict(kwargs)))
        return self._returned.result(results, [leaf for leaf in leaves if isinstance(leaf, Tensor)])
