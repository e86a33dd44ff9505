"""Which obstacle a report names: the one whose removal lets the norm fold, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, randomise
from graphs import capture
from more_architectures import MORE_ARCHITECTURES
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.decisions import Reason
from lncompile.passes.placement.variables import first_blocker
from lncompile.verification import relative_error

BY_NAME = {architecture.name: architecture for architecture in (*ARCHITECTURES, *MORE_ARCHITECTURES)}


# --- Models that return too much -------------------------------------------------------------------------------------

#: Models whose norms stay because of what they return: what to leave out of it as the report says, what a caller may
#: keep, and how many norms fold then, of how many.
RETURN_LESS: dict[str, tuple[set[str], Callable[[Any], Any], int, int]] = {
    "clip": (
        {"['vision_model_output']['last_hidden_state']"}, lambda out: (out.image_embeds, out.text_embeds), 11, 11),
    "clip_vision": ({"['last_hidden_state']"}, lambda out: out.image_embeds, 6, 6),
    "owlvit": (
        {"['vision_model_output']['last_hidden_state']"}, lambda out: (out.image_embeds, out.text_embeds), 11, 11),
    "mlcd": ({"['last_hidden_state']"}, lambda out: out.pooler_output, 6, 6),
    "hiera": ({"['last_hidden_state']"}, lambda out: out.pooler_output, 5, 5),
}  # fmt: skip


@pytest.mark.parametrize("name", RETURN_LESS)
def test_to_return_less_lets_as_many_fold_as_the_report_says(name: str, without_inductor: None) -> None:
    paths, keep, folded, total = RETURN_LESS[name]
    model, inputs = BY_NAME[name].model(), BY_NAME[name].inputs(torch.float64)
    report = lncompile.explain(model, **inputs)
    left = [site for site in report.sites if site.reason is Reason.GRAPH_OUTPUT]
    assert len(left) == folded - report.folded > 0
    assert report.total == total
    for site in left:
        assert {found.path for found in site.returned} == paths
        assert site.remedy is not None
        assert all(f"result{path}" in site.remedy for path in paths)
    if name.startswith("clip"):
        assert all(site.folded or site.reason is not Reason.NORM_OUTPUT for site in report.sites)

    def less(**arguments: Tensor) -> Any:
        return keep(model(**arguments))

    compiled = torch.compile(less, backend="lnfold")
    expected, actual = less(**inputs), compiled(**inputs)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (actual, expected)), strict=True):
        assert relative_error(one, other) <= 1e-10
    (found,) = lncompile.reports(compiled)
    assert (found.folded, found.total) == (folded, total)


def test_the_compiled_graph_names_what_makes_the_returned_tensor(without_inductor: None) -> None:
    """What is returned where is known to explain alone, which sees a call."""
    architecture = BY_NAME["clip"]
    compiled = torch.compile(architecture.model(), backend="lnfold")
    compiled(**architecture.inputs(torch.float64))
    (report,) = lncompile.reports(compiled)
    (returned,) = {found for site in report.sites for found in site.returned}
    assert (returned.path, returned.graph_break, returned.is_inside) == ("", "", False)
    remedy = next(site.remedy for site in report.sites if site.returned)
    assert remedy is not None
    assert "leave add (vision_model.encoder.layers.1, modeling_clip.py:" in remedy


# --- Which one -------------------------------------------------------------------------------------------------------

D = 16


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, D)
        self.linear, self.other, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.first, self.norm, self.second, self.third = (nn.LayerNorm(D) for _ in range(4))


IDS = torch.tensor([[1, 2, 3]])


def all_layers(m: Small, start: Tensor) -> tuple[Tensor, Tensor]:
    """A stream with two norms on the way and one at its end: the stream, and the end."""
    x = start + m.linear(m.norm(start))
    x = x + m.other(m.second(x))
    return x, m.third(x)


def returns_its_last_state(m: Small, x: Tensor) -> Any:
    x, end = all_layers(m, m.first(m.embedding(x)))
    return x, end


def returns_every_state(m: Small, x: Tensor) -> Any:
    x = m.embedding(x)
    y, end = all_layers(m, x)
    return x, y, end


def returns_a_state_that_is_read(m: Small, x: Tensor) -> Any:
    """Two obstacles, neither of which is the reason by itself."""
    x, end = all_layers(m, m.embedding(x))
    return x, end, functional.relu(x).sum()


def shows_its_stream(m: Small, x: Tensor) -> Any:
    x, end = all_layers(m, m.embedding(x))
    return end + functional.relu(x).mean(-1, keepdim=True)


def post_norm(m: Small, x: Tensor) -> Any:
    x = m.first(m.embedding(x))
    return m.norm(x + m.linear(x))


def behind_an_activation(m: Small, x: Tensor) -> Any:
    return m.norm(functional.gelu(m.linear(m.first(m.embedding(x)))))


@pytest.mark.parametrize(
    ("function", "folded", "reasons", "returned"),
    [
        (returns_its_last_state, 1, [Reason.GRAPH_OUTPUT] * 3, 1),
        (returns_every_state, 0, [Reason.GRAPH_OUTPUT] * 3, 2),
        (returns_a_state_that_is_read, 0, [Reason.VISIBLE] * 3, 0),
        (shows_its_stream, 0, [Reason.VISIBLE] * 3, 0),
        (post_norm, 1, [Reason.NORM_OUTPUT], 0),
        (behind_an_activation, 1, [Reason.NON_COMMUTING], 0),
    ],
)
def test_the_obstacle_that_is_named(
    function: Callable[[Small, Tensor], Any], folded: int, reasons: list[Reason], returned: int
) -> None:
    net = randomise(Small()).double()
    net.forward = lambda ids: function(net, ids)  # type: ignore[arg-type,method-assign]
    report = lncompile.explain(net, IDS)
    assert report.folded == folded
    assert [site.reason for site in report.sites if not site.folded] == reasons
    positions = {found.position for site in report.sites for found in site.returned}
    assert len(positions) == returned
    paths = {found.path for site in report.sites for found in site.returned}
    assert paths == {f"[{position}]" for position in range(returned)}


def test_the_nearest_blocker_is_another_one() -> None:
    """The control: without the question what would fold without it, the first norm's output is blamed."""
    net = randomise(Small()).double()
    analysis = capture(lambda ids: returns_its_last_state(net, ids), IDS).analyse()
    nearest = [first_blocker((site.input, site.axes), analysis.variables) for site in analysis.sites]
    assert [blocker.reason for blocker in nearest if blocker] == [Reason.NORM_OUTPUT] * 2 + [Reason.GRAPH_OUTPUT]
    reasons = [site.reason for site in analysis.verdicts]
    assert reasons == [None, *[Reason.GRAPH_OUTPUT] * 3]


