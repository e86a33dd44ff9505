"""The command line: what it prints for people and for programs, its exit codes, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from command_line import answer, run
from torch import nn

from lncompile import backend
from lncompile.comparisons.latency import Latency
from lncompile.comparisons.processes import RepeatedTimings
from lncompile.comparisons.timing import PairedTimings
from lncompile.models.loading import load_model, randomise
from lncompile.options import arms
from lncompile.verification import OutputError, Verification

TINY = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 61, "bos_token_id": 1,
        "eos_token_id": 2, "architectures": ["GPT2LMHeadModel"]}  # fmt: skip
HERE = __file__


class Net(nn.Module):
    """A norm that folds and one that does not, behind its own γ and β."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.first, self.second = nn.Linear(8, 16), nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x):
        print("a model that prints")
        return self.second(self.first(self.linear(x)))


def make_net(batch=3):
    return randomise(Net()), torch.randn(batch, 8)


def make_tokens(tokens):
    return randomise(Net()), torch.randn(tokens, 8)


def make_half():
    return randomise(Net()).to(torch.bfloat16), {"x": torch.randn(2, 8, dtype=torch.bfloat16)}


def make_gpt2():
    return randomise(transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)))


def make_without_norms():
    return randomise(nn.Sequential(nn.Linear(8, 4))), (torch.randn(2, 8),)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    transformers.GPT2Config(**TINY).save_pretrained(tmp_path)
    return tmp_path / "config.json"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- explain ---------------------------------------------------------------------------------------------------------


def test_explain_for_people(config):
    result = run("explain", config)
    assert result.exit_code == 0
    assert "5 of 5 LayerNorms folded" in result.stdout
    assert "transformer.h.0-1.ln_2" in result.stdout
    assert "random weights" in result.stderr
    assert "1/2" not in result.stdout


def test_explain_as_json():
    found = answer("explain", f"{HERE}:make_net", "--batch", "5")
    assert set(found) == {"model", "description", "explain"}
    assert "5×8" in found["description"]
    assert (found["explain"]["total"], found["explain"]["folded"]) == (2, 1)
    first, second = found["explain"]["sites"]
    assert (first["name"], first["folded"], first["reason"]) == ("first", True, None)
    assert (second["name"], second["folded"], second["reason"]) == ("second", False, "norm_output")


def test_options_reach_the_backend():
    """Whether an activation may be centered at run time is an option: two norms behind one that does not fold."""
    assert answer("explain", f"{HERE}:make_run_time")["explain"]["folded"] == 3
    assert answer("explain", f"{HERE}:make_run_time", "--option", "lnfold.assist=off")["explain"]["folded"] == 0


class RunTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(3))

    def forward(self, x):
        stream = torch.relu(x)
        return sum(norm(stream) for norm in self.norms)


def make_run_time():
    return randomise(RunTime()), torch.randn(64, 16)


# --- verify ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_verify_and_bench_of_one_model(monkeypatch):
    found = answer("verify", f"{HERE}:make_net")
    assert found["passed"] is True
    assert found["verify"]["outputs"][0]["lnfold"] < 1e-6
    assert found["machine"]["torch"] == torch.__version__

    found = answer("bench", f"{HERE}:make_net", "--seconds", "0.3", "--processes", "2")
    assert len(found["timing"]["processes"]) == 2
    for process in found["timing"]["processes"]:
        samples = {name: timing["samples_s"] for name, timing in process.items()}
        assert set(samples) == {"eager", "inductor", "lnfold"}
        assert len(samples["eager"]) == len(samples["inductor"]) == len(samples["lnfold"]) >= 15
    ratio = found["speedup_over_inductor"]["lnfold"]
    assert ratio["low"] <= ratio["median"] <= ratio["high"]
    assert found["explain"]["folded"] == 1
    assert found["sentence"].startswith("1 of 2 LayerNorms folded; one call takes ")
    assert ("the interval contains 1" in found["sentence"]) == (ratio["low"] <= 1 <= ratio["high"])

    timings = tuple(
        PairedTimings({name: tuple(timing["samples_s"]) for name, timing in process.items()})
        for process in found["timing"]["processes"]
    )
    measured = Latency(RepeatedTimings(timings), found["machine"])
    monkeypatch.setattr("lncompile.comparisons.latency.compare_in_processes", lambda *_, **__: measured)
    for_people = run("bench", f"{HERE}:make_net")
    assert for_people.exit_code == 0
    assert "speed-up over inductor [95% interval]" in for_people.stdout
    assert "1 of 2 LayerNorms folded" in " ".join(for_people.stdout.split())


