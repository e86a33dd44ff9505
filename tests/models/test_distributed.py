"""Tensor parallelism, DDP and FSDP2: two gloo processes on this machine run the programs of parallel_programs.py."""

from __future__ import annotations

import functools
import multiprocessing
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from parallel_programs import PROGRAMS, WORLD, run
from torch import distributed
from torch_versions import IS_OLD

SECONDS = 500
TOLERANCE = 1e-10

pytestmark = [
    pytest.mark.skipif(not distributed.is_available(), reason="this torch is built without torch.distributed"),
    # One process of the suite starts the two, once for all tests.
    pytest.mark.xdist_group("distributed"),
]

Found = dict[str, Any]


def spawn(names: tuple[str, ...], through_inductor: bool) -> list[dict[str, Found]]:
    """Run programs in both processes, which are killed if they hang; return what each of them found."""
    context = multiprocessing.get_context("spawn")
    # gloo asks for the address of the machine's name otherwise, which need not have one.
    environment = {"GLOO_SOCKET_IFNAME": "lo"} if os.path.exists("/sys/class/net/lo") else {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, environment):
        arguments = (str(Path(folder) / "store"), list(names), through_inductor, folder)
        processes = [context.Process(target=run, args=(rank, *arguments), daemon=True) for rank in range(WORLD)]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(SECONDS)
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        written = [Path(folder) / f"{rank}.pt" for rank in range(WORLD)]
        results = [torch.load(path) if path.exists() else {} for path in written]
    assert codes == [0] * WORLD, f"exit codes {codes}; finished: {[list(result) for result in results]}"
    return results


@functools.cache
def run_all() -> list[dict[str, Found]]:
    return spawn(tuple(PROGRAMS), through_inductor=False)


def found_by(name: str) -> list[Found]:
    """What both processes found in one program."""
    found = [result[name] for result in run_all()]
    for each in found:
        assert "failure" not in each, each["failure"]
    return found


TENSOR_PARALLEL = {
    "usual_plan": (5, 5, 10),
    "norms_of_heads": (9, 9, 18),
    "gathered_columns": (5, 2, 4),
    "vocabulary_cut": (5, 5, 10),
    "sequence_parallel": (5, 5, 10),
    "reduced_by_hand": (5, 5, 10),
}


@pytest.mark.parametrize("name", TENSOR_PARALLEL)
def test_tensor_parallel_folds_shard_by_shard(name: str) -> None:
    sites, folded, weights = TENSOR_PARALLEL[name]
    for found in found_by(name):
        assert (found["sites"], found["folded"]) == (sites, folded), found["details"]
        assert found["error"] <= TOLERANCE
        assert found["materialised"] == weights
        assert found["collectives_of_materialising"] == 0, "a shard asked another process"
        compiled, eager = found["collectives"]
        assert compiled == eager > 0


def test_a_report_counts_the_bytes_of_this_process() -> None:
    found = found_by("usual_plan")[0]
    # Two embeddings and the biases whole, half of each output and down projection; float64.
    whole = (31 + 6) * 16 + 2 * 2 * 16
    assert found["bytes"] == 8 * (whole + 2 * (16 * 16 + 16 * 64) // 2)


def test_weights_cut_along_their_own_mean_are_left_alone() -> None:
    for found in found_by("gathered_columns"):
        assert found["reasons"] == ["unsupported_weight"] * 3
        assert all(re.search(r"'blocks\.\d\.down\.weight'.*takes communication", text) for text in found["details"])


def test_sharded_weights_are_never_stale() -> None:
    for found in found_by("changed_weights"):
        assert found["folded"] == 3
        assert max(found["errors"]) <= TOLERANCE


def test_writes_of_collectives_are_noticed() -> None:
    for found in found_by("written_by_collectives"):
        assert found["folded"] == 3
        assert [name for name, *_ in found["values"]] == ["broadcast", "all_reduce", "send_and_receive", "scatter"]
        assert all(error <= TOLERANCE and changed > 1e-3 for _, error, changed in found["values"]), found["values"]
        # The control: by versions alone some of them are not.
        assert any(error > 1e-3 for _, error, _ in found["versions"]), found["versions"]


def test_writes_to_shards_are_noticed() -> None:
    for found in found_by("written_shards"):
        assert found["folded"] == 3
        assert max(found["errors"]) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    ["data_parallel", "data_parallel_in_buckets", "fully_sharded", "fully_sharded_blocks",
     "fully_sharded_until_backward"],
)  # fmt: skip
def test_data_parallel_training_is_eagers(name: str) -> None:
    for found in found_by(name):
        assert found["inference"] <= TOLERANCE
        assert max(found["outputs"]) <= 1e-9
        assert found["gradients"] <= 1e-9
        assert max(found["after_steps"]) <= 1e-9


def test_data_parallel_inference_folds() -> None:
    for found in found_by("data_parallel"):
        assert (found["in_inference"]["sites"], found["in_inference"]["folded"]) == (9, 9)
    for found in found_by("data_parallel_in_buckets"):
        assert found["in_inference"]["folded"] == 2, "a stream that a bucket's border cuts goes from graph to graph"


def test_parameters_gathered_for_each_call_are_left_alone() -> None:
    for name in ("fully_sharded", "fully_sharded_blocks", "fully_sharded_until_backward"):
        for found in found_by(name):
            inference = found["in_inference"]
            assert (inference["sites"], inference["folded"]) == (4, 0)
            gathered = [text for text in inference["details"] if "gathered anew for each call (FSDP)" in text]
            assert len(gathered) == inference["reasons"].count("unsupported_weight") == 2


def test_a_folded_model_is_sharded_and_a_sharded_model_is_folded() -> None:
    for found in found_by("folded_then_parallel"):
        assert found["folded"] == 9
        assert max(found["fully"], found["tensor_parallel"], found["in_place"]) <= TOLERANCE
        assert found["centered"] < 1e-15
        assert found["sharded_still"] == "DTensor"
        assert found["control"] > 1e-4
        assert "FSDPBlock" in found["refused"], "fold first, then shard"


@pytest.mark.slow
def test_through_inductor() -> None:
    inference = ("usual_plan", "norms_of_heads", "sequence_parallel", "reduced_by_hand")
    # Inductor's attention has no gradient in float64 on old versions.
    training = () if IS_OLD else ("data_parallel",)
    for result in spawn((*inference, *training), through_inductor=True):
        for name in (*inference, *training):
            assert "failure" not in result[name], result[name]["failure"]
        assert all(result[name]["error"] <= TOLERANCE for name in inference)
        assert [result[name]["folded"] for name in inference] == [5, 9, 5, 5]
        assert all(result[name]["gradients"] <= 1e-9 for name in training)
