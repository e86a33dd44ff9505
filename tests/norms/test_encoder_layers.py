"""``nn.TransformerEncoder`` in eval mode: one opaque operator a layer with the norms inside, masked and not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import randomise
from graphs import capture, capture_all
from torch import Tensor, nn

import lncompile
from lncompile import Reason
from lncompile.backend import lnfold
from lncompile.lowering import torch_private
from lncompile.lowering.target import compiled_for
from lncompile.passes.norms.expand import closed_norms, find_opaque_layers, transformer_encoder_layer
from lncompile.verification import relative_error

D, HEADS, BATCH, LENGTH = 12, 2, 3, 5


def layer(activation: str = "gelu", norm_first: bool = True, batch_first: bool = True, heads: int = HEADS) -> nn.Module:
    return nn.TransformerEncoderLayer(
        D, heads, 16, activation=activation, batch_first=batch_first, norm_first=norm_first, layer_norm_eps=1e-3
    )


# --- the operator -----------------------------------------------------------------------------------------------------

CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
PADDING = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
FIRST_ITEM_HIDDEN = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
ONE_ROW_HIDDEN = CAUSAL | (torch.arange(LENGTH) == 2)[:, None]


def scores(hidden: Tensor) -> Tensor:
    """The mask as it is usually added to the scores."""
    return torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, float("-inf"))


def merged(padding: Tensor) -> Tensor:
    return (CAUSAL | padding[:, None, None, :]).expand(BATCH, HEADS, LENGTH, LENGTH)


MASKS: dict[str, tuple[Tensor | None, int | None]] = {
    "none": (None, None),
    "none_of_a_type": (None, 1),
    "positions": (CAUSAL, 0),
    "positions_as_scores": (scores(CAUSAL), 0),
    "nothing_hidden": (torch.zeros_like(CAUSAL), 0),
    "finite_biases": (torch.randn(LENGTH, LENGTH, dtype=torch.float64), 0),
    "a_finite_bias_and_zeros": (scores(CAUSAL).masked_fill(CAUSAL.T, 0.25), 0),
    "a_row_hidden": (ONE_ROW_HIDDEN, 0),
    "a_row_hidden_as_scores": (scores(ONE_ROW_HIDDEN), 0),
    "keys": (PADDING, 1),
    "keys_as_scores": (scores(PADDING), 1),
    "keys_of_an_item_hidden": (FIRST_ITEM_HIDDEN, 1),
    "all": (merged(PADDING), 2),
    "all_as_scores": (scores(merged(PADDING)), 2),
    "all_keys_of_an_item_hidden": (merged(FIRST_ITEM_HIDDEN), 2),
    "all_of_a_type_by_head": ((torch.rand(BATCH, HEADS, LENGTH, LENGTH) > 0.6), 2),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_what_is_written_out_is_the_operator(name: str, activation: str, norm_first: bool) -> None:
    """Exactly in float64, the NaN of a query that may look at nothing included."""
    module = randomise(layer(activation, norm_first).double())
    a = module.self_attn
    value = torch.randn(BATCH, LENGTH, D, dtype=torch.float64)
    arguments = (
        value, D, HEADS, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias, activation == "gelu",
        norm_first, 1e-3, module.norm1.weight, module.norm1.bias, module.norm2.weight, module.norm2.bias,
        module.linear1.weight, module.linear1.bias, module.linear2.weight, module.linear2.bias, *MASKS[name],
    )  # fmt: skip
    expected = torch_private.TRANSFORMER_ENCODER_LAYER_FORWARD(*arguments)
    actual = transformer_encoder_layer(*arguments)
    assert torch.equal(actual.isnan(), expected.isnan())
    seen = ~expected.isnan()
    hidden = {"finite_biases": 1.0, "a_row_hidden": 0.2, "a_row_hidden_as_scores": 0.2}
    assert expected.isnan().double().mean() == pytest.approx(
        1 / 3 if "item" in name else hidden.get(name, expected.isnan().double().mean().item())
    )
    if seen.any():
        assert relative_error(actual[seen], expected[seen]) <= 1e-12


# --- models -----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A stream out of a linear layer, two encoder layers, a norm at the end."""

    def __init__(self, batch_first: bool = True, nested: bool = False, norm: bool = True, **options: Any) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(7, D), nn.Linear(D, 3)
        self.encoder = nn.TransformerEncoder(
            layer(batch_first=batch_first, **options), 2, nn.LayerNorm(D) if norm else None, enable_nested_tensor=nested
        )

    def forward(self, value: Tensor, **masks: Any) -> Tensor:
        return self.head(self.encoder(self.stem(value), **masks))


