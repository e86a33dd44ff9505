"""Folding a checkpoint on disk: what is written, that it loads, and that nothing stops it half way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import randomise
from checkpoints import PROMPT, contents, gpt2, saved
from hand_folded import IDS, Decoder
from plan_models import Scaled
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import lncompile
from lncompile.nn import CenteredEmbedding, RMSNorm
from lncompile.plans import slices
from lncompile.plans.checkpoint import PLAN_FILE
from lncompile.plans.entries import CenteredParameter, Centering, PlanError
from lncompile.plans.safetensors_file import CheckpointError

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize("size", ["50GB", "20KB"], ids=["one_file", "sharded"])
def test_a_folder_is_folded_and_loads(size: str, tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", size), tmp_path / "folded"
    (source / "notes").mkdir()
    (source / "notes" / "read me.txt").write_text("a file of the author's")
    (source / "pytorch_model.bin").write_bytes(b"weights that would stay as they were")
    before = contents(source)
    plan = lncompile.plan(model, **PROMPT)
    written = plan.apply_to_checkpoint(source, target)
    assert contents(source) == before
    assert (len(written.files) > 3) == (size == "20KB")
    assert len(written.centered) == len(plan.center) == 13
    assert written.left_out == ("pytorch_model.bin",)
    assert not (target / "pytorch_model.bin").exists()
    assert (target / "notes" / "read me.txt").read_text() == "a file of the author's"
    assert lncompile.FoldPlan.load(target / PLAN_FILE) == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "model"]

    applied = plan.apply(copy.deepcopy(model))
    expected, found = applied.state_dict(), weights_in(target)
    assert found.keys() == weights_in(source).keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name

    loaded = transformers.GPT2LMHeadModel.from_pretrained(target, dtype=torch.float64).eval()
    lncompile.FoldPlan.load(target / PLAN_FILE).replace_modules(loaded)
    assert type(loaded.transformer.h[0].ln_1) is RMSNorm
    assert isinstance(loaded.transformer.wte, CenteredEmbedding)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    torch.testing.assert_close(loaded(**PROMPT).logits, model(**PROMPT).logits, **TOLERANCE)
    # The control: without the RMSNorms it is another model (a LayerNorm would be the same function), and without
    # centering behind the look-up as well.
    wrong = copy.deepcopy(loaded)
    wrong.transformer.wte = copy.deepcopy(model.transformer.wte)
    assert not torch.allclose(wrong(**PROMPT).logits, model(**PROMPT).logits, atol=1e-3)


def test_untied(tmp_path: Path) -> None:
    model = gpt2()
    source, target = saved(model, tmp_path / "model", "20KB"), tmp_path / "folded"
    plan = lncompile.plan(model, untie=True, **PROMPT)
    written = plan.apply_to_checkpoint(source, target)
    assert written.tables == ("lm_head.weight",)
    found = weights_in(target)
    torch.testing.assert_close(found["lm_head.weight"], model.lm_head.weight, rtol=0, atol=0)
    assert found["transformer.wte.weight"].mean(1).abs().max() < 1e-15
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(found)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in found.values())
    loaded = transformers.GPT2LMHeadModel.from_pretrained(target, dtype=torch.float64).eval()
    plan.replace_modules(loaded)
    assert loaded.lm_head.weight is not loaded.transformer.wte.weight
    torch.testing.assert_close(loaded(**PROMPT).logits, model(**PROMPT).logits, **TOLERANCE)


def test_a_base_models_checkpoint_has_no_prefix(tmp_path: Path) -> None:
    model = gpt2(tie_word_embeddings=False)
    source, target = saved(model.transformer, tmp_path / "base"), tmp_path / "folded"
    written = lncompile.plan(model, **PROMPT).apply_to_checkpoint(source, target)
    assert "wte.weight" in written.centered
    base = lncompile.plan(model.transformer, **PROMPT)
    loaded = base.replace_modules(transformers.GPT2Model.from_pretrained(target, dtype=torch.float64).eval())
    torch.testing.assert_close(loaded(**PROMPT)[0], model.transformer(**PROMPT)[0], **TOLERANCE)
    with_prefix = base.apply_to_checkpoint(saved(model, tmp_path / "head"), tmp_path / "other")
    assert "transformer.wte.weight" in with_prefix.centered


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomise(Decoder()).to(dtype)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    plan = lncompile.plan(model.eval(), IDS)
    plan.apply_to_checkpoint(tmp_path / "model.safetensors", tmp_path / "folded")
    expected = plan.apply(model).state_dict()
    found = load_file(tmp_path / "folded" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    with safe_open(tmp_path / "folded" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_folded_once_more_nothing_changes(tmp_path: Path) -> None:
    model = gpt2()
    plan = lncompile.plan(model, **PROMPT)
    plan.apply_to_checkpoint(saved(model, tmp_path / "model"), tmp_path / "once")
    plan.apply_to_checkpoint(tmp_path / "once", tmp_path / "twice")
    assert contents(tmp_path / "once") == contents(tmp_path / "twice")


@pytest.mark.parametrize(
    "centering",
    [
        Centering((24, 10), (0,)),
        Centering((24, 10), (1,)),
        Centering((3, 8, 10), (1,), {0: (0, 2)}),
        Centering((3, 8, 10), (1,), {2: (0, 1, 7)}),
        Centering((24, 2, 5), (0, 2)),
        Centering((24, 10), (0, 1)),
    ],
    ids=str,
)
def test_slices_are_the_whole(centering: Centering, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SLICE", 17)
    weight = torch.randn(24, 10, dtype=torch.float64) + 1
    entry = CenteredParameter("w", (), (24, 10), (centering,))
    (axes,), (means,) = entry.axes(), entry.means(weight)
    expected = checkpoint_free(weight, axes, means)
    actual = weight.clone()
    assert not slices.is_done(entry, actual)
    assert slices.center_in_place(entry, actual)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-15)
    assert slices.is_done(entry, actual)
    assert entry.is_done(actual)
    assert not slices.center_in_place(entry, actual)


def checkpoint_free(weight: Tensor, axes: object, means: Tensor) -> Tensor:
    from lncompile.passes.rewrites.arithmetic import add_means

    return add_means(weight, -means, axes)


def test_a_mean_that_is_smaller_than_the_numbers_units() -> None:
    """Rounded to bfloat16 most numbers stay where they were, and some of their mean with them."""
    noise = torch.randn(8, 16384)
    weight = (noise - noise.mean(1, keepdim=True) + 1.5e-3).to(torch.bfloat16)
    entry = CenteredParameter("w", (), (8, 16384), (Centering((8, 16384), (1,)),))
    assert slices.center_in_place(entry, weight)
    assert not slices.is_done(entry, weight)
    assert slices.is_rounded(entry, weight)
    assert not slices.is_rounded(entry, weight + 0.1), "the control"


# --- what is refused, before anything is written ---


def without_a_tensor(state: dict[str, Tensor]) -> None:
    del state["blocks.1.out.weight"]


def of_another_shape(state: dict[str, Tensor]) -> None:
    state["blocks.1.out.weight"] = torch.zeros(16, 17)


def quantized(state: dict[str, Tensor]) -> None:
    state["blocks.1.out.weight"] = torch.zeros(16, 16, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_a_tensor, r"lacks 1 of the .* blocks\.1\.out\.weight"),
        (of_another_shape, r"\[16, 17\], not \[16, 16\]"),
        (quantized, "I8, in which it cannot be centered"),
    ],
)
def test_a_plan_that_does_not_fit(change: Callable[[dict[str, Tensor]], None], says: str, tmp_path: Path) -> None:
    model = randomise(Decoder()).eval()
    plan = lncompile.plan(model, IDS)
    state = dict(model.state_dict())
    change(state)
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(PlanError, match=says):
        plan.apply_to_checkpoint(tmp_path / "model", tmp_path / "folded")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_places_that_cannot_be(tmp_path: Path) -> None:
    model = randomise(Decoder()).eval()
    plan = lncompile.plan(model, IDS)
    source = tmp_path / "model"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    source.mkdir()
    with pytest.raises(CheckpointError, match="no safetensors files"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    save_file(dict(model.state_dict()), source / "model.safetensors")
    with pytest.raises(CheckpointError, match="inside of the checkpoint"):
        plan.apply_to_checkpoint(source, source / "folded")
    with pytest.raises(CheckpointError, match="exists already"):
        plan.apply_to_checkpoint(source, source)
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "elsewhere.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lists elsewhere\.safetensors"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")


@pytest.mark.parametrize("cut", [0, 4, 100, 2000])
def test_a_file_that_is_cut_off(cut: int, tmp_path: Path) -> None:
    model = randomise(Decoder()).eval()
    path = tmp_path / "model.safetensors"
    save_file(dict(model.state_dict()), path)
    path.write_bytes(path.read_bytes()[:cut] if cut < 2000 else path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off"):
        lncompile.plan(model, IDS).apply_to_checkpoint(path, tmp_path / "folded")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    model = randomise(Decoder()).eval()
    plan = lncompile.plan(model, IDS)
    with torch.no_grad():
        model.blocks[0].out.weight[3, 4] = float("nan")
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.out\.weight.*finite"):
        plan.apply_to_checkpoint(tmp_path / "model.safetensors", tmp_path / "folded")
    assert not (tmp_path / "folded").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_scale_is_taken_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = randomise(Scaled().double()).to(dtype).eval()
    plan = lncompile.plan(model, IDS)
    assert {name for entry in plan.center for name in entry.scaled_by} == {"scale"}
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plan.apply_to_checkpoint(tmp_path / "model.safetensors", tmp_path / "folded")
    found = load_file(tmp_path / "folded" / "model.safetensors")
    expected = plan.apply(copy.deepcopy(model)).state_dict()
    assert torch.equal(found["scale"], torch.ones(16, dtype=dtype))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# --- folders as they are found ---


def test_a_file_behind_a_link_keeps_its_name(tmp_path: Path) -> None:
    """As in the cache of huggingface_hub, whose files are called by their digests."""
    model = randomise(Decoder()).eval()
    plan = lncompile.plan(model, IDS)
    save_file(dict(model.state_dict()), tmp_path / "0a1b2c")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "0a1b2c")
    for number, source in enumerate(("model.safetensors", "0a1b2c")):
        written = plan.apply_to_checkpoint(tmp_path / source, tmp_path / f"folded{number}")
        assert written.files == ("model.safetensors",)
        assert load_file(tmp_path / f"folded{number}" / "model.safetensors").keys() == model.state_dict().keys()


def test_weights_that_would_stay_as_they_are(tmp_path: Path) -> None:
    model = randomise(Decoder()).eval()
    plan, source = lncompile.plan(model, IDS), tmp_path / "model"
    (source / "original").mkdir(parents=True)
    save_file(dict(model.state_dict()), source / "model.safetensors")
    save_file(dict(model.state_dict()), source / "original" / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match=r"weights in folders inside of it.*original/consolidated\.safetensors"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    (source / "original" / "consolidated.safetensors").unlink()
    save_file({"lora_A": torch.zeros(2)}, source / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors holds no tensor of the plan's model"):
        plan.apply_to_checkpoint(source, tmp_path / "folded")
    (source / "adapter_model.safetensors").unlink()
    assert plan.apply_to_checkpoint(source, tmp_path / "folded"), "the control"


def test_values_that_half_precision_cannot_hold(tmp_path: Path) -> None:
    model = randomise(Scaled().double()).eval()
    plan = lncompile.plan(model, IDS)
    with torch.no_grad():
        model.scale.fill_(6e4)
        model.branch.weight.fill_(1.0)[0] = -30.0
    save_file(model.half().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'branch\.weight' would have values that torch\.float16 cannot hold"):
        plan.apply_to_checkpoint(tmp_path / "model.safetensors", tmp_path / "folded")
