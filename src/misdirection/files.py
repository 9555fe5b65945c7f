"""Files that are whole or not there: written under a temporary name in the same folder, synced, then renamed.

Only what this program wrote, and nobody changed since, is replaced: `require_replaceable` decides. A folder that is
written here as a whole holds `MADE`, the list of its files with their hashes; a single file is in a list
beside it, `WRITTEN`. The user's own files are refused, never deleted.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import uuid
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from platformdirs import user_cache_path
from safetensors import SafetensorError

from misdirection.errors import InputError

TEMPORARY = ".misdirection-tmp-"
"""Names that begin so are left over from a killed process, and nothing that counts."""

MADE = ".misdirection.json"
"""In a folder that was written whole: what proves that its files are ours."""

WRITTEN = ".misdirection-written"
"""In a folder of the user's: a line for each file that we wrote there, hash and name, as `sha256sum` has them."""

WORKING = "working.json"
"""In a working folder: what its files belong to."""

# What only writing gives. Any other error inside a caller's block may be about a file that it reads.
_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG})


def cache_folder() -> Path:
    """The folder of what is kept between commands; `MISDIRECTION_CACHE` overrides the platform's cache folder."""
    return Path(os.environ.get("MISDIRECTION_CACHE") or user_cache_path("misdirection"))


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file name beside `path`, which takes the path's place when the context ends well.

    Raises `InputError` that names the path when the disk is full or cannot be written.
    """
    path = _target(path)
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
    _keep_listed(path)


@contextlib.contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """The same for a file that the user names; an existing one is replaced when we wrote it.

    Raises `InputError` before and after the context's block when `require_replaceable` does.
    """
    require_replaceable(path, folder=False)
    with atomic_path(path) as temporary:
        yield temporary
        # Again: the block may have taken hours.
        require_replaceable(path, folder=False)
        _list_written(_target(path), sha256_file(temporary))


def write_output(path: Path, data: bytes | str) -> None:
    """Write a whole file that the user names, as `atomic_output` does."""
    with atomic_output(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an existing one of ours is replaced as a whole.

    Raises `InputError` before and after the context's block when `require_replaceable` does.
    """
    path = _target(path)
    require_replaceable(path)
    with write_errors(path):
        temporary = _temporary(path)
        temporary.mkdir()
    try:
        with write_errors(path, only=_DISK):
            yield temporary
        with write_errors(path):
            list_made(temporary)
            for path_inside in (*temporary.rglob("*"), temporary):
                _sync(path_inside)
        # Again: the block may have taken hours.
        require_replaceable(path)
        with write_errors(path):
            _replace_folder(temporary, path)
    finally:
        remove(temporary)


def list_made(folder: Path) -> None:
    """Note that all files in a folder are ours as they are now."""
    write_json(folder / MADE, _listed(folder))


def is_as_made(folder: Path) -> bool:
    """Whether a folder that was written whole holds what was written, and nothing else."""
    return (folder / MADE).is_file() and _listed(folder) == _made(folder)


def _listed(folder: Path) -> dict[str, str]:
    # The list of a folder that was copied into this one is replaced by its own.
    return {name: digest for name, digest in hashes_in(folder).items() if name != MADE}


def require_replaceable(path: Path, *, folder: bool = True) -> None:
    """Refuse a folder that holds anything which this program did not write, or which was changed since; or such a file.

    `atomic_folder` and `atomic_output` ask by themselves; ask earlier where much work comes before them.

    Args:
        path: what would be written.
        folder: whether that is a folder, or a file.

    Raises `InputError` that names the first foreign file.
    """
    path = _target(path)
    if blocking := next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None):
        raise InputError(f"{blocking}: is a file, where a folder is needed for {path.name}: choose another name")
    if not path.exists():
        return
    if folder and Path.cwd().is_relative_to(path.resolve()):
        raise InputError(f"{path}: you are in this folder, which would be replaced as a whole: choose another name")
    if path.is_dir() != folder:
        kinds = ("file", "folder") if folder else ("folder", "file")
        raise InputError(f"{path}: is a {kinds[0]}, which is not replaced by a {kinds[1]}: choose another name")
    try:
        foreign = _foreign(path) if folder else None if _was_written(path) else path.name
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); choose another name") from error
    if foreign:
        holds = (
            f"holds {foreign}, which misdirection did not write, or"
            if folder
            else "misdirection did not write it, or it"
        )
        raise InputError(
            f"{path}: {holds} was changed since, so that it is not replaced: move it away or choose another name"
        )


def require_outside(source: Path, folder: Path, kind: str) -> None:
    """Raise `InputError` where what is read lies in a folder that would be replaced; `kind` says what it is."""
    if source.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{folder}: holds the {kind} itself, which is never written over: choose another folder")


def _was_written(path: Path) -> bool:
    """Whether a single file is as this program wrote it."""
    digest = sha256_file(path)
    listed = path.parent / WRITTEN
    lines = listed.read_text("utf-8", "replace").splitlines() if listed.is_file() else []
    return f"{digest}  {path.name}" in lines or _is_ours(path, _made(path.parent).get(path.name))


