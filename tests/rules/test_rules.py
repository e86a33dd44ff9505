"""Every rule's identity, checked by what it promises: one linear layer, the operation, a LayerNorm.

Each case builds ``LN(op(source(x), ...))`` where every operand of the operation that must be centered comes out of a
linear layer. If the rule is right the site folds and the float64 output equals eager's; if a case must not fold, the
reason is checked. A rule without a case fails ``test_every_rule_has_a_case``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from architectures import randomise
from graphs import capture_all
from rule_case import (
    Around,
)
from rule_cases import CASES, OF_SEVERAL_PROCESSES, extra_inputs
from rule_identities import operations_checked

import lncompile
from lncompile.backend import lnfold
from lncompile.passes.graph.canonical import canonicalise
from lncompile.passes.rules import RULES

pytestmark = pytest.mark.usefixtures("without_inductor")


@pytest.fixture(autouse=True)
def data_dependent_sizes() -> Iterator[None]:
    """A boolean index makes a tensor whose size is known at run time only; Dynamo captures it when asked to."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


# Their pieces are checked where they are taken.
TUPLES = frozenset({"split", "chunk", "unbind", "multi_head_attention"})


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    """Of one capture: the site's verdict, what is computed, which operations are there, and each one's identities."""
    case = CASES[name]
    module = randomise(Around(case.operation, case.norm).double())
    inputs = {"value": torch.randn(2, 5, 7, dtype=torch.float64), "extra": extra_inputs()}
    call = capture_all(module, functools.partial(lnfold, options={"lnfold.assist": "off"}), **inputs)
    assert call.is_whole
    (report,) = lncompile.reports(call.compiled)
    torch.testing.assert_close(call.result, module(**inputs), rtol=1e-10, atol=1e-10)
    site = report.sites[-1]
    assert site.reason is case.reason, site.detail
    assert site.folded == (case.reason is None)

    (captured,) = call.graphs
    operations = [canonicalise(node) for node in captured.graph_module.graph.nodes]
    found = {operation.name for operation in operations if operation is not None}
    named = set(case.rules.split())
    # Dynamo may have written the operations that a case names in another way.
    assert not named or named & found, sorted(found)
    checked = operations_checked(captured)
    assert case.reason is not None or named & TUPLES or named <= checked


def test_every_rule_has_a_case() -> None:
    covered = {rule for case in CASES.values() if case.reason is None for rule in case.rules.split()}
    assert covered == set(RULES) - OF_SEVERAL_PROCESSES
    assert {rule for case in CASES.values() for rule in case.rules.split()} >= TUPLES
