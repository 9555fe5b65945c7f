"""Pieces made by other processes: Ray actors on this machine or on a cluster, each of which keeps its models loaded.

The run's folder stays this process's alone, so that nothing has to be shared but the network: an actor gets a piece and
the adapters that it lacks, and gives back the files that it made. A piece that is lost with its process or machine, or
that fails, is tried elsewhere; one that fails again and again is reported when the others are done.
"""

import contextlib
import logging
import os
import socket
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from misdirection.errors import InputError, MisdirectionError
from misdirection.files import remove
from misdirection.progress import track
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import Compute, LocalRunner, Task
from misdirection.runs.worker import BASE, Worker

log = logging.getLogger("misdirection")

TRIES = 3
"""So often is a piece tried before it is given up."""

# Seconds without any news after which the user is told what is waited for.
_PATIENCE = 60.0
# Seconds that workers have to clear up.
_GOODBYE = 10.0
# Seconds that files may be on their way before their worker is asked whether it is still there.
_ON_ITS_WAY = 10.0

Files = dict[str, bytes]
"""What is in a folder, by relative path."""

MakeWorker = Callable[[Callable[[str], Path]], Worker]
"""Makes the place where an actor computes, given what gives it a working folder for a stage; pickled."""


@dataclass(frozen=True)
class Workers:
    """The processes that make pieces.

    Attributes:
        count: how many; None is one for each GPU of the cluster, or for each machine where there is no GPU.
        address: of a running Ray cluster; None starts one on this machine for the length of the run.
        gpus: that each of them needs, if the cluster has any.
        memory: bytes of main memory that are kept free for each of them.
    """

    count: int | None = None
    address: str | None = None
    gpus: int = 0
    memory: int = 0


@dataclass
class _Unit:
    """Some stages of a piece, on their way."""

    piece: Task
    names: tuple[str, ...]
    causes: list[str] = field(default_factory=list)
    failed_on: object = None


@dataclass(frozen=True)
class _Made:
    """What an actor gives for a unit: files by stage, and how long they took."""

    files: dict[str, Files]
    seconds: float


@dataclass(frozen=True)
class _Failed:
    """Why an actor could not make a unit, in one line and in full."""

    cause: str
    trace: str = ""


class _Queue:
    """Units that wait, by the model that they need."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[_Unit]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, unit: _Unit) -> None:
        """Put a unit behind those of its model."""
        self._waiting.setdefault(unit.piece.model, deque()).append(unit)

    def take(self, worker: "_Worker", alone: bool) -> _Unit | None:
        """The next unit for a worker: of the model that it has, else of the one that most units need.

        None when all that wait have failed on this worker and there are others.
        """
        own = self._waiting.get(worker.model, deque())
        others = sorted((one for one in self._waiting.values() if one is not own), key=len, reverse=True)
        for units in (own, *others):
            # Units that failed here stand at the end, so that this looks at few.
            for number, unit in enumerate(units):
                if alone or unit.failed_on is not worker:
                    del units[number]
                    return unit
        return None


@dataclass(eq=False)
class _Worker:
    """An actor, the model that it has loaded and the adapters that it has."""

    actor: Any
    model: str = BASE
    has: set[tuple[str, Path]] = field(default_factory=set)


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
    gpus: int
    memory: int

    def device(self, asked: str) -> str:
        """Where the workers' models are, whatever this machine has: `auto` is a GPU if each has one."""
        return ("cuda" if self.gpus else "cpu") if asked == "auto" else asked


@contextlib.contextmanager
def connect(workers: Workers) -> Iterator[Cluster]:
    """Connect to a cluster, or start one on this machine, for the length of the context.

    Raises `InputError` when Ray is not installed, the cluster is not there, or has no room for the workers.
    """
    ray = _connected(workers)
    try:
        yield _cluster(ray, workers)
    finally:
        ray.shutdown()


