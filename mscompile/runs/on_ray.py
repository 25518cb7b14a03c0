"""Workers on Ray: actors on whatever machines a cluster has, one for each of its processors."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from typing import Any

from mscompile.errors import ResourceError, UnsupportedError
from mscompile.runs.worker import Desk
from mscompile.runs.workers import Content, Crew, LostError

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Variable that keeps Ray from listening to the network where it is 0, on any system."""

REACHED = "check that the cluster runs and can be reached"
ASKING = (
    "; if it asks for a token, which without the right one shows only in waiting in vain, set RAY_AUTH_MODE=token, and "
    "RAY_AUTH_TOKEN to that of the cluster"
)
"""What Ray does not say."""


class Actor:
    """A worker that is a Ray actor."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._desk = ray.remote(num_cpus=1, max_restarts=0, max_task_retries=0)(Desk).remote(1)

    def send(self, content: bytes) -> Future[Content]:
        """See `workers.Worker`."""
        answer: Future[Content] = Future()

        def pass_on(found: Future[bytes]) -> None:
            error = found.exception()
            if error is None:
                answer.set_result(found.result())
            else:  # the actor answers its own errors: what is raised here says that it is gone
                answer.set_exception(LostError((str(error).strip().splitlines() or [type(error).__name__])[0][:400]))

        self._desk.answer.remote(content).future().add_done_callback(pass_on)
        return answer

    def stop(self) -> None:
        """See `workers.Worker`."""
        self._ray.kill(self._desk)


def ray_crew(address: str) -> Crew:
    """Workers on the cluster at ``ray://HOST:PORT``; for ``ray`` on that of RAY_ADDRESS, or else one of this machine alone.

    One that is started here listens on this machine only, and has no dashboard.

    Raises
    ------
    UnsupportedError
        Ray is not installed.
    ResourceError
        There is no cluster at the address.
    """
    given = address if address != "ray" else os.environ.get("RAY_ADDRESS")
    if not given:
        os.environ.setdefault(LOOPBACK, "0")  # read when Ray is imported
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UnsupportedError(
            "Ray is not installed",
            where=f"--workers {address}",
            why=str(error),
            hint="pip install 'mscompile[ray]', or use processes of this machine: --workers 4",
        ) from error
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not given:
        options["include_dashboard"] = False
    try:
        ray.init(given or "local", **options)
        if not given and (listens := ray.util.get_node_ip_address()) != "127.0.0.1":
            ray.shutdown()
            raise ConnectionError(f"it would listen at {listens}: set {LOOPBACK}=0 before Ray is imported")
        count = int(ray.cluster_resources().get("CPU", 1))
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise ResourceError(
            "there are no workers",
            where=f"--workers {address}",
            why=str(error).strip()[:400],
            hint=f"{REACHED}{ASKING if given else ''}; or use processes of this machine: --workers 4",
        ) from error
    return Crew(count, lambda: Actor(ray), ray.shutdown, elsewhere=bool(given))
