"""What random modules found: each a wrong answer or a crash once, shrunk to the operation that made it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

pytestmark = pytest.mark.usefixtures("without_inductor")
D = 6


class Parts(nn.Module):
    """Parameters to draw on, and a function that uses them."""

    def __init__(self, function: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.single = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 1)
        self.scale = nn.Parameter(torch.zeros(D))
        self.norm, self.other = nn.LayerNorm(D), nn.LayerNorm(D)
        self.table = nn.Parameter(torch.zeros(9, D))
        self.batch_norm = nn.BatchNorm1d(D)
        self.grouped = nn.Conv1d(D, 12, 1, groups=2)
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(self, value)


def mean_of_a_native_norm_is_read(m: Parts, x: Tensor) -> Tensor:
    output, mean, _ = torch.native_layer_norm(m.one(x), (D,), m.norm.weight, m.norm.bias, 1e-5)
    return output + mean


def norm_of_a_norm(m: Parts, x: Tensor) -> Tensor:
    return m.other(functional.layer_norm(m.one(x), (D,)))


def norm_whose_bias_is_a_norm(m: Parts, x: Tensor) -> Tensor:
    bias = functional.layer_norm(m.scale * 2, (D,))
    return functional.layer_norm(m.one(x), (D,), m.norm.weight, bias)


def dropout_is_its_operand(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x)
    same = functional.dropout(stream, 0.5, training=False)
    stream += m.two(x)
    return m.norm(stream) + m.other(same)


def view_of_a_dropout_is_written_to(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x)
    view = functional.dropout(stream, 0.5, training=False).t()
    normed = m.norm(stream)
    view.sub_(normed.t(), alpha=3)
    return m.other(stream) + m.norm(view.t())


def two_norms_share_a_variance(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x)
    variance = stream.var(-1, keepdim=True, unbiased=False)
    first = (stream - stream.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)
    second = (stream - stream.mean(dim=-1, keepdim=True)) * torch.rsqrt(variance + 1e-3)
    return first * m.scale + second


def update_keeps_the_dtype(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x).float()
    stream += m.two(x)
    return m.norm(stream.double())


def bits_read_as_another_dtype(m: Parts, x: Tensor) -> Tensor:
    return m.norm(m.one(x).view(torch.int64).view(torch.float64))


def norm_over_one_element(m: Parts, x: Tensor) -> Tensor:
    return functional.layer_norm(m.single(x), (1,)) + m.norm(m.one(x))


def cast_to_integers_before_a_scale(m: Parts, x: Tensor) -> Tensor:
    return m.norm((m.one(x) * 8).to(torch.int64).to(torch.float64) * m.scale)


def difference_that_is_written_to(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x)
    difference = stream - stream.mean(-1, keepdim=True)
    variance = difference.pow(2).mean(-1, keepdim=True)
    normed = difference * torch.rsqrt(variance + 1e-5)
    difference *= 3.0
    return normed + difference + m.other(stream)


def mean_changed_before_the_difference(m: Parts, x: Tensor) -> Tensor:
    stream = m.one(x)
    mean = stream.mean(-1, keepdim=True)
    mean[:1] = 2.0
    return m.norm(torch.relu(stream) + (stream - mean))


def running_statistics_are_written(m: Parts, x: Tensor) -> Tensor:
    weight = m.batch_norm.running_mean + m.scale
    functional.batch_norm(
        input=x, running_mean=m.batch_norm.running_mean, running_var=m.batch_norm.running_var, training=True
    )
    return m.norm(m.one(x) + m.batch_norm.running_mean + weight)


def table_that_is_renormalised(m: Parts, x: Tensor) -> Tensor:
    ids = torch.tensor([[1, 2], [3, 4]])
    bag = functional.embedding_bag(ids, m.table, max_norm=0.5, mode="sum")
    return m.norm(bag) + m.other(functional.embedding(ids[0], m.table))


def blocks_across_groups(m: Parts, x: Tensor) -> Tensor:
    # 12 channels in 2 groups of 6: channels [12] → [3, 4] puts a block of 4 across the groups.
    out = m.grouped(x.T[None])[0].T.reshape(-1, 3, 4)
    return functional.layer_norm(out, (4,)).sum((-1, -2)) + functional.layer_norm(out.mT, (3,)).sum((-1, -2))


def embedding_with_its_arguments_swapped(m: Parts, x: Tensor) -> Tensor:
    return m.norm(torch.embedding(m.table, torch.tensor([1, 4, 2])))


def a_parameter_updated_in_place_after_expansion(m: Parts, x: Tensor) -> Tensor:
    stream = m.scale + x.new_zeros(4, D)
    stream += m.one(x)
    return m.norm(stream)


def view_of_a_norm_of_a_transposed_tensor(m: Parts, x: Tensor) -> Tensor:
    return m.norm(m.one(x).view(2, 2, D).transpose(0, 1)).view(4, D)


FUNCTIONS = [
    mean_of_a_native_norm_is_read,
    norm_of_a_norm,
    norm_whose_bias_is_a_norm,
    dropout_is_its_operand,
    view_of_a_dropout_is_written_to,
    two_norms_share_a_variance,
    update_keeps_the_dtype,
    bits_read_as_another_dtype,
    norm_over_one_element,
    cast_to_integers_before_a_scale,
    difference_that_is_written_to,
    mean_changed_before_the_difference,
    running_statistics_are_written,
    table_that_is_renormalised,
    blocks_across_groups,
    embedding_with_its_arguments_swapped,
    a_parameter_updated_in_place_after_expansion,
    view_of_a_norm_of_a_transposed_tensor,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_found_by_fuzzing(function: Callable[[Parts, Tensor], Tensor]) -> None:
    model, reference = (randomise(Parts(function).double().eval()) for _ in range(2))
    value = torch.randn(4, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    for call in range(3):
        torch.testing.assert_close(compiled(value), reference(value), rtol=1e-9, atol=1e-9, msg=f"call {call}")
        if call == 1:
            for net in (model, reference):
                for parameter in net.parameters():
                    parameter.mul_(0.9).add_(0.05)
    for left, right in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


class NormOfABuffer(nn.Module):
    """A norm by hand of a buffer, and a norm of what it gives: all of it is computed once, and leaves the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("constant", torch.randn(6, D))

    def forward(self, value: Tensor) -> Tensor:
        mean = self.constant.mean(-1, keepdim=True)
        variance = (self.constant * self.constant).mean(-1, keepdim=True) - mean * mean
        normed = (self.constant - mean) / torch.sqrt(variance + 1e-5)
        return value + functional.layer_norm(normed.mean(1), (6,)).sum()


