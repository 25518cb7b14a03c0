"""Workers on a real Ray cluster of several processes on this machine: killed workers and lost nodes change nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_calibration import opened
from test_runs import BATCH, CNN, SAMPLES, equal

import mscompile
from mscompile.calibration import calibrate
from mscompile.errors import ResourceError, UnsupportedError
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Run
from mscompile.runs.workers import Crew, crew_of

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None  # type: ignore[assignment]

with_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'mscompile[ray]'")


def over(crew: Crew | None, run: type[Run] = Run) -> Any:
    scm, samples = opened("cnn", SAMPLES)
    return calibrate(scm, scm.sites, samples, batch_size=BATCH, measure=CNN, run=run(crew=crew))


@pytest.fixture(scope="module")
def alone() -> Any:
    return over(None)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one processor each, which the tests may take from it; the third is the head, and does no work."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(mscompile.__file__).parents[1]), str(Path(__file__).parent)])
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.add_node(num_cpus=1)
    found.add_node(num_cpus=1)
    found.wait_for_nodes()
    yield found
    found.shutdown()


@pytest.fixture
def crew(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Crew]:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    found = crew_of("ray")
    assert found is not None
    yield found
    found.close()


@with_ray
def test_a_cluster_gives_the_same_bits(alone: Any, crew: Crew):
    assert crew.size == 2
    assert equal(over(crew), alone)
    assert equal(over(crew), alone)


class Hit(Run):
    """Kills the process of one actor as soon as the first shard is done."""

    def map(self, *arguments: Any) -> Iterator[tuple[int, Parcel]]:
        for i, found in enumerate(super().map(*arguments)):
            if not i:
                desks = [p for p in psutil.process_iter(["cmdline"]) if "ray::Desk" in "".join(p.info["cmdline"] or ())]
                desks[0].kill()
            yield found


@with_ray
def test_a_worker_that_is_killed(alone: Any, crew: Crew):
    assert equal(over(crew, Hit), alone)


@with_ray
def test_a_node_that_is_lost(alone: Any, crew: Crew, cluster: Any):
    lost = cluster.worker_nodes
    node = next(iter(lost))
    timer = threading.Timer(0.0, lambda: cluster.remove_node(node, allow_graceful=False))

    class Away(Run):
        def map(self, *arguments: Any) -> Iterator[tuple[int, Parcel]]:
            for i, found in enumerate(super().map(*arguments)):
                if not i:
                    timer.start()
                    timer.join()
                yield found

    assert equal(over(crew, Away), alone)
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()


@with_ray
def test_an_address_of_the_client(alone: Any):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pytest.importorskip("grpc", reason="ray:// takes ray[client]")
    program = str(Path(sys.executable).with_name("ray"))
    start = [
        program,
        "start",
        "--head",
        "--port=0",
        "--num-cpus=2",
        "--include-dashboard=false",
        "--node-ip-address=127.0.0.1",
    ]
    subprocess.run([*start, f"--ray-client-server-port={port}"], check=True, capture_output=True, timeout=120)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        found = crew_of(f"ray://127.0.0.1:{port}")
        assert found is not None
        assert equal(over(found), alone)
        found.close()
    finally:
        subprocess.run([program, "stop", "--force"], check=False, capture_output=True, timeout=120)


@with_ray
def test_no_cluster_at_an_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with pytest.raises(ResourceError, match="no workers"):
        crew_of("ray://127.0.0.1:1")


@pytest.mark.skipif(ray is not None, reason="Ray is installed")
def test_without_ray():
    with pytest.raises(UnsupportedError, match=r"(?s)Ray is not installed.*mscompile\[ray\]"):
        crew_of("ray")