def test_worse_predictions_end_with_exit_code_1(monkeypatch):
    worse = Verification((OutputError(".logits", "float32", 1e-7, 1e-7, 1e-2, True),))
    monkeypatch.setattr("lncompile.cli.verify.verify", lambda *_, **__: worse)
    assert answer("verify", f"{HERE}:make_net", exit_code=1)["passed"] is False
    result = run("verify", f"{HERE}:make_net")
    assert result.exit_code == 1
    assert "Predictions got worse" in result.stdout


def test_verify_hands_options_on(monkeypatch):
    seen = []
    parse_options = backend.parse_options

    def recording(mode, options):
        seen.append((mode, dict(options or {})))
        return parse_options(mode, options)

    monkeypatch.setattr(backend, "parse_options", recording)
    found = answer("verify", f"{HERE}:make_net", "-o", "lnfold.nonfoldable=eager", "-o", "lnfold.check=off")
    assert found["passed"]
    assert seen == [(None, {"lnfold.nonfoldable": "eager", "lnfold.check": "off"})]


@pytest.mark.parametrize(
    ("mode", "options", "stock", "ours"),
    [
        (None, {}, {}, {}),
        ("max-autotune", {}, {"mode": "max-autotune"}, {"mode": "max-autotune"}),
        (None, {"lnfold.assist": "off"}, {}, {"options": {"lnfold.assist": "off"}}),
        (None, {"lnfold.assist": "off", "max_autotune": True}, {"options": {"max_autotune": True}},
         {"options": {"lnfold.assist": "off", "max_autotune": True}}),
    ],
)  # fmt: skip
def test_both_backends_get_the_same_but_for_our_options(mode, options, stock, ours):
    assert arms(mode, options) == {"inductor": stock, "lnfold": ours}


def test_a_mode_beside_options_becomes_the_options_it_stands_for():
    both = arms("reduce-overhead", {"lnfold.assist": "off"})
    assert both["inductor"]["options"]["triton.cudagraphs"] is True
    assert both["lnfold"]["options"] == {**both["inductor"]["options"], "lnfold.assist": "off"}


def test_errors_that_are_no_number_are_null_in_json(monkeypatch):
    worse = Verification((OutputError(".logits", "float32", 1e-7, float("inf"), float("nan"), False),))
    monkeypatch.setattr("lncompile.cli.verify.verify", lambda *_, **__: worse)
    (output,) = answer("verify", f"{HERE}:make_net", exit_code=1)["verify"]["outputs"]
    assert output["inductor"] is output["lnfold"] is None


# --- ab --------------------------------------------------------------------------------------------------------------


def two_arms(baseline: float = 0.0, candidate: float = 0.0, wrong: float = 0.0, fails: bool = False):
    """What stands in for two compilations: arms that take some seconds longer, answer otherwise, or raise."""

    def arm(name, seconds, offset=0.0, fails=False):
        def answer(x):
            if fails:
                raise RuntimeError(f"{name} is broken")
            time.sleep(seconds)
            return x + offset

        return answer

    arms = {"inductor": arm("inductor", baseline), "lnfold": arm("lnfold", candidate, wrong, fails)}
    return lambda *_: arms


