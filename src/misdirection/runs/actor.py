"""A worker process: takes the files of adapters, computes some stages of a task, and gives back their files."""

import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from misdirection.errors import MisdirectionError, first_line
from misdirection.files import TEMPORARY, remove
from misdirection.runs.tasks import Compute
from misdirection.runs.worker import Worker

Files = dict[str, bytes]
"""A folder's files, by relative path."""

MakeWorker = Callable[[Callable[[str], Path]], Worker]
"""Makes the worker, given what gives it a working folder for a stage; pickled."""


@dataclass(frozen=True)
class Artifacts:
    """The files of some stages, by stage, and how long they took."""

    files: dict[str, Files]
    seconds: float


@dataclass(frozen=True)
class Failure:
    """Why stages could not be made, in one line and in full."""

    cause: str
    trace: str = ""


class Actor:
    """Runs in a worker process; Ray calls it."""

    def __init__(self, make_worker: MakeWorker) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="misdirection-")
        self._worker = make_worker(self._partial)
        self._working = Path(self._home.name)

    def ready(self) -> None:
        """Answer when the process has started."""

    def leave(self) -> None:
        """Take away what it has on its disk: Ray ends the process without a word."""
        self._home.cleanup()

    def compute(self, compute: Compute, names: Sequence[str], adapters: Mapping[str, Any]) -> Artifacts | Failure:
        """Make some stages of a task."""
        try:
            for name, files in adapters.items():
                folder = Path(self._home.name) / "adapters" / name
                remove(folder)
                write_files(_get(files), folder)
                self._worker.adapters[name] = folder
            with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=self._home.name) as working:
                self._working = Path(working)
                return self._compute(compute, names)
        except MisdirectionError as error:
            return Failure(str(error))
        except Exception as error:
            return Failure(f"{type(error).__name__}: {first_line(error)}", traceback.format_exc())

    def _compute(self, compute: Compute, names: Sequence[str]) -> Artifacts:
        folders = {name: self._working / str(number) for number, name in enumerate(names)}
        for folder in folders.values():
            folder.mkdir()
        started = time.monotonic()
        compute(self._worker, folders)
        seconds = time.monotonic() - started
        return Artifacts({name: read_files(folder) for name, folder in folders.items()}, seconds)

    def _partial(self, _stage: str) -> Path:
        """Working files of the task in hand; they go with it."""
        folder = self._working / "partial"
        folder.mkdir(exist_ok=True)
        return folder


def _get(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def read_files(folder: Path, pattern: str = "**/*") -> Files:
    """The files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob(pattern) if path.is_file()}


def write_files(files: Files, folder: Path) -> None:
    """Write them into a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