CALLS: dict[str, dict[str, Any]] = {
    "no_mask": {},
    "padding": {"src_key_padding_mask": PADDING},
    "mask": {"mask": CAUSAL, "is_causal": False},
    "causal": {"mask": CAUSAL, "is_causal": True},
    "both": {"mask": CAUSAL, "src_key_padding_mask": PADDING, "is_causal": False},
}


def inputs(batch_first: bool = True) -> Tensor:
    value = torch.randn(BATCH, LENGTH, 7, dtype=torch.float64)
    return value if batch_first else value.transpose(0, 1).contiguous()


def run(model: nn.Module, value: Tensor, **masks: Any) -> list[lncompile.FoldReport]:
    """Compile, compare with what the captured graph itself gives (as stock torch.compile would), return the reports."""
    backend = functools.partial(lnfold, options={"lnfold.assist": "off"})
    call = capture_all(model, backend, value=value, **masks)
    (graph,) = call.graphs
    (expected,) = graph.graph_module(*graph.example_inputs)
    assert relative_error(call.result, expected) <= 1e-12
    assert relative_error(call.result, model(value, **masks)) <= 1e-12
    return lncompile.reports(call.compiled)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_pre_norm_encoder_folds_wholly(call: str, batch_first: bool, activation: str, without_inductor: None) -> None:
    model = randomise(Encoder(batch_first, activation=activation).double()).eval()
    (report,) = run(model, inputs(batch_first), **CALLS[call])
    assert (report.total, report.folded) == (5, 5), str(report)
    assert {site.name for site in report.sites} == {
        "encoder.layers.0.norm1", "encoder.layers.0.norm2", "encoder.layers.1.norm1", "encoder.layers.1.norm2",
        "encoder.norm",
    }  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "sequence_first"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_post_norm_encoder_is_reported_and_left(
    call: str, batch_first: bool, activation: str, without_inductor: None
) -> None:
    model = randomise(Encoder(batch_first, norm_first=False, norm=False, activation=activation).double()).eval()
    (report,) = run(model, inputs(batch_first), **CALLS[call])
    assert (report.total, report.folded) == (4, 0)
    assert all(site.detail and site.reason is not None for site in report.sites)


@pytest.mark.parametrize("call", ["no_mask", "both"])
def test_without_inductor_is_no_excuse(call: str) -> None:
    """No mask, and every kind of mask at once."""
    model = randomise(Encoder().float()).eval()
    value = inputs().float()
    compiled = torch.compile(model, backend="lnfold")
    assert relative_error(compiled(value, **CALLS[call]), model(value, **CALLS[call])) <= 1e-5
    assert sum(report.folded for report in lncompile.reports(compiled)) == 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_stays_one_operator_where_that_is_faster(dtype: torch.dtype, without_inductor: None) -> None:
    """In 16 bits on a CPU; compiled for a GPU it is written out."""
    model = randomise(Encoder().double()).eval().to(dtype)
    is_narrow = dtype.itemsize == 2
    with torch.no_grad():
        report = lncompile.explain(model, inputs().to(dtype))
        assert (report.total, report.folded) == (5, 0 if is_narrow else 5), str(report)
        closed = [site for site in report.sites if "faster in 16 bits on a CPU" in site.detail]
        assert [site.name.rpartition(".")[2] for site in closed] == ["norm1", "norm2"] * (2 * is_narrow)
        with compiled_for(torch.device("cuda")):
            assert lncompile.explain(model, inputs().to(dtype)).folded == 5