def _list_written(path: Path, digest: str) -> None:
    """Note a file before it takes its place, so that a kill in between leaves one that is known."""
    # What is written into a folder of ours that is being made is in that one's own list.
    if not any(part.startswith(TEMPORARY) for part in path.parts):
        append(path.parent / WRITTEN, f"{digest}  {path.name}\n")


def _foreign(folder: Path) -> str | None:
    """The first file or link in a folder that is not as this program wrote it; an empty folder's name is its own."""
    inside = sorted(folder.rglob("*"))
    ours = _made(folder)
    for path in inside:
        name = path.relative_to(folder).as_posix()
        if name != MADE and (path.is_symlink() or not path.is_dir()) and not _is_ours(path, ours.get(name)):
            return name
    return None


def _is_ours(path: Path, digest: str | None) -> bool:
    return digest is not None and not path.is_symlink() and sha256_file(path) == digest


def _made(folder: Path) -> dict[str, str]:
    """Hashes of what this program wrote into a folder, by name; none for a folder of somebody else's."""
    try:
        found = json.loads((folder / MADE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _keep_listed(path: Path) -> None:
    """A file of ours that was written again in a folder of ours stays ours."""
    ours = _made(path.parent)
    if path.name in ours:
        write_json(path.parent / MADE, {**ours, path.name: sha256_file(path)})


def plain_names(texts: Sequence[str]) -> list[str]:
    """A plain and different name for each of some paths or ids, to call files and folders after."""
    names: list[str] = []
    for text in texts:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).name).strip("-.") or "unnamed"
        count = sum(re.fullmatch(rf"{re.escape(name)}(-\d+)?", other) is not None for other in names)
        names.append(f"{name}-{count + 1}" if count else name)
    return names


def _target(path: Path) -> Path:
    """Where a link leads: it stays, and what it names is written."""
    try:
        return path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: is a link that leads nowhere; choose another name") from error


def empty_working_folder(folder: Path, key: Any, own: Collection[str] = ()) -> None:
    """Empty the working folder of an unfinished job, unless it was begun with the same `key`.

    Args:
        folder: made if need be.
        key: JSON; what the files in it belong to.
        own: regular expressions for the names of what the job writes there, such as `step-[0-9]+`.

    Raises `InputError` for a folder that holds anything else, which is left as it is.
    """
    mark = folder / WORKING
    if mark.is_file() and read_json(mark) == key:
        return
    with write_errors(folder):
        _empty(folder, own)
    write_json(mark, key)


def remove_working_folder(folder: Path, own: Collection[str] = ()) -> None:
    """Delete a working folder and what the job wrote there; raises as `empty_working_folder` does."""
    if folder.exists():
        _empty(folder, own)
        remove(folder)


def _empty(folder: Path, own: Collection[str]) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"{folder}: is a file, where a working folder is needed: move it away")
    mark = folder / WORKING
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    known = (re.escape(WORKING), f"{re.escape(TEMPORARY)}.*", *own) if mark.is_file() else ()
    for path in inside:
        foreign = path.is_symlink() or not any(re.fullmatch(pattern, path.name) for pattern in known)
        within = _foreign(path) if (path / MADE).is_file() else None
        if foreign or within:
            raise InputError(
                f"{folder}: holds {'/'.join(filter(None, (path.name, within)))}, which misdirection did not write, so "
                "that it is not emptied: move it away or choose another folder"
            )
    # A folder that a kill left half emptied is still known as ours, and what remains in it belongs to no job.
    if mark.is_file():
        write_json(mark, None)
    for path in sorted(inside, key=lambda one: one == mark):
        remove(path)


def set_aside(path: Path, folder: Path) -> Path:
    """Move what is in the way into `folder`, under its own name and a number; gives where it is now."""
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = (folder / f"{path.name}-{number}" for number in itertools.count(1))
        target = next(name for name in names if not os.path.lexists(name))
        path.rename(target)
    return target


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
    """Turn the system's errors (those numbered in `only`, if given) into a `InputError` that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _error_number(error)
        if only is not None and number not in only:
            raise
        reason = os.strerror(number) if number else str(error)
        raise InputError(f"{path}: cannot be written ({reason}); free space or choose another folder") from error


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
    """Read JSON; `InputError` when the file is missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged, not valid JSON ({error}); delete it and make it again") from error


def sha256_file(path: Path) -> str:
    """The file's SHA-256, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_tree(path: Path) -> str:
    """SHA-256 over a folder's relative file names and contents; of a file, over its contents."""
    if not path.is_dir():
        return sha256_file(path)
    return sha256_listed(hashes_in(path))


def hashes_in(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by its relative name, sorted."""
    files = sorted(inside for inside in folder.rglob("*") if inside.is_file())
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in files}


def sha256_listed(hashes: Mapping[str, str]) -> str:
    """What `sha256_tree` gives of a folder, from its files' hashes by relative name."""
    total = hashlib.sha256()
    for name in sorted(hashes, key=PurePosixPath):
        total.update(f"{name}\0{hashes[name]}\n".encode())
    return total.hexdigest()
