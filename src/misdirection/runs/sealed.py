"""A run that is only read: whoever asks it for an artifact gets what is there, or is told what is lacking."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from misdirection.errors import InputError
from misdirection.files import remove, sha256_tree
from misdirection.results import Result
from misdirection.runs.folder import LOCK, RunFolder, key_of, lock, records_of


class NotKept(InputError):
    """Something that a finished run would hold, and this one does not."""


class SealedRun(RunFolder):
    """A run that makes nothing and writes nothing.

    Args:
        folder: the run's.
        tree_hash: gives the hash of an artifact's folder; raises `OSError` for one that is not there.
        as_written: gives inputs as the manifest has them, where paths in them are others here.

    Attributes:
        beside: the results that would stand beside the artifacts.
    """

    def __init__(
        self,
        folder: Path,
        tree_hash: Callable[[Path], str] = sha256_tree,
        as_written: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        super().__init__(folder)
        self._tree_hash, self._as_written = tree_hash, as_written
        self.beside: list[Result] = []

    def stages(
        self,
        wanted: Mapping[str, Mapping[str, Any]],
        compute: Callable[[Mapping[str, Path]], Any],
        seconds: float | None = None,
    ) -> None:
        """Raises `NotKept` for the first of the stages whose artifact does not hold; nothing is computed."""
        for name, inputs in wanted.items():
            self._check_name(name)
            if fault := self._fault(name, inputs):
                raise NotKept(f"{name}: {fault}")

    def digest(self, name: str) -> str:
        """Hash of a stage's artifact; `NotKept` where there is none."""
        if name not in self._stages:
            raise NotKept(f"{name}: {_MISSING}")
        return super().digest(name)

    def keep(self, result: Result) -> None:
        """Hold a result that would stand beside the artifacts."""
        self.beside.append(result)

    def _fault(self, name: str, inputs: Mapping[str, Any]) -> str | None:
        record = self._stages.get(name)
        if record is None:
            return _MISSING
        if record["key"] != key_of(self._as_written(inputs)):
            return "its artifact was made from other inputs, or by another version of the program"
        if name in self._checked:
            return None
        try:
            digest = self._tree_hash(self.artifact(name))
        except OSError:
            return _MISSING
        if digest != record["sha256"]:
            return "its artifact is not the recorded one"
        self._checked.add(name)
        return None

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        return records_of(self._manifest.read_bytes().splitlines()) if self._manifest.is_file() else {}


_MISSING = "there is no artifact"


@contextmanager
def standing_still(folder: Path) -> Iterator[None]:
    """Keeps every run out of a run folder, and leaves it as it was; `InputError` when one is under way in it."""
    had_lock = (folder / LOCK).exists()
    held = lock(folder)
    try:
        yield
    finally:
        held.release()
        # The folder may be an artifact of another run, which is known by all that is in it.
        if not had_lock:
            remove(folder / LOCK)
