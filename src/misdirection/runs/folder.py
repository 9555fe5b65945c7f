"""One experiment's folder: stages that are run once, artifacts known by their hash, one process at a time.

experiment.yaml   the configuration
manifest.jsonl    a line for each stage that was made: key and text of its inputs, hash of its artifact, seconds, and
                  what it was made together with
artifacts/NAME/   what a stage wrote
partial/NAME/     working files of a stage that can continue by itself
damaged/          artifacts that were found changed
runs/NAME/        runs of their own that belong to this one
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from filelock import FileLock, Timeout

from misdirection.errors import InputError
from misdirection.files import (
    TEMPORARY,
    append,
    atomic_folder,
    empty_working_folder,
    remove,
    remove_working_folder,
    require_replaceable,
    set_aside,
    sha256_tree,
    write_atomic,
    write_errors,
)
from misdirection.results import Result

log = logging.getLogger("misdirection")

_WORK = ("work",)
EXPERIMENT = "experiment.yaml"
LOCK = ".lock"
MANIFEST = "manifest.jsonl"
RUNS = "runs"

Notify = Callable[[str], None]
"""Takes one line that the user should read."""


class RunFolder:
    """An open run folder; made by `RunFolder.open`."""

    def __init__(self, folder: Path, notify: Notify = log.warning) -> None:
        self.folder = folder
        self._notify = notify
        self._stages: dict[str, dict[str, Any]] = self._read_manifest()
        self._parents = {parent for name in self._stages for parent in _parents(name)}
        self._checked: set[str] = set()
        self._damaged: set[str] = set()

    @classmethod
    @contextmanager
    def open(cls, folder: Path, experiment_yaml: str, notify: Notify = log.warning) -> "Iterator[RunFolder]":
        """Open `folder`, made if need be, for this process alone.

        The lock is the operating system's, so that it goes with a killed process. Raises `InputError` when
        another process has the folder, when it holds what is not ours or another kind of run, or cannot be written.
        """
        require_run_folder(folder, experiment_yaml)
        held = lock(folder)
        try:
            _remove_leftovers(folder)
            write_atomic(folder / EXPERIMENT, experiment_yaml)
            yield cls(folder, notify)
        finally:
            held.release()

    def stage(self, name: str, inputs: Mapping[str, Any], compute: Callable[[Path], Any]) -> Path:
        """The artifact folder of a stage; `compute` is called with a folder to fill when there is none that holds.

        An artifact holds when its inputs have the key that it was made from and its hash is as recorded.
        """
        self.stages({name: inputs}, lambda folders: compute(folders[name]))
        return self.artifact(name)

    def stages(
        self,
        wanted: Mapping[str, Mapping[str, Any]],
        compute: Callable[[Mapping[str, Path]], Any],
        seconds: float | None = None,
    ) -> None:
        """Make several stages together, by name with their inputs; those that hold are left as they are.

        `compute` is called once, with a folder to fill for each of the others. `seconds` is how long that took, where
        it was done elsewhere.
        """
        missing = self.missing(wanted)
        if missing:
            for name, inputs in missing.items():
                empty_working_folder(self._partial(name), key_of(inputs), own=_WORK)
            self._make(missing, compute, seconds)
        # The artifacts are there; working files that cannot be deleted only take space.
        with suppress(OSError):
            for name in wanted:
                remove_working_folder(self._partial(name), own=_WORK)

    def missing(self, wanted: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """Those of the stages that have no artifact that holds, with those of them that they were made together with.

        Rounding depends on what shares a pass, so that one of several alone would come back as another.
        """
        for name in wanted:
            self._check_name(name)
        lost = {name: key_of(inputs) for name, inputs in wanted.items() if not self._holds(name, key_of(inputs))}
        return {name: inputs for name, inputs in wanted.items() if name in lost or self._lacks(name, lost)}

    def _lacks(self, name: str, lost: Mapping[str, str]) -> bool:
        """Whether one of those that a stage was made together with is lost; `lost` are the keys by name.

        One that had other inputs then has another key now, and was replaced by another.
        """
        for other in lost.keys() & set(self._stages[name].get("together", ())):
            known = self._stages.get(other, {})
            if known.get("key") == lost[other] or name not in known.get("together", ()):
                return True
        return False

    def artifact(self, name: str) -> Path:
        """Where a stage's artifact is, or will be."""
        return self.folder / "artifacts" / name

    def inner(self, name: str) -> Path:
        """The folder of a run of its own that belongs to this one."""
        self._check_name(name)
        return self.folder / RUNS / name

    def partial(self, name: str) -> Path:
        """A working folder that outlives a kill, and goes when the stage is done or its inputs change.

        For use inside the stage's `compute`: what was in it before belongs to the same inputs.
        """
        folder = self._partial(name) / _WORK[0]
        with write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def digest(self, name: str) -> str:
        """Hash of a stage's artifact, for the inputs of stages that use it."""
        return str(self._stages[name]["sha256"])

    def keep(self, result: Result) -> None:
        """Write a result that stands beside the artifacts."""
        result.save(self.folder)

    def seconds(self) -> dict[str, float]:
        """How long each stage took when it was run."""
        return {name: record["seconds"] for name, record in sorted(self._stages.items())}

    def _check_name(self, name: str) -> None:
        """Refuse a name that leads out of the folder, or into or around another stage's artifact."""
        if any(part in ("", ".", "..") or part.startswith(TEMPORARY) for part in name.split("/")):
            raise InputError(f"{self.folder}: {name!r} cannot name a folder; choose a plain name")
        if name in self._parents or any(parent in self._stages for parent in _parents(name)):
            raise InputError(
                f"{self.folder}: {name!r} and another stage would share a folder; rename one or choose another --out"
            )

    def _holds(self, name: str, key: str) -> bool:
        record = self._stages.get(name)
        if record is None or record["key"] != key or name in self._damaged:
            return False
        # Within one process an artifact is read once to be checked; the lock keeps others from changing it.
        if name in self._checked:
            return True
        artifact = self.artifact(name)
        if not _intact(artifact, record["sha256"]):
            self._notify(f"{artifact}: {self._put_away(artifact)}; it is made again")
            self._damaged.add(name)
            return False
        self._checked.add(name)
        return True

    def _put_away(self, artifact: Path) -> str:
        """Say what is wrong with an artifact that does not hold; one that is there may hold files of the user's."""
        if not os.path.lexists(artifact):
            return "missing"
        return f"damaged (its hash is not the recorded one), now in {set_aside(artifact, self.folder / 'damaged')}"

    def _make(
        self,
        missing: Mapping[str, Mapping[str, Any]],
        compute: Callable[[Mapping[str, Path]], Any],
        seconds: float | None,
    ) -> None:
        started = time.monotonic()
        with ExitStack() as folders:
            compute({name: folders.enter_context(atomic_folder(self.artifact(name))) for name in missing})
        if seconds is None:
            seconds = time.monotonic() - started
        records = {
            name: {
                "key": key_of(inputs),
                "sha256": sha256_tree(self.artifact(name)),
                "seconds": round(seconds / len(missing), 3),
                "inputs": dict(inputs),
                **({"together": list(missing)} if len(missing) > 1 else {}),
            }
            for name, inputs in missing.items()
        }
        append(self._manifest, "".join(map(line_of, records, records.values())))
        for name, record in records.items():
            _replace(self._stages, name, record)
        self._checked.update(records)
        self._damaged.difference_update(records)
        self._parents.update(parent for name in records for parent in _parents(name))

    def _partial(self, name: str) -> Path:
        return self.folder / "partial" / name

    @property
    def _manifest(self) -> Path:
        return self.folder / MANIFEST

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        """The last line of each stage counts. A line cut in half by a kill goes, and with it the older ones."""
        if not self._manifest.exists():
            return {}
        lines = self._manifest.read_bytes().splitlines(keepends=True)
        found = records_of(lines)
        if damaged := [line for line in lines if not _record(line) and line.endswith(b"\n")]:
            self._notify(f"{self._manifest}: {len(damaged)} lines are damaged; their stages are run again")
        if len(found) < len(lines):
            write_atomic(self._manifest, "".join(line_of(*record) for record in found.items()))
        return found


