"""``lncompile fold``: a checkpoint in, a folded checkpoint out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from architectures import TEXT, randomise, tokens
from command_line import answer, assert_refused, run

import lncompile

PROMPT = {"input_ids": tokens(2, 6), "use_cache": False}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_inner=32, n_positions=16, **TEXT)
    model = randomise(transformers.GPT2LMHeadModel(config).double().eval())
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    return tmp_path / "model"


def load(folder: Path) -> transformers.GPT2LMHeadModel:
    return transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64).eval()


def test_with_a_plan_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    result = run("fold", checkpoint, tmp_path / "folded")
    assert result.exit_code == 0, result.output
    assert "Folded: 5 of 5 LayerNorms, 9 tensors centered" in result.stdout
    lines = [line.strip() for line in result.stdout.splitlines() if line.startswith("  ")]
    assert lines[0] == f"model = lncompile.load_folded(GPT2LMHeadModel, {str(tmp_path / 'folded')!r})"
    scope = {"GPT2LMHeadModel": transformers.GPT2LMHeadModel, "lncompile": lncompile}
    exec("\n".join(lines), scope)
    folded, original = scope["model"].double().eval(), load(checkpoint)
    assert type(folded.transformer.ln_f).__name__ == "RMSNorm"
    torch.testing.assert_close(folded(**PROMPT).logits, original(**PROMPT).logits, rtol=1e-5, atol=1e-5)


def test_with_a_plan_from_a_file(checkpoint: Path, tmp_path: Path) -> None:
    original = load(checkpoint)
    plan = lncompile.plan(original, untie=True, **PROMPT)
    plan.save(tmp_path / "plan.json")
    found = answer("fold", checkpoint, tmp_path / "folded", "--plan", tmp_path / "plan.json")
    assert (found["folded"], found["total"], found["tables"]) == (5, 5, ["lm_head.weight"])
    folded = plan.replace_modules(load(tmp_path / "folded"))
    torch.testing.assert_close(folded(**PROMPT).logits, original(**PROMPT).logits, rtol=1e-10, atol=1e-10)


def test_one_file_of_weights(checkpoint: Path, tmp_path: Path) -> None:
    original = load(checkpoint)
    lncompile.plan(original, **PROMPT).save(tmp_path / "plan.json")
    original.save_pretrained(tmp_path / "whole")
    weights = tmp_path / "whole" / "model.safetensors"
    found = answer("fold", weights, tmp_path / "folded", "--plan", tmp_path / "plan.json")
    assert found["files"] == ["model.safetensors"]
    assert_refused("fold", weights, tmp_path / "other", says=("--plan",))


def test_a_failure_is_json_for_a_program(checkpoint: Path, tmp_path: Path) -> None:
    for target, arguments, says in (
        (checkpoint, (), "exists already"),
        (tmp_path / "folded", ("--plan", tmp_path / "gone.json"), "there is no file"),
    ):
        found = answer("fold", checkpoint, target, *arguments, exit_code=2)
        assert found["model"] == str(checkpoint)
        assert says in found["error"]
        assert "error: " in run("fold", checkpoint, target, *arguments, "--json").stderr
    assert answer("explain", tmp_path / "nowhere", exit_code=2)["error"], "every command does"


def test_what_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    assert_refused("fold", checkpoint, checkpoint, says=("exists already",))
    assert_refused("fold", tmp_path / "nowhere", tmp_path / "folded", says=("there is no folder or file",))
    (tmp_path / "no plan.json").write_text("{}")
    assert_refused(
        "fold", checkpoint, tmp_path / "folded", "--plan", tmp_path / "no plan.json", says=("not a fold plan",)
    )
    assert not (tmp_path / "folded").exists()


def test_a_model_without_norms_to_fold_is_not_copied(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **TEXT
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    assert_refused("fold", tmp_path / "llama", tmp_path / "folded", says=("the plan changes nothing",))
    assert not (tmp_path / "folded").exists()
