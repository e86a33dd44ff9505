"""Parts of a tensor, shifts of a tensor, and what is written into it: how many norms fold, exactly, and the traps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import randomise
from torch import Tensor, nn
from torch.nn import functional

import lncompile
from lncompile.passes.rewrites import center
from lncompile.verification import relative_error

pytestmark = pytest.mark.usefixtures("without_inductor")
D, HEADS = 12, 3


class Parts(nn.Module):
    """Parameters to draw on, and a function of them and an input ``[2, 5, 7]``."""

    def __init__(self, function: Callable[[Parts, Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.joint = nn.Linear(7, D), nn.Linear(7, D), nn.Linear(7, 3 * D)
        self.grouped = nn.Linear(7, 2 * D + D // 2)
        self.norm, self.other = nn.LayerNorm(D), nn.LayerNorm(D)
        self.head_norm, self.other_head_norm = nn.LayerNorm(D // HEADS), nn.LayerNorm(D // HEADS)
        self.wide_norm = nn.LayerNorm(2 * D)
        self.table = nn.Embedding(9, D)
        self.convolution = nn.Conv1d(5, 3 * D, 3, padding=1)
        self.function = function

    def forward(self, value: Tensor) -> Tensor:
        return self.function(self, value)


def queries_and_keys_by_split(m: Parts, u: Tensor) -> Tensor:
    q, k, v = m.joint(u).split(D, dim=-1)
    return m.norm(q) + m.other(k) * torch.relu(v)


def queries_alone_by_chunk(m: Parts, u: Tensor) -> Tensor:
    q, k, v = m.joint(u).chunk(3, dim=-1)
    return m.norm(q) + torch.relu(k) * v


def all_three_by_slices(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u)
    return m.norm(joint[..., :D]) + m.other(joint[..., D : 2 * D]) * m.norm(joint[..., 2 * D :])


def heads_by_unbind(m: Parts, u: Tensor) -> Tensor:
    q, k, v = m.joint(u).view(2, 5, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return functional.scaled_dot_product_attention(m.head_norm(q), m.other_head_norm(k), v)


def heads_interleaved_by_select(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u).view(2, 5, HEADS, 3, -1)
    return m.head_norm(joint.select(3, 0)) + m.other_head_norm(joint[:, :, :, 1]) * torch.relu(joint.select(-2, -1))


def fewer_keys_than_queries(m: Parts, u: Tensor) -> Tensor:
    """Grouped queries: the first part is no whole number of parts of the size of the others."""
    joint = m.grouped(u)
    queries, rest = joint[..., : 2 * D], joint[..., 2 * D :]
    return m.wide_norm(queries).sum(-1, keepdim=True) + torch.relu(rest)


def negative_slices(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u)
    return m.norm(joint[..., -D:]) + torch.relu(joint[..., :-D]).sum(-1, keepdim=True)


def every_other_feature(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u)[..., : 2 * D]
    return m.norm(joint[..., ::2]) + torch.relu(joint[..., 1::2])


def channels_of_a_convolution(m: Parts, u: Tensor) -> Tensor:
    joint = m.convolution(u)
    return m.norm(joint[:, D : 2 * D].transpose(1, 2)).sum() + torch.relu(joint[:, :D])


def rows_of_a_narrowed_joint(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u) * 0.5
    return m.norm(joint.narrow(-1, D, D)) + torch.relu(joint.narrow(-1, 0, D))


def parts_of_an_expanded_parameter(m: Parts, u: Tensor) -> Tensor:
    """A view of a parameter that others read raw is done again, once for both of its parts."""
    token = m.joint.bias[None, None].expand(*u.shape[:2], 3 * D)
    q, k, v = token.chunk(3, dim=-1)
    return m.norm(q) + m.other(k) * torch.relu(v) + torch.relu(token * u[..., :1]).sum(-1, keepdim=True)


def single_features_of_a_part(m: Parts, u: Tensor) -> Tensor:
    """A norm over one element has no mean but that element: where it is chosen it becomes zero."""
    q, k, v = m.joint(u).view(2, 5, 3, D).chunk(3, dim=-2)
    return functional.layer_norm(v.unsqueeze(-1), (1,), eps=0.1).squeeze(-1) + q * torch.relu(k)


def overlapping_parts(m: Parts, u: Tensor) -> Tensor:
    """Two norms that share rows: their means are not the same, so one of them has to stay."""
    joint = m.joint(u)
    return m.norm(joint[..., :D]) + m.other(joint[..., 4 : 4 + D])


def part_also_read_raw(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u)
    return m.norm(joint[..., :D]) + torch.relu(joint[..., 4 : 4 + D])


def joint_also_read_raw(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u)
    return m.norm(joint[..., :D]) + torch.relu(joint).sum(-1, keepdim=True)


def part_and_whole(m: Parts, u: Tensor) -> Tensor:
    """A norm over the whole and one over a part of it: a shift of the whole is one of the part."""
    joint = m.joint(u)[..., : 2 * D]
    return m.wide_norm(joint).sum(-1, keepdim=True) + m.norm(joint[..., :D])


def number_added_to_the_joint(m: Parts, u: Tensor) -> Tensor:
    joint = m.joint(u) + 0.5
    return m.norm(joint[..., :D]) + torch.relu(joint[..., D : 2 * D])


def part_of_an_activation(m: Parts, u: Tensor) -> Tensor:
    joint = torch.tanh(m.joint(u))
    return m.norm(joint[..., :D]) + m.other(joint[..., D : 2 * D])


def class_token_of_a_stream(m: Parts, u: Tensor) -> Tensor:
    """A cut along the tokens, which no parameter has: all of the stream is centered, and somebody reads the rest."""
    stream = m.one(u)
    return m.norm(stream[:, 0]) + torch.relu(stream[:, 1:]).sum(1)


def message_joined_to_something_raw(m: Parts, u: Tensor) -> Tensor:
    message = m.one(u)
    return m.norm(message) + m.other(message + torch.tanh(m.two(u)))


def shift_passes_several_operations(m: Parts, u: Tensor) -> Tensor:
    message = m.one(u)
    joined = torch.cat((message, torch.tanh(m.two(u))), 1).transpose(0, 1) * 2 + 1
    return m.norm(message).sum(1) + m.other(joined).sum(0) + torch.softmax(joined, -1).sum(0)


def shift_is_seen_behind_the_join(m: Parts, u: Tensor) -> Tensor:
    message = m.one(u)
    joined = message + torch.tanh(m.two(u))
    return m.norm(message) + m.other(joined) + torch.relu(joined)


def filled_zeros(m: Parts, u: Tensor) -> Tensor:
    states = torch.zeros(2, 5, D, dtype=u.dtype)
    for step in range(5):
        states[:, step] = m.one(u[:, step])
    return m.norm(states)


def embedding_overwritten_in_part(m: Parts, u: Tensor) -> Tensor:
    tokens = m.table(torch.arange(5)).repeat(2, 1, 1)
    tokens[:, 1:3] = m.one(u)[:, :2]
    tokens[:, 4] = 0.25
    return m.norm(tokens)


def experts_added_up(m: Parts, u: Tensor) -> Tensor:
    rows = torch.tensor([0, 3, 3, 1])
    combined = torch.zeros(5, D, dtype=u.dtype)
    combined.index_add_(0, rows, m.one(u[0, :4]) * torch.sigmoid(u[0, :4, :1]))
    combined.index_add_(0, rows, m.two(u[1, :4]) * 0.5)
    return m.norm(combined)


def added_to_under_the_old_name(m: Parts, u: Tensor) -> Tensor:
    stream = m.one(u) * 1.0
    stream.add_(m.two(u))
    return m.norm(stream) + m.other(stream[:, :1])


def read_before_and_after(m: Parts, u: Tensor) -> Tensor:
    stream = m.one(u) * 1.0
    before = m.norm(stream)
    stream[:, 0] = m.two(u)[:, 1]
    return before + m.other(stream)


def written_from_itself(m: Parts, u: Tensor) -> Tensor:
    stream = m.one(u) * 1.0
    stream[:, 1:] = stream[:, :-1] * 0.5
    return m.norm(stream)


def written_along_the_features(m: Parts, u: Tensor) -> Tensor:
    stream = m.one(u) * 1.0
    stream[..., :4] = m.two(u)[..., :4]
    return m.norm(stream)


def raw_value_written(m: Parts, u: Tensor) -> Tensor:
    states = torch.zeros(2, 5, D, dtype=u.dtype)
    states[:, 0] = torch.tanh(m.one(u))[:, 0]
    return m.norm(states)


def written_and_seen(m: Parts, u: Tensor) -> Tensor:
    states = torch.zeros(2, 5, D, dtype=u.dtype)
    states[:, 0] = m.one(u)[:, 0]
    return m.norm(states) + torch.relu(states)


def written_through_a_view(m: Parts, u: Tensor) -> Tensor:
    states = torch.zeros(2, 5, D, dtype=u.dtype)
    states[0][1:] = m.one(u)[0, 1:]
    return m.norm(states)


def written_with_its_own_operand(m: Parts, u: Tensor) -> Tensor:
    """With centerings at run time one tensor is exchanged in two places: where it is read, and where it is written."""
    start = torch.tanh(m.one(u))
    stream = torch.cat((start, m.two(u)), 1)
    stream[:, 5:] = start
    return m.norm(stream) + m.other(stream) * m.norm(stream[:, :1])


def part_of_a_shifted_tensor_overwritten(m: Parts, u: Tensor) -> Tensor:
    """What is shifted, not centered, loses its shift in a part of a group: the norm would notice."""
    message = m.one(u)
    joined = message + torch.tanh(m.two(u))
    joined[..., :4] = torch.tanh(u)[..., :4]
    return m.norm(message) + m.other(joined)


def tokens_of_a_shifted_tensor_overwritten(m: Parts, u: Tensor) -> Tensor:
    message = m.one(u)
    joined = message + torch.tanh(m.two(u))
    joined[:, :2] = torch.tanh(m.joint(u))[:, :2, :D]
    joined[:, 3] = message[:, 0]
    return m.norm(message) + m.other(joined)


def loss_of_logits(m: Parts, u: Tensor) -> Tensor:
    """Cross entropy over the classes does not notice a shift of the logits."""
    logits = m.one(u).flatten(0, 1)
    loss = functional.cross_entropy(logits, torch.arange(10) % D, label_smoothing=0.1)
    return m.norm(logits).sum() + loss


def loss_over_other_classes(m: Parts, u: Tensor) -> Tensor:
    """The classes are the second dimension, and the norm goes over the last."""
    logits = m.one(u)
    loss = functional.cross_entropy(logits, torch.arange(2 * D).view(2, D) % 5)
    return m.norm(logits).sum() + loss


def mean_taken_before_a_write(m: Parts, u: Tensor) -> Tensor:
    """No norm, though it looks like one: the mean is that of other values."""
    stream = m.one(u) * 1.0
    mean = stream.mean(-1, keepdim=True)
    stream[:, 0] = m.two(u)[:, 1]
    difference = stream - mean
    return difference * torch.rsqrt(difference.pow(2).mean(-1, keepdim=True) + 1e-5)


# Sites that fold, of all, with parameters alone.
CASES: dict[Callable[[Parts, Tensor], Tensor], tuple[int, int]] = {
    queries_and_keys_by_split: (2, 2),
    queries_alone_by_chunk: (1, 1),
    all_three_by_slices: (3, 3),
    heads_by_unbind: (2, 2),
    heads_interleaved_by_select: (2, 2),
    fewer_keys_than_queries: (1, 1),
    negative_slices: (1, 1),
    every_other_feature: (1, 1),
    channels_of_a_convolution: (1, 1),
    rows_of_a_narrowed_joint: (1, 1),
    parts_of_an_expanded_parameter: (2, 2),
    single_features_of_a_part: (1, 1),
    overlapping_parts: (0, 2),
    part_also_read_raw: (0, 1),
    joint_also_read_raw: (0, 1),
    part_and_whole: (1, 2),
    number_added_to_the_joint: (0, 1),
    part_of_an_activation: (0, 2),
    class_token_of_a_stream: (0, 1),
    message_joined_to_something_raw: (1, 2),
    shift_passes_several_operations: (1, 2),
    shift_is_seen_behind_the_join: (0, 2),
    filled_zeros: (1, 1),
    embedding_overwritten_in_part: (1, 1),
    experts_added_up: (1, 1),
    added_to_under_the_old_name: (2, 2),
    read_before_and_after: (2, 2),
    written_from_itself: (1, 1),
    written_along_the_features: (0, 1),
    raw_value_written: (0, 1),
    written_and_seen: (0, 1),
    written_through_a_view: (0, 1),
    written_with_its_own_operand: (0, 3),
    part_of_a_shifted_tensor_overwritten: (0, 2),
    tokens_of_a_shifted_tensor_overwritten: (1, 2),
    loss_of_logits: (1, 1),
    loss_over_other_classes: (0, 1),
    mean_taken_before_a_write: (0, 0),
}


def compile_and_compare(function: Callable[[Parts, Tensor], Tensor], assist: str) -> tuple[float, lncompile.FoldReport]:
    model = randomise(Parts(function).double())
    value = torch.randn(2, 5, 7, dtype=torch.float64) + 0.5
    compiled = torch.compile(model, backend="lnfold", options={"lnfold.assist": assist}, fullgraph=True)
    error = relative_error(compiled(value), model(value))
    reports = lncompile.reports(compiled)
    return error, reports[0] if reports else lncompile.FoldReport(())


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_counts_and_exactness(function: Callable[[Parts, Tensor], Tensor]) -> None:
    error, report = compile_and_compare(function, assist="off")
    assert error <= 1e-12
    assert (report.folded, report.total) == CASES[function], str(report)
    error, _ = compile_and_compare(function, assist="auto")
    assert error <= 1e-12


@pytest.mark.parametrize("function", [f for f, (folded, _) in CASES.items() if folded], ids=lambda f: f.__name__)
def test_control_without_centering_outputs_change(
    function: Callable[[Parts, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(center, "center_weight", lambda weight, axes, dtype: weight.to(torch.float64).to(dtype))
    error, _ = compile_and_compare(function, assist="off")
    assert error > 1e-4


class WrittenAtRows(nn.Module):
    """Rows of a tensor of fixed size are written, at indices whose number changes from call to call."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Linear(7, D), nn.LayerNorm(D)

    def forward(self, value: Tensor, rows: Tensor) -> Tensor:
        states = torch.zeros(24, D, dtype=value.dtype)
        states[rows] = self.one(value)
        return self.norm(states)


