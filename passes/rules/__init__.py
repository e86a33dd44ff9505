"""The rule table: importing this package fills it. One function an operation, its identity in the docstring."""

from lncompile.passes.rules import (
    blockers,
    contractions,
    indexing,
    pointwise,
    products,
    rearrangements,
    resampling,
    rows,
    shapes,
    sharding,
    sinks,
)
from lncompile.passes.rules.base import INVARIANCES, RULES, ZERO_MEANS, AxisMap, Linear

__all__ = [
    "INVARIANCES",
    "RULES",
    "ZERO_MEANS",
    "AxisMap",
    "Linear",
    "blockers",
    "contractions",
    "indexing",
    "pointwise",
    "products",
    "rearrangements",
    "resampling",
    "rows",
    "shapes",
    "sharding",
    "sinks",
]
