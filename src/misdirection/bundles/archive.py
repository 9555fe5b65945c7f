"""The archive: a zip file whose files are stored as they are, in the order of their names and without times.

Nothing in it is compressed, so that the same files give the same bytes wherever it is made, and no small archive can
unfold into a large one. What is read from one is believed in nothing: names are checked, links and anything else that
is no plain file are refused, and whatever the manifest does not name is left where it is.
"""

import hashlib
import stat
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from misdirection.bundles.contents import Content, blocks_of
from misdirection.bundles.results import Bundle, BundledFile, FileFault
from misdirection.errors import InputError
from misdirection.files import read_json, write_errors

_TIME = (1980, 1, 1, 0, 0, 0)
"""The first that a zip file knows."""

_UNIX, _PLAIN = 3, stat.S_IFREG | 0o644
_MOST_FILES = 200_000
_LARGEST_MANIFEST = 128 * 2**20


def write_archive(path: Path, contents: Mapping[str, Content], known: Mapping[str, BundledFile]) -> None:
    """Write an archive.

    Args:
        path: the file.
        contents: by name in the archive.
        known: what their hashes must be, as far as they were taken before.

    Raises `InputError` for a file that was changed since its hash was taken.
    """
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            info = zipfile.ZipInfo(name, _TIME)
            info.create_system, info.external_attr = _UNIX, _PLAIN << 16
            # Decides by itself whether the file needs the longer form.
            info.file_size = known[name].size if name in known else 0
            digest = hashlib.sha256()
            with archive.open(info, "w") as file:
                for block in contents[name].blocks():
                    file.write(block)
                    digest.update(block)
            if name in known and known[name].sha256 != digest.hexdigest():
                raise InputError(f"{contents[name].rest}: was changed while it was bundled; do it again")


@dataclass(frozen=True)
class Archive:
    """An archive that is open for reading.

    Attributes:
        path: the file.
        bundle: its manifest.
        digest: the manifest's hash.
    """

    path: Path
    bundle: Bundle
    digest: str
    _zip: zipfile.ZipFile

    @classmethod
    @contextmanager
    def open(cls, path: Path, folder: Path) -> "Iterator[Archive]":
        """Open an archive and read its manifest, by way of a folder that is given.

        Raises `InputError` for what is no archive of ours, or is one that nothing may be read from.
        """
        with _opened(path) as archive:
            _require_plain(path, archive)
            if Bundle.FILE not in archive.namelist():
                raise InputError(f"{path}: is no bundle, it holds no {Bundle.FILE}; make one with `{Bundle.COMMAND}`")
            manifest = folder / Bundle.FILE
            if archive.getinfo(Bundle.FILE).file_size > _LARGEST_MANIFEST:
                raise InputError(f"{path}: its {Bundle.FILE} is larger than any that this program writes")
            digest = _copy(archive, Bundle.FILE, manifest)
            if digest is None:
                raise InputError(f"{path}: its {Bundle.FILE} is damaged: get the bundle again")
            bundle = Bundle.from_dict(read_json(manifest), f"{path}: {Bundle.FILE}")
            _require_safe(path, [*bundle.files, *bundle.left_out])
            for each in bundle.inputs.values():
                _require_safe(path, [each.place])
            yield cls(path, bundle, digest, archive)

    def extract(self, folder: Path) -> list[FileFault]:
        """Write the files that are as the manifest has them into a folder; gives what is wrong with the others.

        What is changed is written too: its figures are looked at.
        """
        there = set(self._zip.namelist()) - {Bundle.FILE}
        faults = [FileFault(file=name, fault="additional") for name in there - self.bundle.files.keys()]
        for name, file in self.bundle.files.items():
            if name not in there:
                faults.append(FileFault(file=name, fault="missing"))
            elif _copy(self._zip, name, folder / name) != file.sha256:
                faults.append(FileFault(file=name, fault="changed"))
        return sorted(faults, key=lambda fault: fault.file)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path}: is no bundle, or was cut off ({error}); get it again") from error
    with archive:
        yield archive


def _require_plain(path: Path, archive: zipfile.ZipFile) -> None:
    """Refuse an archive with what this program does not write: it is another one, or is meant to do harm."""
    infos = archive.infolist()
    if len(infos) > _MOST_FILES:
        raise InputError(f"{path}: holds {len(infos)} files, more than any bundle")
    _require_safe(path, [info.filename for info in infos])
    for info in infos:
        type_of = stat.S_IFMT(info.external_attr >> 16)
        is_stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        if info.is_dir() or type_of not in (0, stat.S_IFREG) or not is_stored or info.flag_bits & 1:
            raise InputError(
                f"{path}: holds {info.filename!r}, which is no plain file stored as it is: this program did not write "
                f"it; make a bundle with `{Bundle.COMMAND}`"
            )


def _require_safe(path: Path, names: list[str]) -> None:
    """Refuse names that lead out of a folder, or stand twice."""
    known = set[str]()
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or "/".join(parts) != name or {"..", "."} & {*parts} or not name.isprintable() or "\\" in name:
            raise InputError(f"{path}: holds the name {name!r}, which leads elsewhere: nothing is read from it")
        if name in known:
            raise InputError(f"{path}: holds the name {name!r} twice: nothing is read from it")
        known.add(name)


def _copy(archive: zipfile.ZipFile, name: str, target: Path) -> str | None:
    """Write one file of an archive, and give its hash; None for one that cannot be read to its end."""
    digest = hashlib.sha256()
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        out = target.open("xb")
    with out:
        try:
            with archive.open(name) as file:
                for block in blocks_of(file):
                    digest.update(block)
                    with write_errors(target):
                        out.write(block)
        except (zipfile.BadZipFile, EOFError):
            return None
    return digest.hexdigest()
