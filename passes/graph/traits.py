"""What is true of operations, whatever they are applied to: one table, beside the spellings, that every pass asks.

A trait says what an operation does with the values of its input. Most operations have one; what has none computes
something, and is known by its rules alone.
"""

from __future__ import annotations

import enum

from torch import fx

from lncompile.passes.graph.canonical import Operation, function_name


class Trait(enum.Flag):
    """Traits can be joined: ``Trait.CASTS | Trait.RESHAPES`` is one or the other."""

    #: The result is the input itself.
    PASSES = enum.auto()
    #: The input itself in evaluation; in training single elements of it are zeroed.
    DROPS = enum.auto()
    #: The same elements under the same dimensions, perhaps in another dtype, in new memory, or cut off from gradients.
    CASTS = enum.auto()
    #: The same elements in the same order, under other dimensions.
    RESHAPES = enum.auto()
    #: The same elements, their dimensions in another order.
    PERMUTES = enum.auto()
    #: Along dimensions of a single element that element, as often as a larger shape asks for.
    EXPANDS = enum.auto()
    #: The whole tensor, several times beside itself.
    TILES = enum.auto()
    #: The elements at some indices of some dimensions.
    CUTS = enum.auto()
    #: Several cuts along one dimension at once, as a tuple.
    SPLITS = enum.auto()
    #: The same elements at other indices of some dimensions.
    ROTATES = enum.auto()
    #: Whole slices of one dimension, those that an index tensor names.
    SELECTS = enum.auto()
    #: Single elements or rows, those that an index tensor names.
    LOOKS_UP = enum.auto()
    #: Every element, several times in a row or in several windows.
    DUPLICATES = enum.auto()
    #: The elements of several tensors beside each other.
    JOINS = enum.auto()
    #: At each place the element of one operand or of another, as a mask says.
    CHOOSES = enum.auto()
    #: Sums of two operands, either of which may be negated or scaled by a number.
    ADDS = enum.auto()
    #: Products and quotients of two operands.
    SCALES = enum.auto()
    #: Every element negated.
    NEGATES = enum.auto()
    #: The shape or dtype of the second operand is asked for, and no value of it.
    RESEMBLES = enum.auto()


#: What hands on the values of its input and may change their shape and dtype, and nothing else.
VIEWS = Trait.CASTS | Trait.RESHAPES | Trait.PERMUTES | Trait.EXPANDS | Trait.TILES

_OPERATIONS = {
    Trait.PASSES: "identity",
    Trait.DROPS: "dropout",
    Trait.CASTS: "cast to type_as",
    Trait.RESHAPES: "view reshape view_as flatten unflatten squeeze unsqueeze",
    Trait.PERMUTES: "permute transpose t mT movedim",
    Trait.EXPANDS: "expand expand_as",
    Trait.TILES: "repeat",
    Trait.CUTS: "getitem narrow slice select",
    Trait.SPLITS: "split chunk unbind",
    Trait.ROTATES: "roll flip",
    Trait.SELECTS: "index_select",
    Trait.LOOKS_UP: "embedding gather take_along_dim index",
    Trait.DUPLICATES: "repeat_interleave unfold",
    Trait.JOINS: "cat stack",
    Trait.CHOOSES: "where masked_fill",
    Trait.ADDS: "add sub rsub",
    Trait.SCALES: "mul div",
    Trait.NEGATES: "neg",
    Trait.RESEMBLES: "expand_as view_as type_as",
}

#: The traits of each operation, by its canonical name.
TRAITS: dict[str, Trait] = {}
for _trait, _names in _OPERATIONS.items():
    for _name in _names.split():
        TRAITS[_name] = TRAITS.get(_name, Trait(0)) | _trait

#: Functions of each element alone that are not linear, by the names of torch's functions and methods: no rule reads
#: them, so they have no canonical form.
_POINTWISE = frozenset(
    "gelu relu relu6 silu mish tanh sigmoid elu selu celu softplus leaky_relu hardswish hardtanh hardsigmoid "
    "logsigmoid threshold prelu pow square sqrt rsqrt exp log erf abs clamp sin cos reciprocal".split()
)


def has(operation: Operation | None, traits: Trait) -> bool:
    """Whether an operation has one of some traits; an unknown operation has none.

    Example:
        >>> has(canonicalise(node), Trait.RESHAPES | Trait.PERMUTES)      # of x.transpose(1, 2)
        True
    """
    return operation is not None and bool(TRAITS.get(operation.name, Trait(0)) & traits)


def is_pointwise(node: fx.Node) -> bool:
    """Whether a node computes a function of each element alone that is not linear: an activation, a root, a square."""
    return function_name(node).rstrip("_") in _POINTWISE