class RayRunner:
    """Makes pieces on Ray actors; a context manager that ends them.

    Args:
        run: where the artifacts are kept.
        make_place: makes the place where an actor computes; it is pickled.
        cluster: where the actors are started.
    """

    def __init__(self, run: RunFolder, make_place: MakeWorker, cluster: Cluster) -> None:
        self._run, self._ray, self._count = run, cluster.ray, cluster.count
        self._here = LocalRunner(run, make_place(run.partial))
        needs = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "memory": cluster.memory or None}
        self._hire = partial(cluster.ray.remote(_Actor).options(max_restarts=0, **needs).remote, make_place)
        self._needs = f"{cluster.gpus} GPUs and {cluster.memory / 2**30:.1f} GiB"
        self._idle: list[_Worker] = []
        self._busy: dict[Any, tuple[_Worker, _Unit]] = {}
        self._starting: dict[Any, _Worker] = {}
        self._adapters: dict[Path, Any] = {}
        self._fill()

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        if left := [worker.actor.leave.remote() for worker in self._idle]:
            self._ray.wait(left, num_returns=len(left), timeout=_GOODBYE)

    def make(self, pieces: Sequence[Task]) -> None:
        """Make those stages of the pieces that have no artifact that holds.

        Raises `InputError` that names the pieces which failed, when all others are done.
        """
        queue, here = _Queue(), []
        for unit in self._units(pieces):
            if unit.piece.here:
                here.append(unit)
            else:
                queue.add(unit)
        failed = self._drain(queue) if queue else []
        self._here.make([unit.piece for unit in here])
        if failed:
            each = "; ".join(f"{', '.join(unit.names)}: {unit.causes[-1]}" for unit in failed)
            raise InputError(
                f"failed {TRIES} times ({len(failed)} of {len(pieces)} pieces; the others are done, and the same "
                f"command tries these again): {each}"
            )

    def _units(self, pieces: Sequence[Task]) -> Iterator[_Unit]:
        seen: set[str] = set()
        for piece in pieces:
            names = tuple(name for name in self._run.missing(piece.stages) if name not in seen)
            seen.update(names)
            if names:
                yield _Unit(piece, names)

    def _drain(self, queue: _Queue) -> list[_Unit]:
        """Make all units that wait; gives those that could not be made."""
        failed: list[_Unit] = []
        self._fill()
        with track(f"pieces on {len(self._idle) + len(self._starting)} workers", len(queue)) as advance:
            while queue or self._busy:
                self._hand_out(queue)
                done = self._next()
                if done in self._starting:
                    self._started(done)
                    continue
                worker, unit = self._busy.pop(done)
                cause = self._taken(done, worker, unit)
                if cause is None:
                    advance(1)
                    continue
                again = _again(unit, cause, worker)
                for each in again:
                    queue.add(each)
                failed += [] if again else [unit]
        return failed

    def _next(self) -> Any:
        """The reference that is ready first: of a piece, or of an actor that was started."""
        while True:
            # Ready wherever it is: to wait for what is on its way would hold up the others.
            waited = [*self._busy, *self._starting]
            done, _ = self._ray.wait(waited, num_returns=1, timeout=_PATIENCE, fetch_local=False)
            if done:
                return done[0]
            if not self._busy:
                log.warning("no worker has started yet: each needs %s; the cluster has too little free", self._needs)

    # --- units --------------------------------------------------------------------------------------------------------

    def _hand_out(self, queue: _Queue) -> None:
        for worker in list(self._idle):
            alone = len(self._idle) + len(self._busy) == 1
            if unit := queue.take(worker, alone):
                self._idle.remove(worker)
                worker.model = unit.piece.model
                made = worker.actor.compute.remote(unit.piece.compute, unit.names, self._lacking(worker, unit.piece))
                self._busy[made] = (worker, unit)

    def _taken(self, made: Any, worker: _Worker, unit: _Unit) -> str | None:
        """Keep what a worker made; else the cause, with another worker in its place if it is lost."""
        try:
            outcome = self._fetched(made, worker)
        except self._ray.exceptions.RayError as error:
            self._replace(worker)
            cause = f"its worker was lost ({_first_line(error)})"
            log.warning("%s: %s", unit.names[0], cause)
            return cause
        self._idle.append(worker)
        if isinstance(outcome, _Failed):
            if outcome.trace:
                log.warning("%s failed:\n%s", unit.names[0], outcome.trace)
            return outcome.cause
        worker.has.update(unit.piece.adapters.items())
        self._run.stages(_inputs(unit), partial(_write_all, outcome.files), outcome.seconds)
        return None

    def _fetched(self, made: Any, worker: _Worker) -> _Made | _Failed:
        """What a worker made; an error of Ray when its host is lost while that is on its way."""
        while True:
            try:
                outcome: _Made | _Failed = self._ray.get(made, timeout=_ON_ITS_WAY)
                return outcome
            except self._ray.exceptions.GetTimeoutError:
                # Ray itself may never say that an object is lost of which a part has come.
                self._ray.get(worker.actor.ready.remote())

    def _lacking(self, worker: _Worker, piece: Task) -> dict[str, Any]:
        """References to the files of those adapters of the piece that this worker has not got, by name."""
        lacking = dict(piece.adapters.items() - worker.has)
        for folder in lacking.values():
            if folder not in self._adapters:
                # What lies deeper, such as the checkpoints of its training, is no part of an adapter.
                self._adapters[folder] = self._ray.put(_read(folder, "*"))
        return {name: self._adapters[folder] for name, folder in lacking.items()}

    # --- workers ------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start as many workers as are missing, which could not be started before."""
        self._failed_starts = 0
        for _ in range(self._count - len(self._idle) - len(self._busy) - len(self._starting)):
            self._start()

    def _start(self) -> None:
        actor = self._hire()
        self._starting[actor.ready.remote()] = _Worker(actor)

    def _started(self, ready: Any) -> None:
        """Take up an actor that answers; start another one in the place of one that does not, a few times."""
        worker = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts < TRIES:
                self._start()
            elif not (self._idle or self._busy or self._starting):
                raise InputError(f"no worker can be started: {_last_line(error)}") from error
        else:
            self._failed_starts = 0
            self._idle.append(worker)

    def _replace(self, worker: _Worker) -> None:
        # One that cannot be reached may still be at work.
        self._ray.kill(worker.actor)
        self._start()


