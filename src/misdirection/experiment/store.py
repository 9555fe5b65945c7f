"""One experiment's folder: stages that are run once, artifacts known by their hash, one process at a time.

experiment.yaml   the configuration
manifest.json     per stage: key and text of its inputs, hash of its artifact, seconds
artifacts/NAME/   what a stage wrote
partial/NAME/     working files of a stage that can continue by itself
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from misdirection.errors import MisdirectionError
from misdirection.files import (
    TEMPORARY,
    atomic_folder,
    read_json,
    remove,
    sha256_tree,
    write_atomic,
    write_errors,
    write_json,
)

log = logging.getLogger("misdirection")

Notify = Callable[[str], None]
"""Takes one line that the user should read."""


class Run:
    """An open run folder; made by `Run.open`."""

    def __init__(self, folder: Path, notify: Notify = log.warning) -> None:
        self.folder = folder
        self._notify = notify
        self._stages: dict[str, dict[str, Any]] = self._read_manifest()
        self._checked: set[str] = set()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, experiment_yaml: str, notify: Notify = log.warning) -> "Iterator[Run]":
        """Open `folder`, made if need be, for this process alone.

        The lock is the operating system's, so that it goes with a killed process. Raises `MisdirectionError` when
        another process has the folder, or it cannot be written.
        """
        lock = _lock(folder)
        try:
            _remove_leftovers(folder)
            write_atomic(folder / "experiment.yaml", experiment_yaml)
            yield cls(folder, notify)
        finally:
            lock.release()

    def stage(self, name: str, inputs: Mapping[str, Any], compute: Callable[[Path], Any]) -> Path:
        """The artifact folder of a stage; `compute` is called with a folder to fill when there is none that holds.

        An artifact holds when its inputs have the key that it was made from and its hash is as recorded.
        """
        self._check_name(name)
        key = _key(inputs)
        if not self._holds(name, key):
            self._keep_partial(name, key)
            self._make(name, key, inputs, compute)
        # The artifact is there; working files that cannot be deleted only take space.
        with suppress(OSError):
            self._drop_partial(name)
        return self.artifact(name)

    def holds(self, name: str, inputs: Mapping[str, Any]) -> bool:
        """Whether `stage` would find the artifact there and not call `compute`."""
        return self._holds(name, _key(inputs))

    def artifact(self, name: str) -> Path:
        """Where a stage's artifact is, or will be."""
        return self.folder / "artifacts" / name

    def partial(self, name: str) -> Path:
        """A working folder that outlives a kill, and goes when the stage is done or its inputs change.

        For use inside the stage's `compute`: what was in it before belongs to the same inputs.
        """
        folder = self._partial(name) / "work"
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def digest(self, name: str) -> str:
        """Hash of a stage's artifact, for the inputs of stages that use it."""
        return str(self._stages[name]["sha256"])

    def seconds(self) -> dict[str, float]:
        """How long each stage took when it was run."""
        return {name: record["seconds"] for name, record in sorted(self._stages.items())}

    def _check_name(self, name: str) -> None:
        """Refuse a name that leads out of the folder, or into or around another stage's artifact."""
        if any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in name.split("/")):
            raise MisdirectionError(f"{self.folder}: {name!r} cannot name a folder; choose a plain name")
        for other in self._stages:
            if name.startswith(f"{other}/") or other.startswith(f"{name}/"):
                raise MisdirectionError(
                    f"{self.folder}: {name!r} and {other!r} would share a folder; rename one or choose another --out"
                )

    def _holds(self, name: str, key: str) -> bool:
        record = self._stages.get(name)
        if record is None or record["key"] != key:
            return False
        # Within one process an artifact is read once to be checked; the lock keeps others from changing it.
        if name in self._checked:
            return True
        artifact = self.artifact(name)
        if not _intact(artifact, record["sha256"]):
            self._notify(f"{artifact}: missing or damaged (its hash is not the recorded one); it is made again")
            return False
        self._checked.add(name)
        return True

    def _make(self, name: str, key: str, inputs: Mapping[str, Any], compute: Callable[[Path], Any]) -> None:
        artifact = self.artifact(name)
        started = time.monotonic()
        with atomic_folder(artifact) as temporary:
            compute(temporary)
        seconds = round(time.monotonic() - started, 2)
        self._stages[name] = {
            "key": key,
            "sha256": sha256_tree(artifact),
            "seconds": seconds,
            "inputs": dict(inputs),
        }
        self._checked.add(name)
        write_json(self.folder / "manifest.json", {"stages": self._stages})

    def _partial(self, name: str) -> Path:
        return self.folder / "partial" / name

    def _keep_partial(self, name: str, key: str) -> None:
        """Empty the working folder unless it was begun for the same inputs."""
        mark = self._partial(name) / "key"
        with write_errors(mark):
            if mark.is_file() and mark.read_bytes() == key.encode():
                return
            self._drop_partial(name)
        write_atomic(mark, key)

    def _drop_partial(self, name: str) -> None:
        folder = self._partial(name)
        if folder.exists():
            # The mark goes first: after a kill in the middle, the remains belong to no inputs.
            (folder / "key").unlink(missing_ok=True)
            shutil.rmtree(folder)

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        path = self.folder / "manifest.json"
        if not path.exists():
            return {}
        try:
            return _records(read_json(path))
        except (MisdirectionError, ValueError):
            self._notify(f"{path}: damaged; every stage is run again")
            return {}


def _lock(folder: Path) -> FileLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise MisdirectionError(f"another run is using {folder}; wait for it to end or choose another --out") from error
    except OSError as error:
        raise MisdirectionError(f"{folder}: cannot be used ({error.strerror}); choose another --out") from error
    return lock


def _key(inputs: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _intact(artifact: Path, digest: str) -> bool:
    try:
        return artifact.is_dir() and sha256_tree(artifact) == digest
    except OSError:
        return False


def _records(manifest: Any) -> dict[str, dict[str, Any]]:
    """The stages of a manifest; `ValueError` when it is JSON of another form."""
    stages = manifest.get("stages") if isinstance(manifest, dict) else None
    if not isinstance(stages, dict) or not all(map(_is_record, stages.values())):
        raise ValueError("not a manifest")
    return stages


def _is_record(record: Any) -> bool:
    kinds: dict[str, type] = {"key": str, "sha256": str, "seconds": float, "inputs": dict}
    return isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())


def _remove_leftovers(folder: Path) -> None:
    """Temporary files and folders of a process that was killed.

    Only where a run writes them: the folder may be one in which the user keeps other things.
    """
    pattern = f"{TEMPORARY}*"
    inner = [path for part in ("artifacts", "partial") for path in (folder / part).rglob(pattern)]
    for path in [*folder.glob(pattern), *inner]:
        remove(path)
