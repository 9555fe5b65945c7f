"""What goes into an archive: each file as it will stand in it, read in blocks, with its hashes."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from misdirection.bundles.redaction import Redaction
from misdirection.bundles.results import BundledFile
from misdirection.errors import InputError
from misdirection.files import sha256_file

LARGE = 16 * 2**20
"""Weights of more bytes are known by their hash alone, unless they are asked for."""

_BLOCK = 2**20
_TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".html", ".md", ".csv", ".txt", ".svg")
_WEIGHTS = re.compile(
    r"(adapter_model|model|pytorch_model|consolidated)[^/]*\.safetensors|.*\.(bin|pt|pth|gguf)", re.IGNORECASE
)

Form = Literal["as it is", "leaves", "text"]
"""How a file is told to be free of what is the machine's: not at all, since figures depend on every letter of it; in
the values of its JSON; or wherever it stands."""


@dataclass(frozen=True)
class Content:
    """One file of an archive.

    Attributes:
        head: what it begins with.
        rest: the file whose bytes follow, from `skip` on; None where there are none.
    """

    head: bytes = b""
    rest: Path | None = None
    skip: int = 0

    def blocks(self) -> Iterator[bytes]:
        """Its bytes; `InputError` for a file that cannot be read."""
        if self.head:
            yield self.head
        if self.rest is None:
            return
        try:
            with self.rest.open("rb") as file:
                file.seek(self.skip)
                yield from blocks_of(file)
        except OSError as error:
            raise InputError(f"{self.rest}: cannot be read ({error.strerror}); check its permissions") from error

    def described(self, redaction: Redaction) -> BundledFile:
        """Its hashes and size; `InputError` for a file that holds the value of a variable with a secret."""
        digest, size, overlap = hashlib.sha256(), 0, b""
        for block in self.blocks():
            digest.update(block)
            size += len(block)
            self._require_no_secret(overlap + block, redaction)
            overlap = block[-max(map(len, redaction.secret_bytes), default=1) :]
        is_changed = self.rest is not None and bool(self.head)
        before = sha256_file(self.rest) if self.rest is not None and is_changed else None
        return BundledFile(sha256=digest.hexdigest(), size=size, before=before)

    def _require_no_secret(self, data: bytes, redaction: Redaction) -> None:
        for value, variable in redaction.secret_bytes.items():
            if value in data:
                raise InputError(
                    f"{self.rest or 'a file'}: holds the value of the environment variable {variable}, which is not "
                    "sent along: take it out of the file, or out of the environment"
                )


def blocks_of(file: IO[bytes]) -> Iterator[bytes]:
    """The rest of an open file, block by block."""
    return iter(lambda: file.read(_BLOCK), b"")


def content_of(path: Path, form: Form, redaction: Redaction) -> Content:
    """A file as it stands in the archive; `InputError` for one that cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return _tensors(path, redaction)
        if form == "as it is" or path.suffix not in _TEXTS:
            return Content(rest=path)
        data = path.read_bytes()
        text = data.decode("utf-8")
        shown = redaction.text(text) if form == "text" else _json_leaves(text, redaction)
    except UnicodeDecodeError:
        return Content(rest=path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); make it again") from error
    return Content(rest=path) if shown == text else Content(shown.encode(), path, len(data))


def _json_leaves(text: str, redaction: Redaction) -> str:
    value = json.loads(text)
    shown = redaction.leaves(value)
    return text if shown == value else json.dumps(shown, indent=2, sort_keys=True) + "\n"


def _tensors(path: Path, redaction: Redaction) -> Content:
    """A safetensors file, whose header may name paths. The header ends where the tensors' alignment wants it."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length).decode("utf-8") if length <= LARGE else ""
    shown = redaction.text(header)
    if shown == header:
        return Content(rest=path)
    packed = shown.encode()
    packed += b" " * (-len(packed) % 8)
    return Content(len(packed).to_bytes(8, "little") + packed, path, 8 + length)


def is_large(path: Path) -> bool:
    """Whether a file holds weights that go into an archive only where they are asked for."""
    return bool(_WEIGHTS.fullmatch(path.name)) and path.stat().st_size > LARGE
