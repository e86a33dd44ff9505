"""An engine's model is loaded folded: where tensors go, what is centered, which norms change, what is refused."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from stand_in_engine import Engine
from torch import Tensor, nn

import lncompile
from lncompile.engines.architecture import Architecture, Unfit
from lncompile.engines.fitting import Fit, fit
from lncompile.engines.norm_modules import obstacle_of, replacement
from lncompile.engines.probe import problem_with, put
from lncompile.engines.routes import StoredForm, find_routes
from lncompile.engines.weight_stream import CenteredWeights
from lncompile.models.random_weights import randomise
from lncompile.nn import CenteredEmbedding
from lncompile.plans.entries import PlanError

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 17, 33, 2]])


def config(**other: Any) -> Any:
    return transformers.OPTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=48,
        vocab_size=64,
        word_embed_proj_dim=32,
        max_position_embeddings=32,
        architectures=["OPTForCausalLM"],
        **other,
    )


def checkpoint(of: Any) -> dict[str, Tensor]:
    model = randomise(transformers.OPTForCausalLM(of)).double()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if of.tie_word_embeddings:
        del tensors["lm_head.weight"]  # as save_pretrained leaves it out
    return tensors


@functools.cache
def architecture(tied: bool = True) -> Architecture:
    return Architecture.of(config(tie_word_embeddings=tied))


def forms(tensors: dict[str, Tensor]) -> dict[str, StoredForm]:
    return {name: StoredForm(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def fitted(of: Architecture, engine: nn.Module, tensors: dict[str, Tensor]) -> Fit:
    stored = forms(tensors)
    return fit(
        of,
        engine,
        stored,
        lambda: find_routes(engine, engine.load_weights, stored),
        obstacle_of,
        lambda module: isinstance(module, nn.Embedding),
    )


def make_norm(module: nn.Module) -> nn.Module:
    return lncompile.nn.RMSNorm.in_place_of(module)


def load_folded(engine: nn.Module, tensors: dict[str, Tensor], found: Fit) -> dict[str, tuple[nn.Module, nn.Module]]:
    centered = CenteredWeights(found.center)
    engine.load_weights(centered(tensors.items()))
    centered.require_all()
    norms = {path: engine.get_submodule(path) for path in found.norms}
    exchanged = {path: (norm, replacement(norm, make_norm)) for path, norm in norms.items()}
    put(engine, {path: folded for path, (_, folded) in exchanged.items()})
    put(engine, {path: CenteredEmbedding.in_place_of(engine.get_submodule(path)) for path in found.lookups})
    return exchanged


@pytest.mark.parametrize("tied", [True, False])
def test_an_engine_answers_as_it_would(tied: bool) -> None:
    of = config(tie_word_embeddings=tied)
    tensors = checkpoint(of)
    stock, folded = Engine(of).double(), Engine(of).double()
    stock.load_weights(tensors.items())
    found = fitted(architecture(tied), folded, tensors)
    exchanged = load_folded(folded, tensors, found)
    assert (len(found.norms), found.total, dict(found.stays)) == (5, 5, {})
    assert len(found.lookups) == int(tied)
    classes = Counter(type(module).__name__ for module in folded.modules())
    assert (classes["RMSNorm"], classes["LayerNorm"]) == (5, 0)
    torch.testing.assert_close(folded(IDS)[0], stock(IDS)[0], rtol=1e-10, atol=1e-10)
    streams = (*found.streams, *found.lookups)
    # Both embeddings, and the projections back into the stream.
    assert len(streams) == 2 + 2 * 2
    assert problem_with(folded, exchanged, streams, lambda: folded(IDS)) == ""


def test_without_centering_an_engine_answers_otherwise() -> None:
    of = config()
    tensors = checkpoint(of)
    stock, wrong = Engine(of).double(), Engine(of).double()
    stock.load_weights(tensors.items())
    found = fitted(architecture(), wrong, tensors)
    wrong.load_weights(tensors.items())
    norms = {path: wrong.get_submodule(path) for path in found.norms}
    exchanged = {path: (norm, make_norm(norm)) for path, norm in norms.items()}
    put(wrong, {path: folded for path, (_, folded) in exchanged.items()})
    assert (wrong(IDS)[0] - stock(IDS)[0]).abs().max() > 1e-2
    assert "has a mean of" in problem_with(wrong, exchanged, found.streams, lambda: wrong(IDS))


def test_where_tensors_go_is_asked_without_values() -> None:
    of = config()
    tensors = checkpoint(of)
    engine = randomise(Engine(of))
    before = {name: value.clone() for name, value in engine.state_dict().items()}
    loaders = {name: getattr(value, "weight_loader", None) for name, value in engine.named_parameters()}
    routes = find_routes(engine, engine.load_weights, forms(tensors))
    assert set(routes) == set(tensors)
    assert routes["model.decoder.layers.1.self_attn.k_proj.weight"] == {"decoder.blocks.1.attention.qkv.weight"}
    assert routes["model.decoder.embed_tokens.weight"] == {"decoder.embed_tokens.weight", "head.weight"}
    assert {name: getattr(value, "weight_loader", None) for name, value in engine.named_parameters()} == loaders
    for name, value in engine.state_dict().items():
        assert torch.equal(value, before[name])


def test_code_that_copies_by_itself_is_followed() -> None:
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def load_weights(self, weights: Any) -> None:
            for _, tensor in weights:
                self.layer.weight.data[:2].copy_(tensor.t())

    engine = Direct()
    routes = find_routes(engine, engine.load_weights, {"stored": StoredForm((4, 2), torch.float32)})
    assert routes == {"stored": {"layer.weight"}}


def test_code_that_needs_values_is_refused() -> None:
    engine = nn.Linear(4, 4)
    with pytest.raises(Unfit, match="where its tensors go is not known"):
        find_routes(
            engine,
            lambda weights: [float(tensor.sum()) for _, tensor in weights],
            {"stored": StoredForm((4,), torch.float32)},
        )


def _gone(tensors: dict[str, Tensor]) -> None:
    del tensors["model.decoder.layers.1.fc2.weight"]


def _of_8_bits(tensors: dict[str, Tensor]) -> None:
    tensors["model.decoder.layers.0.fc2.weight"] = torch.zeros(32, 48, dtype=torch.float8_e4m3fn)


def _packed(tensors: dict[str, Tensor]) -> None:
    tensors["model.decoder.layers.0.fc2.weight"] = torch.zeros(32, 6, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "words"), [(_gone, "lacks 1 of"), (_of_8_bits, "float8_e4m3fn"), (_packed, r"in shape \[32, 6\]")]
)
def test_a_checkpoint_that_cannot_be_centered_is_refused_before_anything_is_read(change: Any, words: str) -> None:
    of = config()
    tensors = checkpoint(of)
    change(tensors)
    with pytest.raises(Unfit, match=words):
        fitted(architecture(), Engine(of), tensors)


def test_an_engine_that_ties_what_the_plan_does_not_is_refused() -> None:
    tensors = checkpoint(config(tie_word_embeddings=False))
    del tensors["lm_head.weight"]
    with pytest.raises(Unfit, match=r"goes to 'decoder.embed_tokens.weight' and 'head.weight'"):
        fitted(architecture(tied=False), Engine(config()), tensors)


def test_an_engine_that_does_not_load_a_tensor_is_refused() -> None:
    of = config()
    engine, tensors = Engine(of), checkpoint(of)
    load = engine.load_weights
    engine.load_weights = lambda weights: load((name, t) for name, t in weights if "layers.1.fc2" not in name)
    with pytest.raises(Unfit, match="goes to no parameter"):
        fitted(architecture(), engine, tensors)


def test_a_norm_of_another_kind_stays() -> None:
    class TwoNorms(nn.LayerNorm):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 0.1 * input

    of = config()
    engine, tensors = Engine(of), checkpoint(of)
    engine.decoder.blocks[1].final_layer_norm = TwoNorms(32)
    found = fitted(architecture(), engine, tensors)
    assert len(found.norms) == 4
    (reason,) = found.stays.values()
    assert "computes something else than a LayerNorm" in reason


def test_the_stream_must_be_read_by_norms_alone() -> None:
    of = config(tie_word_embeddings=False)
    tensors = checkpoint(of)
    engine = Engine(of, reads_stream=True).double()
    found = fitted(architecture(tied=False), engine, tensors)
    exchanged = load_folded(engine, tensors, found)
    problem = problem_with(engine, exchanged, found.streams, lambda: engine(IDS))
    assert problem.startswith("something else than norms reads its streams: result 1 differs")
    # The control: an engine that scales what it looks up is as right as one that does not.
    scaled = Engine(of, scale=3.0).double()
    exchanged = load_folded(scaled, tensors, found)
    assert problem_with(scaled, exchanged, found.streams, lambda: scaled(IDS)) == ""


def test_norms_that_no_trial_reaches_are_a_problem() -> None:
    of = config(tie_word_embeddings=False)
    tensors = checkpoint(of)
    engine = Engine(of).double()
    found = fitted(architecture(tied=False), engine, tensors)
    exchanged = load_folded(engine, tensors, found)
    assert problem_with(engine, exchanged, (), lambda: [engine.head(torch.ones(1, 32).double())]).startswith("5 of 5")


def test_new_weights_that_arrive_later_are_centered_too() -> None:
    of = config(tie_word_embeddings=False)
    tensors, later = checkpoint(of), {name: value * 1.5 + 0.1 for name, value in checkpoint(of).items()}
    stock, folded = Engine(of).double(), Engine(of).double()
    found = fitted(architecture(tied=False), folded, tensors)
    load_folded(folded, tensors, found)
    stock.load_weights(later.items())
    centered = CenteredWeights(found.center)
    for name, value in later.items():  # one by one, as they are sent while an engine runs
        kept = value.clone()
        folded.load_weights(centered([(name, value)]))
        assert torch.equal(value, kept)
    torch.testing.assert_close(folded(IDS)[0], stock(IDS)[0], rtol=1e-10, atol=1e-10)


def test_what_did_not_come_by_is_noticed() -> None:
    of = config()
    tensors = checkpoint(of)
    centered = CenteredWeights(fitted(architecture(), Engine(of), tensors).center)
    names = list(tensors)
    dict(centered((name, tensors[name]) for name in names[:-3]))
    with pytest.raises(PlanError, match="folded in part"):
        centered.require_all()
    with pytest.raises(PlanError, match="was to be centered"):
        dict(centered([("model.decoder.layers.0.fc2.weight", torch.zeros(2, 2))]))


def test_plans_that_change_tensors_together_are_refused() -> None:
    of = config()
    absorbing = Architecture.of(of, absorb="bias")
    assert absorbing.plan.absorb
    with pytest.raises(Unfit, match="arrive one by one"):
        fitted(absorbing, Engine(of), checkpoint(of))
    scaled = dataclasses.replace(architecture().plan.center[0], scaled_by=("model.decoder.layers.0.fc1.bias",))
    scaling = Architecture(architecture().model, dataclasses.replace(architecture().plan, center=(scaled,)))
    with pytest.raises(Unfit, match="arrive one by one"):
        fitted(scaling, Engine(of), checkpoint(of))


def test_a_norm_that_hands_on_is_replaced_by_one_that_does() -> None:
    class Pair(nn.LayerNorm):
        def forward(self, input: Tensor, residual: Any = None) -> Any:
            return super().forward(input), residual

    module = randomise(Pair(16))
    assert obstacle_of(module) == ""
    norm = replacement(module, make_norm)
    values = torch.randn(3, 16)
    values = values - values.mean(-1, keepdim=True)
    output, residual = norm(values, "handed on")
    torch.testing.assert_close(output, module(values)[0])
    assert residual == "handed on"
    assert isinstance(norm, lncompile.nn.RMSNorm)
    assert norm.weight is module.weight