@pytest.mark.parametrize(
    ("arms_of", "says", "regression"),
    [
        (two_arms(baseline=0.004), "Faster", False),
        (two_arms(candidate=0.004), "Slower", True),
        (two_arms(baseline=0.004, wrong=1.0), "DIFFER", True),
        (two_arms(baseline=0.004, fails=True), "lnfold is out of service", True),
    ],
)
def test_ab_finds_regressions(arms_of, says, regression, monkeypatch):
    monkeypatch.setattr("lncompile.abtest.experiment.compiled_arms", arms_of)
    arguments = ("ab", f"{HERE}:make_net", "--seconds", "20", "--shadow", "0.5")
    found = answer(*arguments, exit_code=int(regression))
    assert found["regression"] is regression
    assert says in found["ab"]["verdict"]["words"]
    if says != "DIFFER":
        return
    result = run(*arguments)
    assert result.exit_code == 1
    assert says in result.stdout
    assert "p50 ms" in result.stdout


def test_ab_that_is_not_decided_in_time_is_no_regression(monkeypatch):
    monkeypatch.setattr("lncompile.abtest.experiment.compiled_arms", two_arms())
    assert answer("ab", f"{HERE}:make_net", "--seconds", "0")["ab"]["verdict"]["outcome"] == "undecided"


@pytest.mark.usefixtures("one_thread")
def test_ab_of_two_compilations_and_two_lengths(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra 'plot' is not installed")
    arguments = ("-t", "2", "-t", "16", "--seconds", "1", "--shadow", "0.2", "-o", "lnfold.check=off")
    result = run("ab", f"{HERE}:make_tokens", *arguments, "--json", "--plot", tmp_path / "plot.svg")
    assert result.exit_code in (0, 1)  # which one is faster on a busy machine is not for a test to say
    found = json.loads(result.stdout)
    assert [arm["name"] for arm in found["ab"]["arms"]] == ["inductor", "lnfold"]
    assert all(arm["in_service"] and arm["requests"] > 0 for arm in found["ab"]["arms"])
    assert {bucket["name"] for bucket in found["ab"]["buckets"]} >= {"float32[2,8]", "float32[16,8]"}
    assert found["ab"]["verdict"]["outputs_agree"] is True
    assert "<svg" in (tmp_path / "plot.svg").read_text()


# --- Models ----------------------------------------------------------------------------------------------------------


def test_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\ndef make(tokens):\n    return torch.nn.LayerNorm(4), (torch.ones(tokens, 4),)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    found = answer("explain", "my_models:make", "--tokens", "7")
    assert "7×4" in found["description"]
    assert found["explain"]["total"] == 1


def test_a_factory_of_a_transformers_model_needs_no_inputs():
    found = answer("explain", f"{HERE}:make_gpt2", "--tokens", "9", "--batch", "2")
    assert "input_ids 2×9" in found["description"]
    assert found["explain"]["folded"] == 5


def test_dtype_of_a_factory_is_its_own_unless_it_is_asked_for():
    assert load_model(f"{HERE}:make_half").model.linear.weight.dtype == torch.bfloat16
    wide = load_model(f"{HERE}:make_half", dtype=torch.float32)
    assert wide.model.linear.weight.dtype == wide.inputs["x"].dtype == torch.float32


def test_seed_and_dtype_of_a_config(config):
    first, again, other = (load_model(str(config), seed=seed, dtype=torch.bfloat16) for seed in (0, 0, 1))
    assert first.model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(first.model.lm_head.weight, again.model.lm_head.weight)
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
    assert not torch.equal(first.model.lm_head.weight, other.model.lm_head.weight)
    assert not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])
    norm = first.model.transformer.h[0].ln_1
    assert (norm.weight != 1).any()
    assert (norm.bias != 0).any()


def test_a_config_file_means_random_weights_whatever_lies_beside_it(config):
    make_gpt2().save_pretrained(config.parent)
    with_weights, random = load_model(str(config.parent)), load_model(str(config), seed=1)
    assert "random weights" in random.description
    assert "random weights" not in with_weights.description
    assert not torch.equal(random.model.lm_head.weight, with_weights.model.lm_head.weight)
