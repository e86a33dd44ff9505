"""Models by name: where weights come from, what is called with what, and what is said where a model cannot be had."""

import sys

import pytest
import torch
import transformers
from command_line import assert_refused
from torch import nn

from lncompile.models.factories import ModelError
from lncompile.models.loading import load_model, randomise

TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY))).save_pretrained(path)
    return path


# --- Models that cannot be had ---------------------------------------------------------------------------------------


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused("gpt2", says=('pip install "lncompile[demo]"',))


def test_a_folder_without_config(tmp_path):
    assert_refused(
        str(tmp_path),
        says=(
            str(tmp_path),
            "config.json",
        ),
    )


def test_a_folder_that_does_not_exist(tmp_path):
    assert_refused(str(tmp_path / "nothing"), says=("no folder",))


def test_a_hub_id_while_offline():
    assert_refused(
        "nobody/no-such-model",
        says=(
            "nobody/no-such-model",
            "cannot be reached",
        ),
    )


def test_a_name_that_no_model_can_have():
    assert_refused("no such name!", says=("there is no model 'no such name!'",))


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nothing-of-the-kind"}'])
def test_a_config_that_cannot_be_read(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert_refused(str(tmp_path), says=("cannot be loaded",))


def test_weights_that_cannot_be_read(folder, tmp_path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert_refused(str(tmp_path), says=("cannot be loaded",))


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_refused("gpt2", says=("no-such-compiler",))


# --- Loading ---------------------------------------------------------------------------------------------------------


def test_weights_come_from_the_folder(folder):
    loaded = load_model(str(folder))
    saved = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert isinstance(loaded.model, transformers.GPT2LMHeadModel)
    assert not loaded.model.training
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, saved.get_parameter(name))


def test_a_folder_with_only_a_config_gets_random_weights_the_same_each_time(tmp_path):
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    first, second = load_model(str(tmp_path)), load_model(str(tmp_path))
    assert "random weights" in first.description
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61}
VISION = {**TEXT, "image_size": 32, "patch_size": 8}
WHISPER = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
           "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 16,
           "max_source_positions": 20, "max_target_positions": 32, "vocab_size": 61, "pad_token_id": 0,
           "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


@pytest.mark.parametrize(
    ("architecture", "config", "inputs"),
    [
        ("BertForMaskedLM", transformers.BertConfig(**TEXT), {"input_ids"}),
        ("ViTForImageClassification", transformers.ViTConfig(**VISION), {"pixel_values"}),
        ("CLIPModel", transformers.CLIPConfig(text_config=TEXT, vision_config=VISION), {"input_ids", "pixel_values"}),
        ("WhisperForConditionalGeneration", transformers.WhisperConfig(**WHISPER),
         {"input_features", "decoder_input_ids"}),
    ],
)  # fmt: skip
def test_the_class_a_config_names_is_built_and_called(architecture, config, inputs, tmp_path):
    config.architectures = [architecture]
    config.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded.model).__name__ == architecture
    assert {name for name, value in loaded.inputs.items() if isinstance(value, torch.Tensor)} == inputs


def test_a_config_without_a_class_falls_back_to_the_bare_model(tmp_path):
    transformers.Dinov2Config(**VISION).save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path)).model).__name__ == "Dinov2Model"


def test_a_model_whose_inputs_cannot_be_made_up_is_refused(tmp_path):
    config = transformers.Wav2Vec2Config(**TEXT, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=4)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="input_values"):
        load_model(str(tmp_path))


def test_randomise_leaves_nothing_at_its_initial_value():
    model = nn.Sequential(nn.Embedding(61, 32), nn.Linear(32, 48), nn.LayerNorm(48))
    before = [parameter.clone() for parameter in model.parameters()]
    randomise(model)
    for old, new in zip(before, model.parameters(), strict=True):
        assert (old != new).all()
        assert new.mean().abs() > 1e-3
        assert torch.isfinite(new).all()
