"""Training: the centering stays in the graph; the forward is an RMSNorm, the gradients are the original model's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from architectures import randomise
from fuzzing import centering_left_out, run_through_aot
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import lncompile
from lncompile import Reason
from lncompile.lowering import torch_private_inductor
from lncompile.passes.placement.costs import CostModel

D = 16
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
ON = {"lnfold.training": "on"}


@pytest.fixture(autouse=True)
def gradients(fresh_dynamo: None) -> Iterator[None]:
    """Undo the no_grad that all other tests run under."""
    with torch.enable_grad():
        yield


class Block(nn.Module):
    """A pre-norm residual stream that starts from a linear layer, with a LayerScale: two norms that fold."""

    def __init__(self, dropout: float = 0.0, width: int = D) -> None:
        super().__init__()
        self.first, self.inner, self.outer = (nn.Linear(width, width) for _ in range(3))
        self.norm, self.last = nn.LayerNorm(width), nn.LayerNorm(width)
        self.scale = nn.Parameter(torch.randn(width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, value: Tensor) -> Tensor:
        stream = self.dropout(self.first(value))
        stream = stream + self.scale * self.outer(functional.gelu(self.inner(self.norm(stream))))
        return self.last(stream)


def gradients_of(model: nn.Module, function: Callable[..., Tensor], *args: Tensor) -> dict[str, Tensor]:
    """Gradients of a loss that weighs every number of the output differently, by parameter name."""
    model.zero_grad()
    torch.manual_seed(3)
    output = function(*args)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * weights).sum().backward()
    result = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return result


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, **(tolerance or TOLERANCE), msg=name)


def test_gradients_of_every_parameter_are_eagers(without_inductor: None) -> None:
    model, value = randomise(Block().double()), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(compiled)
    assert (report.folded, report.total) == (2, 2)
    assert {weight.storage for weight in report.weights} == {"graph"}
    assert report.extra_bytes == 0
    assert "4 centered at every step" in report.summary()


def test_without_the_centering_gradients_differ(without_inductor: None) -> None:
    model, value = randomise(Block().double()), torch.randn(5, D, dtype=torch.float64)
    with centering_left_out():
        compiled = torch.compile(model, backend="lnfold", options=ON)
        actual = gradients_of(model, compiled, value)
    expected = gradients_of(model, model, value)
    assert max(float((actual[name] - expected[name]).abs().max()) for name in expected) > 1e-3


def test_explain_says_what_training_does() -> None:
    model, value = randomise(Block()), torch.randn(5, D)
    folded = lncompile.explain(torch.compile(model, backend="lnfold", options=ON), value)
    assert folded.folded == 2
    assert {weight.storage for weight in folded.weights} == {"graph"}
    left = lncompile.explain(model, value)
    assert [site.reason for site in left.sites] == [Reason.TRAINING, Reason.TRAINING]
    assert "2 weights would be centered at every step" in left.sites[0].detail
    assert "5 weights would be centered at every step" in left.sites[1].detail
    off = lncompile.explain(torch.compile(model, backend="lnfold", options={"lnfold.training": "off"}), value)
    assert [site.reason for site in off.sites] == [Reason.TRAINING, Reason.TRAINING]
    assert "no_grad" in off.sites[0].detail


# A linear layer of D weights and a bias: 4 · (D² + D) numbers of traffic a step, against 2 · tokens · D for its norm.
@pytest.mark.parametrize(("tokens", "folded"), [(2 * (D + 1), 0), (2 * (D + 1) + 1, 1)])
def test_training_folds_where_tokens_outweigh_the_weights(tokens: int, folded: int, without_inductor: None) -> None:
    model = randomise(nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D)).double())
    value = torch.randn(tokens, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(compiled)
    assert report.folded == folded


def test_the_cost_of_a_composed_weight_counts() -> None:
    class Scaled(nn.Module):
        """A linear layer with a LayerScale and its norm: 4 · (D² + 2 · D) numbers a step."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale, self.norm = nn.Linear(D, D), nn.Parameter(torch.randn(D)), nn.LayerNorm(D)

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(self.linear(value) * self.scale)

    model = randomise(Scaled())
    for tokens, folded in ((2 * (D + 2), 0), (2 * (D + 2) + 1, 1)):
        assert lncompile.explain(model, torch.randn(tokens, D)).folded == folded