class _Actor:
    """What runs in a worker process."""

    def __init__(self, make_place: MakeWorker) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="misdirection-")
        self._place = make_place(self._partial)
        self._working = Path(self._home.name)

    def ready(self) -> None:
        """Answer when the process has started."""

    def leave(self) -> None:
        """Take away what it has on its disk: Ray ends the process without a word."""
        self._home.cleanup()

    def compute(self, compute: Compute, names: Sequence[str], adapters: Mapping[str, Any]) -> _Made | _Failed:
        """Make some stages of a piece."""
        try:
            for name, files in adapters.items():
                folder = Path(self._home.name) / "adapters" / name
                remove(folder)
                _write(_get(files), folder)
                self._place.adapters[name] = folder
            with tempfile.TemporaryDirectory(dir=self._home.name) as working:
                self._working = Path(working)
                return self._compute(compute, names)
        except MisdirectionError as error:
            return _Failed(str(error))
        except Exception as error:
            return _Failed(f"{type(error).__name__}: {_first_line(error)}", traceback.format_exc())

    def _compute(self, compute: Compute, names: Sequence[str]) -> _Made:
        folders = {name: self._working / str(number) for number, name in enumerate(names)}
        for folder in folders.values():
            folder.mkdir()
        started = time.monotonic()
        compute(self._place, folders)
        seconds = time.monotonic() - started
        return _Made({name: _read(folder) for name, folder in folders.items()}, seconds)

    def _partial(self, _stage: str) -> Path:
        """Working files of the piece in hand; they go with it."""
        folder = self._working / "partial"
        folder.mkdir(exist_ok=True)
        return folder


def _again(unit: _Unit, cause: str, worker: _Worker) -> list[_Unit]:
    """What is tried after a failure: the unit; then each of its stages alone; then nothing more."""
    unit.causes.append(cause)
    unit.failed_on = worker
    if len(unit.causes) < TRIES:
        return [unit]
    return [_Unit(unit.piece, (name,)) for name in unit.names] if len(unit.names) > 1 else []


def _inputs(unit: _Unit) -> dict[str, Mapping[str, Any]]:
    return {name: unit.piece.stages[name] for name in unit.names}


def _connected(workers: Workers) -> Any:
    """The library, connected to the cluster that is asked for."""
    # Ray asks for leave to tell its makers what it was used for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # It would write pages of these to standard output, which is for results.
    lost = "^(A worker died or was killed|The node with node id|Raylet is terminated)"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", lost)
    try:
        import ray
    except ImportError as error:
        raise InputError("workers: Ray is not installed: pip install 'misdirection[ray]'") from error
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if workers.address is None:
        # Without an address Ray would join one that it knows of.
        ray.init("local", include_dashboard=False, **quiet)
        return ray
    try:
        _knock(workers.address)
        ray.init(workers.address, **quiet)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise InputError(
            f"ray: no cluster answers at {workers.address} ({_first_line(error)}): start one with `ray start --head`; "
            "for one that asks for a token, set RAY_AUTH_MODE=token"
        ) from error
    return ray


def _knock(address: str) -> None:
    """See whether anybody listens; Ray would try for a quarter of an hour."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal() and "://" not in address:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def _cluster(ray: Any, workers: Workers) -> Cluster:
    there = ray.cluster_resources()
    gpus = workers.gpus if there.get("GPU", 0) else 0
    count = workers.count or max(1, int(there["GPU"]) // gpus if gpus else sum(node["Alive"] for node in ray.nodes()))
    # What a cluster's machines have is not this one's business.
    cpus = 1 if workers.address else max(1, int(there["CPU"]) // count)
    # A cluster may grow.
    wanted = {"CPU": (cpus, 1, "CPUs"), "GPU": (gpus, 1, "GPUs"), "memory": (workers.memory, 2**30, "GiB of memory")}
    for name, (each, size, unit) in wanted.items() if workers.address is None else ():
        if count * each > there.get(name, 0):
            raise InputError(
                f"{count} workers of {each / size:.3g} {unit} each have no room: this machine has "
                f"{there.get(name, 0) / size:.3g} {unit} for them: ask for fewer"
            )
    return Cluster(ray, count, cpus, gpus, workers.memory)


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _read(folder: Path, pattern: str = "**/*") -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _write_all(files: Mapping[str, Files], folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        _write(files[name], folder)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
