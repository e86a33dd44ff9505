"""Ray Serve: two replicas on one machine, each a process that compiles for itself, behind one HTTP address."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray.serve", reason="needs ray[serve], which the tests do not install: pip install 'ray[serve]'")

import httpx
import ray
from ray import serve
from ray_deployment import Replica
from reported import Decoder

from lncompile.models.random_weights import randomise

FOLDED = 3
IDS = [[1, 5, 3], [2, 2, 7]]


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, torch.Tensor]]:
    """Where the service is, and what its model answers without compilation."""
    model = randomise(Decoder(layers=1).double()).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # it would write a key into the home folder
    support = str(Path(__file__).parent.parent / "support")
    ray.init(
        num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20,
        runtime_env={"env_vars": {"PYTHONPATH": support, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deployment = serve.deployment(num_replicas=2, ray_actor_options={"num_cpus": 1})(Replica)
        serve.run(deployment.bind(str(tmp_path / "weights.pt")), name="decoder")
        yield f"http://127.0.0.1:{port}/", model(torch.tensor(IDS))
    finally:
        serve.shutdown()
        ray.shutdown()


def test_each_replica_folds_and_answers_as_eager_does(address: tuple[str, torch.Tensor]) -> None:
    url, expected = address
    processes = set()
    for _ in range(40):
        # Connections of their own: the proxy spreads them over the replicas.
        found = httpx.post(url, json={"ids": IDS}, timeout=300).json()
        processes.add(found["process"])
        answer = torch.tensor(found["answer"], dtype=torch.float64)
        torch.testing.assert_close(answer, expected, rtol=1e-10, atol=1e-10)
        assert found["folded"] == [[FOLDED, FOLDED]]
        if len(processes) == 2:
            break
    assert len(processes) == 2, "both replicas answered"
    assert os.getpid() not in processes
