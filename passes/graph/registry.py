"""The registry of spellings: which function, method or overload means which operation, and what its arguments are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spelling:
    """How one spelling of an operation is read: the operation's name and parameters, and whether it writes."""

    name: str
    signature: inspect.Signature
    in_place: bool


#: Functions and operator overloads, by object.
FUNCTIONS: dict[Any, Spelling] = {}
#: Tensor methods, by name.
METHODS: dict[str, Spelling] = {}
#: Keyword names that differ between a method, a torch function and an ATen overload of one operation.
KEYWORD_ALIASES = {
    "self": "input",
    "size": "shape",
    "dims": "dim",
    "axis": "dim",
    "axis0": "dim0",
    "axis1": "dim1",
    "x": "input",
    "keepdims": "keepdim",
    "p": "probability",
    "train": "training",
    "sizes": "shape",
    "repeats": "repeats",
    "input1": "input",
    "cudnn_enabled": "cudnn_enable",
    "vec": "other",
    "mat2": "other",
    "src": "source",
    "value": "source",
    "upscale_factor": "factor",
    "downscale_factor": "factor",
    "dimension": "dim",
    "N": "batch",
    "C": "channels",
    "HxW": "spatial",
    "group": "num_groups",
}


def spelled(*targets: Any, methods: str = "", in_place: tuple[Any, ...] = ()) -> Callable[[Callable[..., None]], None]:
    """Register the spellings of the operation that the decorated stub declares.

    Args:
        targets: functions and operator overloads. Entries that are None (absent from this torch) are left out.
        methods: names of tensor methods, separated by blanks; a trailing underscore marks an in-place one.
        in_place: functions that write into their first argument.
    """

    def register(stub: Callable[..., None]) -> None:
        signature = inspect.signature(stub)
        name = stub.__name__.rstrip("_")
        for target in targets:
            if target is not None:
                FUNCTIONS[target] = Spelling(name, signature, False)
        for target in in_place:
            if target is not None:
                FUNCTIONS[target] = Spelling(name, signature, True)
        for method in methods.split():
            in_place_method = method == "__setitem__" or (method.endswith("_") and not method.endswith("__"))
            METHODS[method] = Spelling(name, signature, in_place_method)

    return register