class NormsOfAParameter(nn.Module):
    """A norm by hand of a parameter expression, read by a second norm and by others."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.row, self.column = (nn.Parameter(torch.randn(size)) for size in ((D,), (1, D), (D, 1)))
        self.gain = nn.Parameter(torch.randn(D))

    def forward(self, value: Tensor) -> Tensor:
        table = (self.row * self.scale).sub(self.column.mT, alpha=2)
        mean = table.mean(-1, keepdim=True)
        variance = (table * table).mean(-1, keepdim=True) - mean * mean
        normed = (table - mean).div(torch.sqrt(variance + 1e-5))
        return value + (normed + functional.layer_norm(normed, (D,), self.gain, eps=0.1))


class PartsOfAProjectedNorm(nn.Module):
    """A norm by hand of a buffer, projected, and one part of it normed again."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(4, D) + 1)
        self.linear = nn.Linear(D, 2 * D)

    def forward(self, value: Tensor) -> Tensor:
        mean = self.table.mean(-1, keepdim=True)
        variance = (self.table - mean).square().sum(-1, True) / D
        parts = self.linear((self.table - mean) / torch.sqrt(variance + 1e-5)).chunk(2, -1)
        return functional.layer_norm(parts[0], (D,)) + value * parts[1]


class NormOfAParameterInPlace(nn.Module):
    """A norm by hand of a parameter expression, its last step written in place, and groups of it normed again."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.gain = nn.Parameter(torch.randn(1, 1, 4) + 1), nn.Parameter(torch.randn(2))

    def forward(self, value: Tensor) -> Tensor:
        table = self.table * self.table
        normed = table - table.mean(-1)[..., None]
        normed.mul_((table.var(-1, keepdim=True, unbiased=False) + 1e-5).rsqrt())
        groups = normed.reshape(1, 1, 2, 2, 1).permute(0, 1, 4, 2, 3)
        return value + torch.native_layer_norm(groups, (2,), self.gain, None, 1e-5)[0].sum()


@pytest.mark.parametrize("kind", [NormOfABuffer, NormsOfAParameter, PartsOfAProjectedNorm, NormOfAParameterInPlace])
def test_norm_by_hand_of_parameters_alone(kind: type[nn.Module]) -> None:
    model, value = randomise(kind().double()), torch.randn(4, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True)
    torch.testing.assert_close(compiled(value), model(value), rtol=1e-12, atol=1e-12)


class PromotedActivation(nn.Module):
    """A join of double and single precision: the single one is exact when it is promoted, but centered before that."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, value: Tensor) -> Tensor:
        narrow = torch.tanh(value).to(torch.float32)[:1]
        return self.norm(torch.cat((self.one(torch.relu(value)), narrow), 0))


def test_activation_that_is_promoted_keeps_its_precision() -> None:
    model = randomise(PromotedActivation().double())
    value = torch.randn(4, D, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold")
    torch.testing.assert_close(compiled(value), model(value), rtol=1e-12, atol=1e-12)


class GroupsOfUnknownSize(nn.Module):
    """A stream read three times over, its features flattened with a dynamic dimension and taken apart again."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(7, 4), nn.LayerNorm(2)

    def forward(self, value: Tensor) -> Tensor:
        flat = self.linear(value).flatten(-2)
        return self.norm(torch.stack([flat, flat, flat]).reshape(3, 2, 2, 2, 5).permute(0, 1, 2, 4, 3))


def test_groups_of_unknown_size() -> None:
    model, value = randomise(GroupsOfUnknownSize().double()), torch.randn(2, 5, 7, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(value), model(value), rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("without_inductor")
def test_a_mean_by_a_product_is_taken_out_before_products_become_sums() -> None:
    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, 12, dtype=torch.float64))

        def forward(self) -> Tensor:
            mean = nn.functional.linear(self.weight, torch.ones(1, 12, dtype=torch.float64)) / 12
            variance = (self.weight.pow(2).sum(-1, True) / 12 - mean**2).abs()
            return (mean - self.weight) * (variance + 1e-5).rsqrt()

    model = Standardised()
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.matrix_vector": "on"})
    torch.testing.assert_close(compiled(), model(), rtol=1e-10, atol=1e-10)
