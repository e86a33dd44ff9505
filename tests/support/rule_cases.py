"""The cases of every rule, in one table, and what they are called with."""

from __future__ import annotations

import torch
from rule_case import Case, D
from rule_cases_of_elements import ELEMENTS
from rule_cases_of_products import PRODUCTS
from rule_cases_of_rows import ROWS
from torch import Tensor

#: Rules whose cases need a group of processes: test_sharding.py and test_distributed.py have them.
OF_SEVERAL_PROCESSES = frozenset("from_local to_local redistribute all_reduce wait_tensor".split())

CASES: dict[str, Case] = {**ELEMENTS, **PRODUCTS, **ROWS}
# A name that two tables had would hide a case.
assert len(CASES) == len(ELEMENTS) + len(PRODUCTS) + len(ROWS)


def extra_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64) + 0.5  # noqa: E731
    return {
        "u": rand(2, 5, D), "row": rand(2, 5, 1), "mask": rand(2, 5, 1) > 0.5, "rows": torch.tensor([1, 0, 1]),
        "columns": torch.tensor([4, 2, 0]), "features": torch.tensor([1, 5, 7]), "image": rand(2, 3, 4, 4),
        "six": rand(2, 6, 5), "zeros": torch.tensor([0, 0, 0]), "seven": rand(2, 7), "square": rand(2, 5, 5),
    }  # fmt: skip
