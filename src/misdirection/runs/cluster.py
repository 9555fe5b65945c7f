"""A Ray cluster, and the workers that are wanted of it."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from misdirection.errors import InputError, NetworkProblem, first_line
from misdirection.extras import needed_for


@dataclass(frozen=True)
class Workers:
    """The processes that do the tasks of a run.

    Attributes:
        count: how many; None is one for each GPU of the cluster, or for each machine where there is no GPU.
        address: of a running Ray cluster; None starts one on this machine for the length of the run.
        gpus: that each of them needs, if the cluster has any; below 1, a part of one that they share.
        memory: bytes of main memory that are kept free for each of them.
    """

    count: int | None = None
    address: str | None = None
    gpus: float = 0
    memory: int = 0

    def __post_init__(self) -> None:
        """Raise `InputError` for GPUs that cannot be given."""
        if not (self.gpus % 1 == 0 or 0.01 <= self.gpus < 1):
            raise InputError(f"{self.gpus:g} GPUs for each worker: give a whole number, or 0.01 to 1 to share one")


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process is connected to, and the workers that it is to have; made by `connect`.

    Attributes:
        ray: the library.
        count: number of workers.
        cpus, gpus, memory: what each needs: threads, GPUs, bytes of main memory.
    """

    ray: Any
    count: int
    cpus: int
    gpus: float
    memory: int

    def device(self, asked: str) -> str:
        """Where the workers' models are, whatever this machine has: `auto` is a GPU if each has one, or all it has."""
        if asked != "auto":
            return asked
        return "balanced" if self.gpus > 1 else "cuda" if self.gpus else "cpu"

    @classmethod
    def of(cls, ray: Any, workers: Workers) -> "Cluster":
        """The workers that a connected cluster has room for; `InputError` where there is none."""
        resources = ray.cluster_resources()
        gpus = workers.gpus if resources.get("GPU", 0) else 0
        room = int(resources["GPU"] / gpus + 1e-6) if gpus else sum(node["Alive"] for node in ray.nodes())
        count = workers.count or max(1, room)
        # What a cluster's machines have is not this one's business.
        cpus = 1 if workers.address else max(1, int(resources["CPU"]) // count)
        # A cluster may grow.
        wanted = {
            "CPU": (cpus, 1, "CPUs"),
            "GPU": (gpus, 1, "GPUs"),
            "memory": (workers.memory, 2**30, "GiB of memory"),
        }
        for name, (each, size, unit) in wanted.items() if workers.address is None else ():
            if count * each > resources.get(name, 0):
                raise InputError(
                    f"{count} workers of {each / size:.3g} {unit} each have no room: this machine has "
                    f"{resources.get(name, 0) / size:.3g} {unit} for them: ask for fewer"
                )
        return cls(ray, count, cpus, gpus, workers.memory)


@contextlib.contextmanager
def connect(workers: Workers) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine, for the length of the context.

    Raises:
        MissingPackage: Ray is not installed.
        NetworkProblem: the cluster is not there.
        InputError: it has no room for the workers.
    """
    ray = _connected(workers)
    try:
        yield Cluster.of(ray, workers)
    finally:
        ray.shutdown()


def _connected(workers: Workers) -> Any:
    """The library, connected to the cluster that is asked for."""
    # Ray asks for leave to tell its makers what it was used for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It would write pages of these to standard output, which is for results.
    lost = "^(A worker died or was killed|The node with node id|Raylet is terminated)"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", lost)
    with needed_for("ray"):
        import ray
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if workers.address is None:
        # Without an address Ray would join one that it knows of.
        ray.init("local", include_dashboard=False, **quiet)
        return ray
    try:
        _knock(workers.address)
        ray.init(workers.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise NetworkProblem(
            f"ray: no cluster answers at {workers.address} ({first_line(error)}): start one with `ray start --head`; "
            "for one that asks for a token, set RAY_AUTH_MODE=token"
        ) from error
    return ray


def _knock(address: str) -> None:
    """See whether anybody listens; Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