def test_a_break_that_hands_the_stream_on_is_what_to_remove(without_inductor: None) -> None:
    net = randomise(Small()).double()

    def function(ids: Tensor) -> Tensor:
        x, end = all_layers(net, net.embedding(ids))
        torch._dynamo.graph_break()
        return functional.relu(x) + end

    compiled = torch.compile(function, backend="lnfold")
    compiled(IDS)
    for report in (lncompile.explain(function, IDS), lncompile.reports(compiled).merged()):
        (remedy,) = {site.remedy for site in report.sites}
        (graph_break,) = report.graph_breaks
        assert remedy is not None
        assert remedy.startswith(f"remove the graph break at {graph_break.location}: the code behind it gets add")


def test_a_graph_inside_of_a_model_is_not_told_to_return_less() -> None:
    """Dynamo gives up the frame of the model and compiles what it calls: that returns to the model, not to a caller."""

    class Layer(Small):
        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return all_layers(self, self.embedding(ids))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Layer()

        @torch.compiler.disable(recursive=False)
        def forward(self, ids: Tensor) -> Tensor:
            x, end = self.layer(ids)
            return functional.relu(x) + end

    net = randomise(Outer()).double()
    report = lncompile.explain(net, IDS)
    assert report.total == 3
    (remedy,) = {site.remedy for site in report.sites}
    assert remedy is not None
    assert remedy.startswith("let Dynamo capture the model in one graph")