def test_encoder_layer_alone_with_the_masks_it_takes(without_inductor: None) -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer, self.norm = nn.Linear(7, D), layer(), nn.LayerNorm(D)

        def forward(self, value: Tensor, **masks: Tensor) -> Tensor:
            return self.norm(self.layer(self.stem(value), **masks))

    model = randomise(Alone().double()).eval()
    for masks in ({}, {"src_mask": CAUSAL}, {"src_key_padding_mask": PADDING},
                  {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}):  # fmt: skip
        (report,) = run(model, inputs(), **masks)
        assert (report.total, report.folded) == (3, 3)


def test_an_odd_number_of_heads_goes_another_way(without_inductor: None) -> None:
    model = randomise(Encoder(heads=3).double()).eval()
    (report,) = run(model, inputs(), src_key_padding_mask=PADDING)
    assert (report.total, report.folded) == (5, 5)


def test_nested_tensors_are_not_made_while_compiling(without_inductor: None) -> None:
    """With padding at the end eager packs the batch into a nested tensor and fills the padding with zeros.

    torch.compile does not take that way, with any backend; where nothing is padded the values are the same.
    """
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]], dtype=torch.bool)
    model = randomise(Encoder(nested=True, norm_first=False, norm=False).double()).eval()
    value = inputs()
    compiled = torch.compile(model, backend="lnfold")
    actual, expected = compiled(value, src_key_padding_mask=padding), model(value, src_key_padding_mask=padding)
    assert relative_error(actual[~padding], expected[~padding]) <= 1e-12
    assert [(report.total, report.folded) for report in lncompile.reports(compiled)] == [(4, 0)]


def test_a_mask_whose_causality_is_asked_for_is_not_compiled_at_all(without_inductor: None) -> None:
    """``is_causal=None`` makes the encoder read the mask's values: torch.compile runs it eagerly."""
    model = randomise(Encoder().double()).eval()
    value = inputs()
    compiled = torch.compile(model, backend="lnfold")
    assert relative_error(compiled(value, mask=CAUSAL), model(value, mask=CAUSAL)) <= 1e-12
    assert sum(report.total for report in lncompile.reports(compiled)) == 0


def test_what_cannot_be_written_out_is_reported_with_a_reason(
    without_inductor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lncompile.passes.norms import expand

    monkeypatch.setattr(expand, "_MASK_RANKS", {0: 2})
    model = randomise(Encoder().double()).eval()
    (report,) = run(model, inputs(), src_key_padding_mask=PADDING)
    assert (report.total, report.folded) == (5, 0)
    inside = [site for site in report.sites if site.name != "encoder.norm"]
    assert {site.reason for site in inside} == {Reason.UNKNOWN_OPERATION}
    assert all("mask of type 1" in site.detail for site in inside)
    assert [site.name for site in report.sites[:2]] == ["encoder.layers.0.norm1", "encoder.layers.0.norm2"]


def test_operator_overload_and_keywords(without_inductor: None) -> None:
    module = randomise(layer().double()).eval()
    a = module.self_attn

    def function(value: Tensor, mask: Tensor, operator: Callable[..., Tensor]) -> Tensor:
        return operator(
            value, D, HEADS, a.in_proj_weight, a.in_proj_bias, a.out_proj.weight, a.out_proj.bias, True, True, 1e-3,
            module.norm1.weight, module.norm1.bias, module.norm2.weight, module.norm2.bias, module.linear1.weight,
            module.linear1.bias, module.linear2.weight, module.linear2.bias, mask_type=1, mask=mask,
        )  # fmt: skip

    for operator in (torch_private.TRANSFORMER_ENCODER_LAYER_FORWARD, torch_private.TRANSFORMER_ENCODER_LAYER):
        captured = capture(function, torch.randn(BATCH, LENGTH, D, dtype=torch.float64), PADDING, operator)
        assert len(find_opaque_layers(captured.graph_module.graph)) == 1
        assert not closed_norms(captured.graph_module.graph)
        assert len(captured.analyse().verdicts) == 2
