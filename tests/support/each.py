"""Many small cases of one test, checked in a loop: whatever fails is reported, by name and with its traceback."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

T = TypeVar("T")


def check_each(cases: Iterable[T], check: Callable[[T], None], name: Callable[[T], str] = str) -> None:
    """Check every case, each with the same random numbers.

    For cases that take less time than a test around each of them would.

    Args:
        cases: what is checked.
        check: raises where a case does not hold.
        name: what a case is called.

    Raises:
        ExceptionGroup: what every failing case raised, with its name.
    """
    checked, failures = 0, []
    for case in cases:
        torch.manual_seed(0)
        checked += 1
        try:
            check(case)
        except Exception as error:
            error.add_note(f"case: {name(case)}")
            failures.append((name(case), error))
    assert checked, "there is no case"
    if failures:
        names = ", ".join(failing for failing, _ in failures)
        raise ExceptionGroup(f"{len(failures)} of {checked} cases: {names}", [error for _, error in failures])