def test_assignment_at_an_index_of_dynamic_shape() -> None:
    model = randomise(WrittenAtRows().double())
    compiled = torch.compile(model, backend="lnfold", dynamic=True, fullgraph=True)
    for count in (5, 6, 9):
        value, rows = torch.randn(count, 7, dtype=torch.float64), torch.randperm(24)[:count]
        assert relative_error(compiled(value, rows), model(value, rows)) <= 1e-12
    assert lncompile.reports(compiled)


def test_parts_of_a_view_of_a_parameter_at_a_dynamic_size() -> None:
    """What is done again for its parts depends on the call, so it is no weight to be computed once."""
    model = randomise(Parts(parts_of_an_expanded_parameter).double())
    compiled = torch.compile(model, backend="lnfold", dynamic=True, fullgraph=True)
    for batch in (2, 3, 4):
        value = torch.randn(batch, 5, 7, dtype=torch.float64)
        assert relative_error(compiled(value), model(value)) <= 1e-12
    (report,) = lncompile.reports(compiled)
    assert report.folded == 2


def test_a_part_of_a_parameter_beside_a_dimension_of_unknown_size() -> None:
    """Dynamic: what is taken has nine rows, and so has the stream, but one says 9 and the other (s + 1)²."""

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.ConvTranspose2d(4, 12, 2), nn.LayerNorm(6)
            self.positions = nn.Parameter(torch.randn(10, 12))

        def forward(self, image: Tensor) -> Tensor:
            stream = self.convolution(image).flatten(2).transpose(1, 2)
            return self.norm((stream + self.positions.narrow(0, 1, 9)).unflatten(-1, (2, -1)))

    model = randomise(Image().double())
    image = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    compiled = torch.compile(model, backend="lnfold", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(image), model(image), rtol=1e-12, atol=1e-12)
