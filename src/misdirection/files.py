"""Files that are whole or not there: written under a temporary name in the same folder, synced, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from misdirection.errors import MisdirectionError

TEMPORARY = ".tmp-"
"""Names that begin so are left over from a killed process, and nothing that counts."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, which takes the path's place when the context ends well.

    Raises `MisdirectionError` that names the path when the disk is full or cannot be written.
    """
    with _one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an existing one is replaced as a whole."""
    with _one_line_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                _sync(file)
            temporary.chmod(0o755)
            # A folder cannot be renamed over a full one: between the two steps there is none, which is as good as
            # not made yet.
            if path.exists():
                shutil.rmtree(path)
            temporary.rename(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _one_line_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MisdirectionError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a whole file, or leave what is there."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        # A temporary file is private by default; a result is not.
        temporary.chmod(0o644)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys; NaN is refused with a `ValueError`, since JSON has none."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; `MisdirectionError` when the file is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise MisdirectionError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise MisdirectionError(f"{path}: damaged, not valid JSON ({error}); delete it and make it again") from error


def sha256_file(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 over a folder's relative file names and contents."""
    total = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return total.hexdigest()
