"""Files that are whole or not there: written under a temporary name in the same folder, synced, then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from misdirection.errors import MisdirectionError

TEMPORARY = ".misdirection-tmp-"
"""Names that begin so are left over from a killed process, and nothing that counts."""

# What only writing gives. Any other error inside a caller's block may be about a file that it reads.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, which takes the path's place when the context ends well.

    Raises `MisdirectionError` that names the path when the disk is full or cannot be written.
    """
    with write_errors(path):
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
    try:
        with write_errors(path, only=_DISK):
            yield temporary
        with write_errors(path):
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
    finally:
        remove(temporary)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an existing one is replaced as a whole."""
    with write_errors(path):
        temporary = _temporary(path)
        temporary.mkdir()
    try:
        with write_errors(path, only=_DISK):
            yield temporary
        with write_errors(path):
            for one in (*temporary.rglob("*"), temporary):
                _sync(one)
            _replace_folder(temporary, path)
    finally:
        remove(temporary)


def require_replaceable(folder: Path, mark: str) -> None:
    """Refuse to replace a folder that is not empty and lacks the file `mark`, which says that it was written by us."""
    if folder.exists() and not (folder / mark).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise MisdirectionError(
            f"{folder}: is there and holds no {mark}, so that it is not replaced: choose another folder"
        )


def _temporary(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f"{TEMPORARY}{uuid.uuid4().hex}"


def _replace_folder(new: Path, path: Path) -> None:
    # A folder cannot be renamed over a full one. The old one is renamed away, not deleted in place, so that a kill
    # leaves the old folder, the new one or none, and never half of one.
    old = _temporary(path)
    if os.path.lexists(path):
        path.rename(old)
    new.rename(path)
    _sync(path.parent)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or folder if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def write_errors(path: Path, only: Container[int | None] | None = None) -> Iterator[None]:
    """Turn the system's errors (those numbered in `only`, if given) into a `MisdirectionError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if only is not None and number not in only:
            raise
        reason = os.strerror(number) if number else str(error)
        raise MisdirectionError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


def _error_number(error: OSError | SafetensorError) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors words the system's error and drops its number, but for this.
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


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


def append(path: Path, text: str) -> None:
    """Add to a file; it is on disk when this returns. A machine that goes down may leave a part of it."""
    with write_errors(path), path.open("ab", buffering=0) as file:
        # One call of the system, which a kill does not part.
        file.write(text.encode())
        os.fsync(file.fileno())


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
    """SHA-256 over a folder's relative file names and contents; of a file, over its contents."""
    if not path.is_dir():
        return sha256_file(path)
    total = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        total.update(f"{file.relative_to(path).as_posix()}\0{sha256_file(file)}\n".encode())
    return total.hexdigest()
