"""vLLM's engine on a CPU: tokens of folded models are those of vLLM as it is, and norms are RMSNorms.

``make test-vllm`` builds an environment with vLLM and runs this. One process runs all models in one way.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make test-vllm runs these tests")

SUPPORT = Path(__file__).parent.parent / "support"
pytestmark = [pytest.mark.timeout(3600), pytest.mark.xdist_group("vllm")]

#: Classes of the norms, as vLLM has them and folded. The rest are models that stay as they are.
FOLDED: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "opt": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    "opt-untied": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    "gpt2": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    "gpt-neox": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    "falcon": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    "stablelm": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    # One norm in each layer, for both branches.
    "phi": ({"LayerNorm": 4}, {"RMSNormWithBias": 4}),
    "starcoder2": ({"LayerNorm": 7}, {"RMSNormWithBias": 7}),
    # Likewise, and its norms have no β: they are vLLM's own RMSNorm, called as the module was that they stand for.
    "cohere": ({"LayerNorm": 4}, {"RMSNormHandsOn": 4}),
    # The encoder's stream comes out of an activation.
    "whisper": ({"LayerNorm": 15}, {"LayerNorm": 5, "RMSNormWithBias": 10}),
    # The language model has RMSNorms from the start.
    "paligemma": ({"LayerNorm": 5, "GemmaRMSNorm": 7}, {"RMSNormWithBias": 5, "GemmaRMSNorm": 7}),
}
REFUSED = {
    "bloom": "none of its 8 LayerNorms folds: the stream starts from another norm's output",
    "opt-post-norm": "none of its 6 LayerNorms folds: the stream is also read by 'linear'",
    "llama": "it has no LayerNorm",
}
ALL = (*FOLDED, *REFUSED)
#: Models that are compiled too: with a tied table and without, by vLLM's code and by the Transformers backend.
COMPILED = ("opt", "gpt2", "gpt-neox", "falcon", "cohere", "whisper")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs models in one way, each way once; all ways share the folder in which vLLM keeps what it compiled."""
    root = tmp_path_factory.mktemp("vllm")
    environment = {
        **os.environ,
        "PYTHONPATH": str(SUPPORT / "torchvision_site"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(root / "cache"),
    }
    subprocess.run([sys.executable, str(SUPPORT / "vllm_models.py"), str(root), *ALL], env=environment, check=True)

    @functools.cache
    def run_once(way: str, folded: bool, names: tuple[str, ...]) -> dict[str, Any]:
        own = {
            **environment,
            "LNCOMPILE_VLLM": str(int(folded)),
            # vLLM's own format of artifacts takes what its compiler returns.
            "VLLM_USE_AOT_COMPILE": str(int(way != "lnfold")),
        }
        folders = [str(root / name) for name in names]
        command = [sys.executable, str(SUPPORT / "vllm_engine.py"), way, *folders]
        done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
        log = done.stdout + done.stderr
        lines = [line.partition("ANSWER ")[2] for line in log.splitlines() if "ANSWER " in line]
        found = {Path(answer["folder"]).name: answer for answer in map(json.loads, lines)}
        assert set(found) == set(names), log[-4000:]
        return {**found, "log": log}

    return run_once


def require_same(found: Any, expected: Any) -> None:
    assert "error" not in found, found["error"]
    assert "error" not in expected, expected["error"]
    assert found["tokens"] == expected["tokens"]
    assert difference(found, expected) < 2e-5


def difference(found: Any, expected: Any) -> float:
    """The largest difference of log-probabilities of tokens that both name."""
    pairs = [
        (step, other)
        for steps, others in zip(found["logprobs"], expected["logprobs"], strict=True)
        for step, other in zip(steps, others, strict=True)
    ]
    return max(abs(step[token] - other[token]) for step, other in pairs for token in step if token in other)


@pytest.mark.parametrize("name", FOLDED)
def test_eager(name: str, run: Any) -> None:
    stock, folded = run("eager", False, ALL)[name], run("eager", True, ALL)[name]
    require_same(folded, stock)
    assert (Counter(stock["norms"].values()), Counter(folded["norms"].values())) == FOLDED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_do_not_fit_run_as_they_are(name: str, run: Any) -> None:
    stock, folded = run("eager", False, ALL)[name], run("eager", True, ALL)[name]
    assert (folded["tokens"], folded["logprobs"], folded["norms"]) == (
        stock["tokens"],
        stock["logprobs"],
        stock["norms"],
    )
    assert run("eager", True, ALL)["log"].count(f"lncompile: not folded: {REFUSED[name]}") == 1


def test_nothing_is_said_or_done_where_it_is_not_switched_on(run: Any) -> None:
    assert "lncompile" not in run("eager", False, ALL)["log"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_ahead_of_time(name: str, run: Any) -> None:
    """Stock first: what vLLM keeps of it must not serve a folded model."""
    stock, folded = run("default", False, COMPILED)[name], run("default", True, COMPILED)[name]
    require_same(folded, stock)
    assert (Counter(stock["norms"].values()), Counter(folded["norms"].values())) == FOLDED[name]


def test_what_was_compiled_is_kept_apart(run: Any) -> None:
    """vLLM keeps compiled code under a hash, and takes it from there without tracing the model anew."""
    stock, folded = (
        set(re.findall("torch_aot_compile/([0-9a-f]{64})", run("default", folded, COMPILED)["log"]))
        for folded in (False, True)
    )
    assert len(stock) == len(folded) == len(COMPILED)
    assert stock.isdisjoint(folded)


BY_LNFOLD = ("gpt2", "gpt-neox", "cohere")


@pytest.mark.parametrize("name", BY_LNFOLD)
def test_compiled_by_lnfold(name: str, run: Any) -> None:
    require_same(run("lnfold", True, BY_LNFOLD)[name], run("eager", False, ALL)[name])


PARALLEL = ("opt", "gpt-neox")


@pytest.mark.parametrize("name", PARALLEL)
def test_in_two_processes(name: str, run: Any) -> None:
    """Tensor parallelism: each process centers whole tensors, and takes its part of them."""
    parallel = run("parallel", True, PARALLEL)[name]
    require_same(parallel, run("eager", False, ALL)[name])
    assert parallel["processes"] == 2
    assert Counter(parallel["norms"].values()) == FOLDED[name][1]


RELOADED = ("opt", "cohere", "starcoder2")


@pytest.mark.parametrize("name", RELOADED)
def test_weights_that_are_read_once_more(name: str, run: Any) -> None:
    reloaded = run("reload", True, RELOADED)[name]
    require_same(reloaded, run("eager", False, ALL)[name])
    assert Counter(reloaded["norms"].values()) == FOLDED[name][1]


WRONG = ("opt", "gpt-neox", "cohere")


@pytest.mark.parametrize("name", WRONG)
def test_without_centering_answers_are_others(name: str, run: Any) -> None:
    stock, wrong = run("eager", False, ALL)[name], run("uncentered", True, WRONG)[name]
    assert Counter(wrong["norms"].values()) == FOLDED[name][1]
    assert wrong["tokens"] != stock["tokens"] or difference(wrong, stock) > 1e-2


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_hold_on_trial_is_loaded_anew(name: str, run: Any) -> None:
    caught = run("caught", True, WRONG)
    assert caught["log"].count("lncompile: not folded, and loaded anew: on trial, what") == len(WRONG)
    require_same(caught[name], run("eager", False, ALL)[name])
    assert Counter(caught[name]["norms"].values()) == FOLDED[name][0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ""),
        ({"lora_config": object()}, "LoRA"),
        ({"speculative_config": SimpleNamespace(method="eagle3")}, "eagle3"),
        ({"speculative_config": SimpleNamespace(method="ngram")}, ""),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline"),
        ({"ec_transfer_config": object()}, "another process"),
        ({"model_config": SimpleNamespace(enable_prompt_embeds=True)}, "come with a request"),
        ({"model_config": SimpleNamespace(uses_mrope=True)}, "three axes"),
        ({"additional_config": object()}, "kept apart"),
    ],
)
def test_ways_of_running_that_are_not_known_to_be_right(settings: dict[str, Any], words: str) -> None:
    from lncompile.engines.vllm_private import obstacle_of

    usual = {
        "lora_config": None,
        "speculative_config": None,
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1),
        "ec_transfer_config": None,
        "model_config": SimpleNamespace(),
        "additional_config": {},
    }
    config = SimpleNamespace(**{**usual, **settings})
    found = obstacle_of(config, config.model_config)
    assert (words in found) if words else not found
    assert "main model" in obstacle_of(SimpleNamespace(**usual), SimpleNamespace())
