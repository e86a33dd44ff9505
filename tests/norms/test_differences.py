"""Differences from a mean that are not recognised as norms: they are listed with the reason, and count as none."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import randomise
from false_friends import FALSE_FRIENDS, centered_only
from handwritten import Image, Model, named
from spelled_means import D, Norm
from spellings import SPELLINGS, cohere
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.decisions import REMEDIES, Reason
from lncompile.reporting.report import merge

# What each false friend is listed with; those without a word here are not listed.
WHY: dict[str, str] = {
    "scaler": "the mean is not only subtracted, it is also read by add",
    "unbiased_and_put_back": "the mean is not only subtracted, it is also read by add",
    "sum_is_read_too": "the mean is not only subtracted, it is also read by add",
    "centered_only": "nothing scales the difference by a function of the difference",
    "centered_only_in_place": "nothing scales the difference by a function of the difference",
    "deviation_subtracted": "nothing scales the difference by a function of the difference",
    "normalized_along_the_batch": "nothing scales the difference by a function of the difference",
    "range_of_values": "reads the tensor itself and not the difference alone: truediv",
    "variance_of_something_else": "reads the tensor itself and not the difference alone: truediv",
    "squares_without_their_mean": "reads the tensor itself and not the difference alone: truediv",
    "scaled_by_the_norm_of_the_tensor": "reads the tensor itself and not the difference alone: truediv",
    "clamped_by_the_tensor": "reads the tensor itself and not the difference alone: truediv",
    "flag_in_place_of_a_dimension": "reads the tensor itself and not the difference alone: truediv",
    "squares_swapped": "the mean is not only subtracted",
    "view_across_the_rows": "nothing scales the difference by a function of the difference",
    "overwritten_between": "written to before the mean is subtracted",
}


@named(FALSE_FRIENDS)
def test_false_friends_are_listed_with_the_reason(norm: Norm) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    report = lncompile.explain(model, value)
    expected = WHY.get(norm.__name__)
    assert ("No LayerNorm in the graph" in str(report)) == (expected is None)
    assert len(report.differences) == (0 if expected is None else 2)
    for difference in report.differences:
        assert expected is not None
        assert expected in difference.detail
        assert difference.location.startswith("false_friends.py:")
        assert expected in " ".join(str(report).split())


@named(SPELLINGS)
def test_norms_are_not_listed_as_differences(norm: Norm) -> None:
    model, value = randomise(Model(norm).double()), torch.randn(5, D, dtype=torch.float64)
    assert lncompile.explain(model, value).differences == ()


def test_reports_of_differences() -> None:
    """They stand in every form of the report, beside norms and without, and count as none."""
    value = torch.randn(5, D, dtype=torch.float64)
    alone = lncompile.explain(randomise(Model(centered_only).double()), value)
    beside = lncompile.explain(randomise(Model(lambda x: cohere(x) + centered_only(x * 2)).double()), value)
    assert (alone.total, alone.folded, len(alone.differences)) == (0, 0, 2)
    assert (beside.total, beside.folded, len(beside.differences)) == (2, 2, 2)
    for report in (alone, beside):
        (first, *_) = report.to_dict()["differences"]
        assert json.loads(json.dumps(first)) == first
        assert first["reason"] == Reason.UNRECOGNISED.value
        assert first["remedy"] == REMEDIES[Reason.UNRECOGNISED]
        assert "nothing scales the difference" in report.to_html()
        assert "unrecognised: nothing scales the difference" in str(report)
    assert "2 differences from a mean are taken in it" in str(alone)
    assert "2 of 2 LayerNorms folded" in str(beside)
    assert len(merge([alone, beside]).differences) == 4


def test_a_difference_in_front_of_a_layer_norm_is_not_listed() -> None:
    model = randomise(Model(lambda x: functional.layer_norm(x - x.mean(-1, keepdim=True), (D,))).double())
    report = lncompile.explain(model, torch.randn(5, D, dtype=torch.float64))
    assert (report.total, report.folded, report.differences) == (2, 2, ())


@pytest.mark.parametrize("dimensions", [(0,), (1,), (2, 3), (0, 2, 3)], ids=str)
def test_differences_over_other_axes_are_not_listed(dimensions: tuple[int, ...]) -> None:
    """A bare difference is listed where the mean is over channels, not over the batch or positions."""
    model = randomise(Image(lambda x: x - x.mean(dimensions, keepdim=True), None).double())
    report = lncompile.explain(model, torch.randn(2, 3, 6, 8, dtype=torch.float64))
    assert (report.total, len(report.differences)) == (0, int(dimensions == (1,)))


def test_data_and_weights_that_are_centered_are_not_listed() -> None:
    """Neither what a caller passes in nor a weight alone is the features of a layer."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, value: Tensor) -> Tensor:
            weight = self.linear.weight - self.linear.weight.mean(-1, keepdim=True)
            return functional.linear(centered_only(value), weight)

    report = lncompile.explain(randomise(Standardised().double()), torch.randn(5, D, dtype=torch.float64))
    assert (report.total, report.differences) == (0, ())
