"""Tasks done by other processes: Ray actors on this machine or on a cluster, each of which keeps its models loaded.

The run's folder stays this process's alone, so that nothing has to be shared but the network: an actor gets a task and
the adapters that it lacks, and gives back the files that it made. A task that is lost with its process or machine, or
that fails, is tried elsewhere; one that fails again and again is reported when the others are done.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from misdirection.errors import WorkerError, first_line, last_line
from misdirection.progress import track
from misdirection.runs.actor import Actor, Artifacts, Failure, Files, MakeWorker, read_files, write_files
from misdirection.runs.cluster import Cluster
from misdirection.runs.folder import RunFolder
from misdirection.runs.queue import TRIES, ActorHandle, Queue, Share
from misdirection.runs.tasks import LocalRunner, Task

log = logging.getLogger("misdirection")

# Seconds without any news after which the user is told what is waited for.
_PATIENCE = 60.0
# Seconds that workers have to clear up.
_GOODBYE = 10.0
# Seconds that files may be on their way before their worker is asked whether it is still there.
_ON_ITS_WAY = 10.0


class RayRunner:
    """Does tasks on Ray actors; a context manager that ends them.

    Args:
        run: where the artifacts are kept.
        make_worker: makes the worker of an actor; it is pickled.
        cluster: where the actors are started.
    """

    def __init__(self, run: RunFolder, make_worker: MakeWorker, cluster: Cluster) -> None:
        self._run, self._ray, self._count = run, cluster.ray, cluster.count
        self._here = LocalRunner(run, make_worker(run.partial))
        needs = {"num_cpus": cluster.cpus, "num_gpus": cluster.gpus, "memory": cluster.memory or None}
        self._hire = partial(cluster.ray.remote(Actor).options(max_restarts=0, **needs).remote, make_worker)
        self._needs = f"{cluster.gpus:g} GPUs and {cluster.memory / 2**30:.1f} GiB"
        self._idle: list[ActorHandle] = []
        self._busy: dict[Any, tuple[ActorHandle, Share]] = {}
        self._starting: dict[Any, ActorHandle] = {}
        self._adapters: dict[Path, Any] = {}
        self._fill()

    def __enter__(self) -> "RayRunner":
        return self

    def __exit__(self, *_: object) -> None:
        if left := [worker.actor.leave.remote() for worker in self._idle]:
            self._ray.wait(left, num_returns=len(left), timeout=_GOODBYE)

    def make(self, tasks: Sequence[Task]) -> None:
        """Make those artifacts of the tasks that are not there, or do not hold.

        Raises `WorkerError` that names the tasks which failed, when all others are done.
        """
        queue, here = Queue(), []
        for share in self._shares(tasks):
            if share.task.here:
                here.append(share)
            else:
                queue.add(share)
        failed = self._drain(queue) if queue else []
        self._here.make([share.task for share in here])
        if failed:
            each = "; ".join(f"{', '.join(share.names)}: {share.causes[-1]}" for share in failed)
            raise WorkerError(
                f"failed {TRIES} times ({len(failed)} of {len(tasks)} tasks; the others are done, and the same "
                f"command tries these again): {each}"
            )

    def _shares(self, tasks: Sequence[Task]) -> Iterator[Share]:
        seen: set[str] = set()
        for task in tasks:
            names = tuple(name for name in self._run.missing(task.stages) if name not in seen)
            seen.update(names)
            if names:
                yield Share(task, names)

    def _drain(self, queue: Queue) -> list[Share]:
        """Make all shares that wait; gives those that could not be made."""
        failed: list[Share] = []
        self._fill()
        with track(f"tasks on {len(self._idle) + len(self._starting)} workers", len(queue)) as advance:
            while queue or self._busy:
                self._hand_out(queue)
                done = self._next()
                if done in self._starting:
                    self._started(done)
                    continue
                worker, share = self._busy.pop(done)
                cause = self._taken(done, worker, share)
                if cause is None:
                    advance(1)
                    continue
                retries = share.retries(cause, worker)
                for retry in retries:
                    queue.add(retry)
                failed += [] if retries else [share]
        return failed

    def _next(self) -> Any:
        """The reference that is ready first: of a share, or of an actor that was started."""
        while True:
            # A result that is ready on its worker: to wait until it is here would hold up the others.
            waited = [*self._busy, *self._starting]
            done, _ = self._ray.wait(waited, num_returns=1, timeout=_PATIENCE, fetch_local=False)
            if done:
                return done[0]
            if not self._busy:
                log.warning("no worker has started yet: each needs %s; the cluster has too little free", self._needs)

    # --- shares -------------------------------------------------------------------------------------------------------

    def _hand_out(self, queue: Queue) -> None:
        for worker in list(self._idle):
            alone = len(self._idle) + len(self._busy) == 1
            if share := queue.take(worker, alone):
                self._idle.remove(worker)
                worker.model = share.task.model
                reference = worker.actor.compute.remote(
                    share.task.compute, share.names, self._lacking(worker, share.task)
                )
                self._busy[reference] = (worker, share)

    def _taken(self, reference: Any, worker: ActorHandle, share: Share) -> str | None:
        """Keep what a worker made; else the cause, with another worker instead of one that is lost."""
        try:
            outcome = self._fetched(reference, worker)
        except self._ray.exceptions.RayError as error:
            self._replace(worker)
            cause = f"its worker was lost ({first_line(error)})"
            log.warning("%s: %s", share.names[0], cause)
            return cause
        self._idle.append(worker)
        if isinstance(outcome, Failure):
            if outcome.trace:
                log.warning("%s failed:\n%s", share.names[0], outcome.trace)
            return outcome.cause
        worker.has.update(share.task.adapters.items())
        inputs = {name: share.task.stages[name] for name in share.names}
        self._run.stages(inputs, partial(_write_all, outcome.files), outcome.seconds)
        return None

    def _fetched(self, reference: Any, worker: ActorHandle) -> Artifacts | Failure:
        """The result of a worker; an error of Ray when its host is lost while that is on its way."""
        while True:
            try:
                outcome: Artifacts | Failure = self._ray.get(reference, timeout=_ON_ITS_WAY)
                return outcome
            except self._ray.exceptions.GetTimeoutError:
                # Ray itself may never say that an object is lost of which a part has come.
                self._ray.get(worker.actor.ready.remote())

    def _lacking(self, worker: ActorHandle, task: Task) -> dict[str, Any]:
        """References to the files of those adapters of the task that this worker has not got, by name."""
        lacking = dict(task.adapters.items() - worker.has)
        for folder in lacking.values():
            if folder not in self._adapters:
                # What lies deeper, such as the checkpoints of its training, is no part of an adapter.
                self._adapters[folder] = self._ray.put(read_files(folder, "*"))
        return {name: self._adapters[folder] for name, folder in lacking.items()}

    # --- workers ------------------------------------------------------------------------------------------------------

    def _fill(self) -> None:
        """Start as many workers as are missing, which could not be started before."""
        self._failed_starts = 0
        for _ in range(self._count - len(self._idle) - len(self._busy) - len(self._starting)):
            self._start()

    def _start(self) -> None:
        actor = self._hire()
        self._starting[actor.ready.remote()] = ActorHandle(actor)

    def _started(self, ready: Any) -> None:
        """Take up an actor that answers; start another one instead of one that does not, a few times."""
        worker = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            self._failed_starts += 1
            if self._failed_starts < TRIES:
                self._start()
            elif not (self._idle or self._busy or self._starting):
                raise WorkerError(f"no worker can be started: {last_line(error)}") from error
        else:
            self._failed_starts = 0
            self._idle.append(worker)

    def _replace(self, worker: ActorHandle) -> None:
        # One that cannot be reached may still be at work.
        self._ray.kill(worker.actor)
        self._start()


def _write_all(files: Mapping[str, Files], folders: Mapping[str, Path]) -> None:
    for name, folder in folders.items():
        write_files(files[name], folder)