def test_a_huge_trained_table_is_centered_behind_the_look_up() -> None:
    class Embedded(nn.Module):
        """Token embeddings, and three norms of one stream."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(1000, D)
            self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(3))

        def forward(self, index: Tensor) -> Tensor:
            stream = self.table(index)
            return torch.stack([norm(stream) for norm in self.norms])

    model = randomise(Embedded())
    report = lncompile.explain(model, torch.arange(64))
    assert (report.folded, len(report.centerings), report.weights) == (3, 1, ())
    with torch.no_grad():
        report = lncompile.explain(model, torch.arange(64))
    assert (report.folded, len(report.centerings), len(report.weights)) == (3, 0, 1)


def test_frozen_weights_are_centered_once_and_trained_ones_at_every_step(without_inductor: None) -> None:
    class Adapted(nn.Module):
        """A frozen linear layer with a low-rank adapter, as in LoRA."""

        def __init__(self) -> None:
            super().__init__()
            self.base, self.norm = nn.Linear(D, D).requires_grad_(False), nn.LayerNorm(D)
            self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(self.base(value) + self.up(self.down(value)))

    model, value = randomise(Adapted().double()), torch.randn(20, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(compiled)
    assert report.folded == 1
    assert {weight.name: weight.storage for weight in report.weights} == {
        "base.weight": "copy", "base.bias": "copy", "up.weight": "graph",
    }  # fmt: skip


def test_a_table_with_sparse_gradients_keeps_them() -> None:
    model = randomise(nn.Sequential(nn.Embedding(20, D, sparse=True), nn.LayerNorm(D)))
    compiled = torch.compile(model, backend="lnfold", options=ON)
    compiled(torch.arange(7)).square().sum().backward()
    assert model[0].weight.grad is not None
    assert model[0].weight.grad.is_sparse
    report = lncompile.explain(compiled, torch.arange(7))
    assert report.folded == 0
    assert "sparse gradient" in report.sites[0].detail


def test_gradients_turned_on_inside_of_the_graph_are_training(without_inductor: None) -> None:
    class Inner(nn.Module):
        """Gradients wanted in a call that is made without them."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

        def forward(self, value: Tensor) -> Tensor:
            with torch.enable_grad():
                return self.norm(self.linear(value))

    model, value = randomise(Inner().double()), torch.randn(5, D, dtype=torch.float64)

    def run(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def without(value: Tensor) -> Tensor:
            with torch.no_grad():
                return function(value)

        return without

    expected = gradients_of(model, run(model), value)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert_same_gradients(gradients_of(model, run(compiled), value), expected)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 0
    assert "turns them on inside" in report.sites[0].detail


def test_what_centers_to_zero_keeps_a_gradient_of_zero(without_inductor: None) -> None:
    """A number for each token is constant along the features: its gradient is zero, but it is there (weight decay)."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.level = nn.Linear(D, D), nn.LayerNorm(D), nn.Parameter(torch.randn(5, 1))

        def forward(self, value: Tensor) -> Tensor:
            return self.norm(self.linear(value) + self.level)

    model, value = randomise(Gated().double()), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    assert lncompile.reports(compiled)[0].folded == 1


def test_dropout_is_centered_behind_it_or_not_at_all(without_inductor: None) -> None:
    model, value = randomise(Block(dropout=0.5).double()).train(), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(compiled)
    assert (report.folded, len(report.centerings)) == (2, 1)
    assert "dropout" in report.centerings[0].detail
    alone = torch.compile(model, backend="lnfold", options={**ON, "lnfold.assist": "off"})
    assert_same_gradients(gradients_of(model, alone, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(alone)
    assert report.folded == 0
    assert "dropout" in report.sites[0].detail


def test_accumulated_gradients_and_a_step(without_inductor: None) -> None:
    trained, reference = (randomise(Block().double()) for _ in range(2))
    compiled = torch.compile(trained, backend="lnfold", options=ON)
    batches = [torch.randn(5, D, dtype=torch.float64) for _ in range(6)]
    for model, function in ((trained, compiled), (reference, reference)):
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for index, batch in enumerate(batches):
            (function(batch) ** 3).mean().backward()
            if index % 2:
                optimiser.step()
                optimiser.zero_grad()
    for ours, theirs in zip(trained.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    # The trained weights are what predicts next, under no_grad, in a graph of its own.
    with torch.no_grad():
        torch.testing.assert_close(compiled(batches[0]), reference(batches[0]), **TOLERANCE)


def test_cost_model_counts_the_way_back() -> None:
    tensor = torch.empty(4, 8)
    inference, training = CostModel(), CostModel(training=True)
    assert inference.norm(tensor).hint == 128
    assert training.norm(tensor).hint == 256
    assert [training.activation(tensor, raw).hint for raw in (False, True)] == [256, 384]
    assert [training.weight(tensor, trained).hint for trained in (False, True)] == [0, 512]
    assert CostModel(training=True, weighs_weights=False).weight(tensor, True).hint == 0


def test_norms_behind_gradient_checkpointing_are_listed_and_gradients_right(monkeypatch: pytest.MonkeyPatch) -> None:
    class Checkpointed(nn.Module):
        """Two blocks of a residual stream, the first of them computed again on the way back."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, value: Tensor) -> Tensor:
            return self.second(checkpoint(self.first, value, use_reentrant=False))

    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run_through_aot)
    model, value = randomise(Checkpointed().double()), torch.randn(5, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", options=ON)
    assert_same_gradients(gradients_of(model, compiled, value), gradients_of(model, model, value))
    (report,) = lncompile.reports(compiled)
    assert [(site.name, site.folded) for site in report.sites] == [
        ("first.norm", False), ("first.last", False), ("second.norm", True), ("second.last", True),
    ]  # fmt: skip
    assert "tag_activation_checkpoint" in report.sites[0].detail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are centered in float32, before autocast casts them: the error is that of eager's own autocast."""
    monkeypatch.setattr(torch_private_inductor, "inductor_compile", run_through_aot)
    model, value = randomise(Block()), torch.randn(64, D)
    exact = gradients_of(wide := copy.deepcopy(model).double(), wide, value.double())
    compiled = torch.compile(model, backend="lnfold", options=ON)
    with torch.autocast("cpu", dtype=dtype):
        eager, ours = gradients_of(model, model, value), gradients_of(model, compiled, value)
    (report,) = lncompile.reports(compiled)
    assert report.folded == 2

    def error(gradients: dict[str, Tensor]) -> float:
        return max(float((gradients[name] - exact[name]).norm() / exact[name].norm()) for name in exact)

    assert error(ours) <= 1.25 * error(eager)


class ScaledBehind(nn.Module):
    """A scale that is computed behind the product that it scales: the product's weight is to be computed of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.scale = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        product = self.linear(x)
        return self.norm(product * self.scale.square())


@pytest.mark.parametrize("trained", [True, False])
def test_a_scale_that_is_computed_behind_its_product(trained: bool, without_inductor: None) -> None:
    model, x = randomise(ScaledBehind().double()), torch.randn(3, D, dtype=torch.float64)
    model.requires_grad_(trained)
    gradients = []
    for function in (model, torch.compile(model, backend="lnfold", options=ON)):
        model.zero_grad()
        given = x.clone().requires_grad_()
        function(given).cos().sum().backward()
        gradients.append([given.grad, *(p.grad.clone() for p in model.parameters() if trained)])
    (report,) = lncompile.reports(function)
    assert report.folded == report.total == 1
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE)


class PartlyFrozen(nn.Module):
    """A layer or its scale is used under no_grad: the gradient of the one is wanted, that of the other is not."""

    def __init__(self, frozen: str) -> None:
        super().__init__()
        self.first, self.linear, self.last = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.scale, self.norm, self.frozen = nn.Parameter(torch.ones(D)), nn.LayerNorm(D), frozen

    def forward(self, x: Tensor) -> Tensor:
        if self.frozen == "layer":
            with torch.no_grad():
                y = self.linear(x)
            y = y * self.scale
        else:
            y = self.linear(x)
            with torch.no_grad():
                scale = self.scale * 2
            y = y * scale
        return self.last(self.norm(self.first(x) + y))


@pytest.mark.parametrize("frozen", ["layer", "scale"])
def test_gradients_that_are_turned_off_inside_stay_off(frozen: str, without_inductor: None) -> None:
    model, x = randomise(PartlyFrozen(frozen).double()), torch.randn(64, 8, D, dtype=torch.float64)
    gradients = []
    for function in (model, torch.compile(model, backend="lnfold", options=ON)):
        model.zero_grad()
        function(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        actual = gradients[1][name]
        assert (actual is None) == (expected is None), name
        if expected is not None:
            torch.testing.assert_close(actual, expected, **TOLERANCE)