def records_of(lines: Iterable[bytes]) -> dict[str, dict[str, Any]]:
    """The records of a manifest's lines, by stage: the last one of each; damaged lines are passed over."""
    found: dict[str, dict[str, Any]] = {}
    for record in filter(None, map(_record, lines)):
        _replace(found, *record)
    return found


def require_run_folder(folder: Path, experiment_yaml: str) -> None:
    """Refuse a folder that holds what is not ours, and the run of another kind of command, which has the same names.

    `RunFolder.open` asks by itself; ask earlier where work comes before it.

    The lock stays behind when a run ends, and a copy may leave it out: then a record in the manifest shows whose it is.
    """
    if not _is_run(folder):
        # A run fills an empty folder and does not replace it, which may then be the one that the user is in.
        if not folder.is_dir() or any(folder.iterdir()):
            require_replaceable(folder)
    elif (folder / EXPERIMENT).is_file():
        kinds = [_kind(text) for text in ((folder / EXPERIMENT).read_text("utf-8", "replace"), experiment_yaml)]
        if kinds[0] != kinds[1]:
            raise InputError(f"{folder}: is the folder of another kind of run ({kinds[0]}): choose another --out")


def _is_run(folder: Path) -> bool:
    """Whether a folder is of a run, or of one that has runs."""
    if _has_record(folder / MANIFEST) or any(map(_is_run, (folder / RUNS).glob("*"))):
        return True
    # A start that was killed before its first stage was done.
    ours = (LOCK, EXPERIMENT, MANIFEST, RUNS, "artifacts", "partial", f"{TEMPORARY}*")
    return (folder / LOCK).is_file() and all(any(map(path.match, ours)) for path in folder.iterdir())


