"""Real models: how many norms fold, and that predictions stay what they were."""

from __future__ import annotations

import re

import numerics
import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from fuzzing import centering_left_out
from graphs import CapturedCall, capture_all
from in_each_dtype import in_each_dtype

import lncompile
from lncompile.backend import lnfold
from lncompile.verification import floating_outputs, relative_error

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=[a.name for a in ARCHITECTURES])


def worst_error(actual: object, expected: object) -> float:
    values, references = floating_outputs(actual), floating_outputs(expected)
    assert values.keys() == references.keys()
    assert references
    return max(relative_error(values[name], reference) for name, reference in references.items())


@each_architecture
def test_counts_and_exactness_in_float64(architecture: Architecture, without_inductor: None) -> None:
    model = architecture.model()
    inputs = architecture.inputs(torch.float64)
    expected = model(**inputs)
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}

    call = capture_all(model, lnfold, **inputs)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "copy mode changed a weight"

    reports = lncompile.reports(call.compiled)
    assert sum(report.total for report in reports) == architecture.sites
    assert sum(report.folded for report in reports) == architecture.folded
    assert sum(len(report.centerings) for report in reports) == architecture.centerings
    assert worst_error(call.result, expected) <= 1e-10
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()), "copy mode changed a weight"
    if architecture.folded:
        assert uncentered_error(call) > 1e-4, "the control: nothing is centered"
    for report in reports:
        for site in report.sites:
            assert site.location
            assert site.detail
            assert (site.reason is None) == (site.remedy is None) == site.folded
            # Why not names an operation and the line it stands in, or the input the stream starts from.
            assert site.folded or re.search(r"\.py:\d+\)|input '", site.detail), site.detail
            assert site.lowering == ("rms_norm" if site.folded else "layer_norm")


@each_architecture
def test_explain_agrees_with_what_is_compiled(architecture: Architecture) -> None:
    report = lncompile.explain(architecture.model(), **architecture.inputs(torch.float64))
    assert (report.total, report.folded) == (architecture.sites, architecture.folded)
    assert len(report.centerings) == architecture.centerings
    assert bool(report.weights) == bool(architecture.folded)


def uncentered_error(call: CapturedCall) -> float:
    """How far the outputs of a call's graphs are off where the backend centers nothing."""
    errors = []
    for graph in call.graphs:
        with centering_left_out():
            compiled = lnfold(graph.graph_module, graph.example_inputs)
        errors.append(worst_error(compiled(*graph.example_inputs), graph.outputs))
    return max(errors)


#: Models that CI sends through Inductor: a decoder, one with a centering at run time, a post-norm encoder, a vision
#: model. The kernels of the others are of the same kinds, and what the rewrite itself does in narrow dtypes is tested
#: of every model without Inductor, in test_numerics.py.
THROUGH_INDUCTOR = ("gpt2", "bloom", "bert", "vit")


@in_each_dtype(lambda name, dtype: name in THROUGH_INDUCTOR)
def test_error_is_within_budget_of_inductor(architecture: Architecture, dtype: torch.dtype) -> None:
    """On weights as they are, with massive channels, and with large means; the three share what was compiled."""
    found = numerics.measure(architecture, dtype)
    assert all(error.passed for errors in found.values() for error in errors), f"\n{numerics.table(found)}"


def test_randomise_hides_nothing() -> None:
    model = BY_NAME["gpt2"].model()
    for name, parameter in model.named_parameters():
        assert parameter.abs().min() > 0 or parameter.dim() > 1, name
        assert parameter.mean().abs() > 1e-3, name
