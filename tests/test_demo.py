"""The demo, end to end on a tiny model, and what it says to someone who asks for a model that cannot be had."""

import json
import sys

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters

from lncompile import demo
from lncompile.factories import ModelError
from lncompile.models import load_model, randomise
from lncompile.processes import RepeatedTimings
from lncompile.report import FoldReport
from lncompile.timing import PairedTimings
from lncompile.verification import OutputError, Verification

TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY))).save_pretrained(path)
    return path


@pytest.fixture
def one_thread():
    """Two threads on a machine shared with others wait for each other far longer than a tiny model takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_refused(capsys, arguments, *words):
    """Exit code 2, one sentence on stderr with these words in it, and no traceback."""
    assert demo.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for word in words:
        assert word in error


# --- End to end ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_the_demo_runs_on_a_local_folder(folder, tmp_path, capsys):
    counters.clear()
    written = tmp_path / "found.json"
    assert demo.main(["--model", str(folder), "--seconds", "0.5", "--json", str(written)]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 LayerNorms folded" in printed
    assert "transformer.h.0-1.ln_2" in printed
    found = json.loads(written.read_text())
    assert found["sentence"] in printed
    assert (found["explain"]["folded"], found["explain"]["total"]) == (5, 5)
    assert found["verify"]["passed"]
    (process,) = found["timing"]["processes"]
    assert len(process["lnfold"]["samples_s"]) == len(process["inductor"]["samples_s"]) >= 15
    assert found["speedup_over_inductor"]["lnfold"]["low"] <= found["speedup_over_inductor"]["lnfold"]["high"]
    # Verified once, and compiled once more on even terms with what it is compared with.
    assert counters["lnfold"]["graphs"] == 2


def test_worse_predictions_end_with_exit_code_1_and_no_timing(folder, monkeypatch, capsys):
    worse = Verification((OutputError(".logits", "float32", 1e-7, 1e-7, 1e-2, True),))
    monkeypatch.setattr(demo, "verify", lambda *_, **__: worse)
    assert demo.main(["--model", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "predictions got worse" in printed
    assert "Latency" not in printed


def test_a_model_without_layer_norms_is_said_to_be_left_as_it_is(tmp_path, capsys):
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=61
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert demo.main(["--model", str(tmp_path)]) == 0
    assert "The model has no LayerNorm" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "caveat"), [(0.0, False), (1000.0, True), (None, False)])
def test_latency_measured_on_a_busy_machine_is_not_to_be_relied_on(load, caveat, folder):
    found = demo.Demonstration(
        load_model(str(folder)),
        {"load_average": load},
        FoldReport(()),
        Verification((OutputError(".logits", "float32", 1e-7, 1e-7, 1e-7, True),)),
        RepeatedTimings((PairedTimings(dict.fromkeys(("eager", "inductor", "lnfold"), (1.0, 1.1, 1.2))),)),
    )
    assert "no measurable difference" in found.sentence()
    assert ("not to be relied on" in found.sentence()) == caveat


# --- Models that cannot be had ---------------------------------------------------------------------------------------


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(capsys, [], 'pip install "lncompile[demo]"')


def test_a_folder_without_config(tmp_path, capsys):
    assert_refused(capsys, ["--model", str(tmp_path)], str(tmp_path), "config.json")


def test_a_folder_that_does_not_exist(tmp_path, capsys):
    assert_refused(capsys, ["--model", str(tmp_path / "nothing")], "no folder")


def test_a_hub_id_while_offline(capsys):
    assert_refused(capsys, ["--model", "nobody/no-such-model"], "nobody/no-such-model", "cannot be reached")


def test_a_name_that_no_model_can_have(capsys):
    assert_refused(capsys, ["--model", "no such name!"], "there is no model 'no such name!'")


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "nothing-of-the-kind"}'])
def test_a_config_that_cannot_be_read(content, tmp_path, capsys):
    (tmp_path / "config.json").write_text(content)
    assert_refused(capsys, ["--model", str(tmp_path)], "cannot be loaded")


def test_weights_that_cannot_be_read(folder, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    assert_refused(capsys, ["--model", str(tmp_path)], "cannot be loaded")


def test_no_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert_refused(capsys, [], "no-such-compiler")


def test_nowhere_to_write_is_said_before_anything_is_measured(tmp_path, capsys):
    assert_refused(capsys, ["--json", str(tmp_path / "nowhere" / "found.json")], "found.json")


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_are_a_positive_number(seconds, capsys):
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--seconds", seconds])
    assert stopped.value.code == 2
    assert "--seconds" in capsys.readouterr().err


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
