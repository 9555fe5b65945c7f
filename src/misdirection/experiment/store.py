"""One experiment's folder: stages that are run once, artifacts known by their hash, one process at a time.

experiment.yaml   the configuration
manifest.json     per stage: key of its inputs, hash of its artifact, seconds
artifacts/NAME/   what a stage wrote
partial/NAME/     working files of a stage that can continue by itself
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from misdirection.errors import MisdirectionError
from misdirection.files import TEMPORARY, atomic_folder, read_json, sha256_tree, write_atomic, write_json

log = logging.getLogger("misdirection")


class Run:
    """An open run folder; made by `Run.open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stages: dict[str, dict[str, Any]] = self._read_manifest()
        self._checked: set[str] = set()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, experiment_yaml: str) -> "Iterator[Run]":
        """Open `folder`, made if need be, for this process alone.

        The lock is the operating system's, so that it goes with a killed process. Raises `MisdirectionError` when
        another process has the folder, or it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / ".lock", timeout=0)
            lock.acquire()
        except Timeout as error:
            raise MisdirectionError(f"{folder}: another run is at work here; wait for it or choose --out") from error
        except OSError as error:
            raise MisdirectionError(f"{folder}: cannot be used ({error.strerror}); choose another --out") from error
        try:
            _remove_leftovers(folder)
            write_atomic(folder / "experiment.yaml", experiment_yaml)
            yield cls(folder)
        finally:
            lock.release()

    def stage(self, name: str, inputs: Mapping[str, Any], compute: Callable[[Path], None]) -> Path:
        """The artifact folder of a stage; `compute` is called with a folder to fill when there is none that holds.

        An artifact holds when its inputs have the key that it was made from and its hash is as recorded.
        """
        artifact = self.folder / "artifacts" / name
        key = _key(inputs)
        if self._holds(name, key, artifact):
            return artifact
        self._keep_partial(name, key)
        started = time.monotonic()
        with atomic_folder(artifact) as temporary:
            compute(temporary)
        seconds = round(time.monotonic() - started, 2)
        record = {"key": key, "sha256": sha256_tree(artifact), "seconds": seconds, "inputs": dict(inputs)}
        self._stages[name] = record
        self._checked.add(name)
        write_json(self.folder / "manifest.json", {"stages": self._stages})
        shutil.rmtree(self._partial(name), ignore_errors=True)
        return artifact

    def partial(self, name: str) -> Path:
        """A working folder that outlives a kill, and goes when the stage is done or its inputs change."""
        folder = self._partial(name) / "work"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def digest(self, name: str) -> str:
        """Hash of a stage's artifact, for the inputs of stages that use it."""
        return str(self._stages[name]["sha256"])

    def seconds(self) -> dict[str, float]:
        """How long each stage took when it was run."""
        return {name: record["seconds"] for name, record in sorted(self._stages.items())}

    def _holds(self, name: str, key: str, artifact: Path) -> bool:
        record = self._stages.get(name)
        if record is None or record["key"] != key:
            return False
        # Within one process an artifact is read once to be checked; the lock keeps others from changing it.
        if name in self._checked:
            return True
        if not artifact.is_dir() or sha256_tree(artifact) != record["sha256"]:
            log.warning("%s: missing or damaged (its hash is not the recorded one); it is made again", artifact)
            return False
        self._checked.add(name)
        return True

    def _partial(self, name: str) -> Path:
        return self.folder / "partial" / name

    def _keep_partial(self, name: str, key: str) -> None:
        """Empty the working folder unless it was begun for the same inputs."""
        folder = self._partial(name)
        mark = folder / "key"
        if mark.is_file() and mark.read_text() == key:
            return
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(mark, key)

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "manifest.json"
        if not path.exists():
            return {}
        try:
            stages: dict[str, dict[str, Any]] = read_json(path)["stages"]
            return stages
        except (MisdirectionError, KeyError, TypeError):
            log.warning("%s: damaged; every stage is run again", path)
            return {}


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Temporary files and folders of a process that was killed."""
    for path in folder.rglob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