def _kind(experiment_yaml: str) -> str:
    """What a run's file is about: its only key, such as `audit`; that of an experiment has many."""
    try:
        values = yaml.safe_load(experiment_yaml)
    except yaml.YAMLError:
        values = None
    return next(iter(values)) if isinstance(values, dict) and len(values) == 1 else "experiment"


def _has_record(manifest: Path) -> bool:
    try:
        return any(map(_record, manifest.read_bytes().splitlines()))
    except OSError:
        return False


def lock(folder: Path) -> FileLock:
    """A run folder's lock, taken; `InputError` when another process has it, or the folder cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(folder / LOCK, timeout=0)
        held.acquire()
    except Timeout as error:
        raise InputError(f"another run is using {folder}; wait for it to end or choose another --out") from error
    except OSError as error:
        raise InputError(f"{folder}: cannot be used ({error.strerror}); choose another --out") from error
    return held


def key_of(inputs: Mapping[str, Any]) -> str:
    """What a stage's artifact is known by: a hash of its inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _intact(artifact: Path, digest: str) -> bool:
    try:
        return artifact.is_dir() and sha256_tree(artifact) == digest
    except OSError:
        return False


def line_of(name: str, record: Mapping[str, Any]) -> str:
    """A stage's line in the manifest."""
    return json.dumps({"stage": name, **record}, sort_keys=True, allow_nan=False) + "\n"


def _record(line: bytes) -> tuple[str, dict[str, Any]] | None:
    """A stage's name and record; None for a line that is cut or of another form."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    kinds: dict[str, type] = {"stage": str, "key": str, "sha256": str, "seconds": float, "inputs": dict}
    if not (isinstance(record, dict) and all(isinstance(record.get(name), kind) for name, kind in kinds.items())):
        return None
    together = record.get("together", [])
    if not (isinstance(together, list) and all(isinstance(name, str) for name in together)):
        return None
    return record.pop("stage"), record


def _replace(stages: dict[str, dict[str, Any]], name: str, record: dict[str, Any]) -> None:
    """Put in a stage's new record; what it was made together with before, and not now, is so no longer."""
    for other in stages.get(name, {}).get("together", ()):
        if other in stages and other not in record.get("together", ()):
            stages[other]["together"] = [each for each in stages[other].get("together", ()) if each != name]
    stages[name] = record


def _parents(name: str) -> list[str]:
    """The folders that a stage's artifact lies in: of `a/b/c`, `a/b` and `a`."""
    return [str(parent) for parent in PurePosixPath(name).parents if parent.name]


def _remove_leftovers(folder: Path) -> None:
    """Temporary files and folders of a process that was killed.

    Only where a run writes them: the folder may be one in which the user keeps other things.
    """
    pattern = f"{TEMPORARY}*"
    inner = [path for part in ("artifacts", "partial") for path in (folder / part).rglob(pattern)]
    for path in [*folder.glob(pattern), *inner]:
        remove(path)
