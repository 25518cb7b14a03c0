"""Workers on a real Ray cluster of several processes on this machine: killed workers and lost nodes change nothing."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_models import mlp
from test_calibration import opened
from test_runs import BATCH, CNN, SAMPLES, equal
from test_trials import bits
from test_verify import data, planned

import mscompile
from mscompile.calibration.calibration import calibrate
from mscompile.errors import ResourceError, UnsupportedError
from mscompile.runs.parcel import Parcel
from mscompile.runs.run import Run
from mscompile.runs.workers import Crew, crew_of
from mscompile.verification.interchange import Engine, disjoint_pairs
from mscompile.verification.trials import Design, Interchanges, Shards, run_trials

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


@with_ray
def test_trials_on_a_cluster_are_the_same(crew: Crew):
    pair, _ = planned(mlp())
    found = data(500)
    engine = Engine(pair, found, batch_size=8)
    task = Interchanges(pair, engine.answers, engine)
    shards = Shards(found, *disjoint_pairs(len(found), 5), Design("all-sites", 0.3, 5, own=True), 8)
    wanted = bits(run_trials(task, shards))
    assert bits(run_trials(task, shards, run=Run(crew=crew))) == wanted
    assert bits(run_trials(task, shards, run=Hit(crew=crew))) == wanted


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


CLIENT = """
import sys
from test_ray import over
from test_runs import equal
from mscompile.runs.workers import crew_of
crew = crew_of(sys.argv[1])
print("same" if equal(over(crew), over(None)) else "different")
crew.close()
"""


@with_ray
def test_an_address_of_the_client(cluster: Any):
    """In processes of their own: Ray reads once who may connect."""
    del cluster  # it has set PYTHONPATH
    pytest.importorskip("grpc", reason="ray:// takes ray[client]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
    environment.pop("RAY_ADDRESS", None)
    program = str(Path(sys.executable).with_name("ray"))
    start = [program, "start", "--head", "--port=0", "--num-cpus=2", "--include-dashboard=false"]
    done = subprocess.run(
        [*start, f"--ray-client-server-port={port}"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    client = [sys.executable, "-c", CLIENT, f"ray://127.0.0.1:{port}"]
    try:
        done = subprocess.run(client, capture_output=True, text=True, timeout=120, env=environment, check=False)
    finally:
        subprocess.run([program, "stop", "--force"], check=False, capture_output=True, timeout=120)
    assert done.stdout.split()[-1:] == ["same"], done.stdout + done.stderr


HERE = """
import psutil
from test_ray import over
from test_runs import equal
from mscompile.runs.workers import crew_of
crew = crew_of("ray")
listening = [c for p in psutil.Process().children(recursive=True) for c in p.net_connections() if c.status == "LISTEN"]
assert listening
assert all(c.laddr.ip.removeprefix("::ffff:") == "127.0.0.1" for c in listening), listening
print("same" if equal(over(crew), over(None)) else "different")
crew.close()
"""


@with_ray
def test_a_cluster_of_its_own_listens_to_this_machine_only(cluster: Any):
    del cluster
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # the test's own import of Ray comes first
    done = subprocess.run(
        [sys.executable, "-c", HERE], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.stdout.split()[-1:] == ["same"], done.stdout + done.stderr


@with_ray
def test_no_cluster_at_an_address(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "1")
    with pytest.raises(ResourceError, match="no workers") as error:
        crew_of("ray://127.0.0.1:1")
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to that of the cluster" in error.value.hint


@with_ray
def test_a_token_that_is_missing(tmp_path: Path):
    script = "from mscompile.runs.workers import crew_of; crew_of('ray://127.0.0.1:1')"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "token", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    last = done.stderr[done.stderr.rindex("mscompile.errors.") :]
    assert last.startswith("mscompile.errors.ResourceError: there are no workers")
    assert "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to that of the cluster" in last


@pytest.mark.skipif(ray is not None, reason="Ray is installed")
def test_without_ray():
    with pytest.raises(UnsupportedError, match=r"(?s)Ray is not installed.*mscompile\[ray\]"):
        crew_of("ray")
