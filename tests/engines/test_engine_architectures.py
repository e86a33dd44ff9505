"""Plans of architectures from their configs, as an engine asks for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import vllm_models

from lncompile.engines.architecture import Architecture, Unfit, example_media
from lncompile.engines.fitting import require_folds

#: How many norms fold, of how many; how many embeddings are centered behind their look-up.
EXPECTED = {
    "opt": (7, 7, 1),
    "opt-untied": (7, 7, 0),
    "opt-post-norm": (0, 6, 0),
    "gpt2": (7, 7, 1),
    "bloom": (0, 8, 0),
    "gpt-neox": (7, 7, 0),
    "falcon": (7, 7, 1),
    "stablelm": (7, 7, 0),
    "phi": (4, 4, 0),
    "starcoder2": (7, 7, 1),
    "cohere": (4, 4, 1),
    "llama": (0, 0, 0),
    "whisper": (10, 15, 1),
    "paligemma": (5, 5, 0),
}


def config_of(name: str) -> Any:
    config = vllm_models.CONFIGS[name]()
    config.architectures = [vllm_models.class_of(config, name).__name__]
    return config


@pytest.mark.parametrize("name", EXPECTED)
def test_plans_of_configs(name: str) -> None:
    config = config_of(name)
    before = config.to_dict()
    plan = Architecture.of(config).plan
    assert (plan.folded, plan.total, len(plan.lookups)) == EXPECTED[name]
    assert config.to_dict() == before
    if EXPECTED[name][0] == 0:
        words = "it has no LayerNorm" if name == "llama" else "none of its"
        with pytest.raises(Unfit, match=words):
            require_folds(plan)
    else:
        require_folds(plan)


def test_the_attention_of_an_engine_is_not_needed() -> None:
    config = config_of("gpt-neox")
    config._attn_implementation = "vllm"
    assert Architecture.of(config).plan.folded == 7
    assert config._attn_implementation == "vllm"


@pytest.mark.parametrize(("names", "words"), [(["StrangerForCausalLM"], "StrangerForCausalLM"), ([], "of its config")])
def test_unknown_architectures_are_refused(names: list[str], words: str) -> None:
    config = transformers.GPT2Config(architectures=names)
    with pytest.raises(Unfit, match=words):
        Architecture.of(config)


def test_names_are_those_that_transformers_gives_a_checkpoint() -> None:
    architecture = Architecture.of(config_of("paligemma"))
    stored = "vision_tower.vision_model.encoder.layers.0.layer_norm1.weight"
    assert architecture.names_of([stored])[stored] in architecture.plan.form.tensors


def test_what_models_are_given_besides_tokens() -> None:
    assert not example_media(config_of("opt"))
    assert {n: tuple(v.shape) for n, v in example_media(config_of("whisper")).items()} == {
        "input_features": (1, 16, 3000)
    }
    media = example_media(config_of("paligemma"))
    assert tuple(media["pixel_values"].shape) == (1, 3, 28, 28)
    assert torch.equal(media["pixel_values"], example_media(config_of("paligemma"))["pixel_values"])
