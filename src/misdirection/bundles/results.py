"""The manifest of a bundle, and the result of its verification."""

import hashlib
from typing import Any, ClassVar, Literal

from misdirection.models.identity import ModelIdentity
from misdirection.results import Figures, Result

BundledKind = Literal["run", "audit", "repair", "interpretation", "reference", "screen"]
Word = Literal["holds", "open", "differs"]
"""`open`: nothing is different, but not every figure could be computed again."""


class BundledFile(Figures):
    """A file in the archive."""

    sha256: str
    size: int
    """Bytes."""
    before: str | None
    """Its hash before what belongs to the machine alone was taken out of it; None where nothing was."""

    @property
    def original(self) -> str:
        """Its hash on the disk that it came from."""
        return self.before or self.sha256


class LeftOut(Figures):
    """A file that the archive holds the hash of alone."""

    sha256: str
    size: int | None
    """Bytes; None where only the hash was known."""


class BundledInput(Figures):
    """Something that the result was made from, and that the user named."""

    place: str
    """Where it is in the archive, or would be: a file, or a folder."""
    was: str | None
    """Where it was, if that was named from the working folder; None for a path that says whose disk it was."""


class Bundle(Result):
    """The manifest of a bundle: the hash of every file in it but this one's own."""

    KIND: ClassVar[str] = "bundle"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "manifest.json"
    COMMAND: ClassVar[str] = "misdirection bundle FOLDER --out FILE.zip"

    of: BundledKind
    """The kind of the result."""
    file: str
    """The result's file."""
    base: ModelIdentity | None
    """The base model and how it computed; None where the result has none."""
    software: dict[str, str]
    """Versions, and the processor, by which the figures were computed once more when the bundle was made."""
    exact: bool
    """Whether that gave the very same figures; False where they differed by rounding."""
    files: dict[str, BundledFile]
    """By name in the archive."""
    left_out: dict[str, LeftOut]
    """Files that are too large, by the name that they would have."""
    inputs: dict[str, BundledInput]
    """By their keys in the configuration, with `/` between."""

    @property
    def text(self) -> str:
        """The manifest's file."""
        return f"{self}\n"

    @property
    def digest(self) -> str:
        """SHA-256 of that file."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def all_originals(self) -> dict[str, str]:
        """Hashes of all files as they were on the disk that they came from, by name in the archive."""
        left_out = {name: file.sha256 for name, file in self.left_out.items()}
        return {name: file.original for name, file in self.files.items()} | left_out

    def originals(self, place: str) -> dict[str, str]:
        """The same of one file, or of all files in a folder, by relative name."""
        known, folder = self.all_originals(), f"{place}/"
        if place in known:
            return {place.rpartition("/")[2]: known[place]}
        return {name.removeprefix(folder): digest for name, digest in known.items() if name.startswith(folder)}


class FileFault(Figures):
    """A file of the archive that is not as the manifest has it."""

    file: str
    fault: Literal["changed", "missing", "additional"]


class InputCheck(Figures):
    """An input on this disk beside the bundle's."""

    name: str
    state: Literal["same", "changed", "not here"]


class Difference(Figures):
    """A figure that came out otherwise."""

    figure: str
    bundle: Any
    """None where the bundle has no such figure."""
    recomputed: Any
    """None where it was not given again."""


class NotRecomputed(Figures):
    """Figures that were not computed again."""

    figures: str
    """The key that they are under."""
    count: int
    reason: str


class FigureCheck(Figures):
    """Figures of a bundle beside those that its artifacts give."""

    equal: int
    rounded: int
    """So many of them differ by no more than the tolerance."""
    differences: list[Difference]
    not_recomputed: list[NotRecomputed]

    @property
    def recomputed(self) -> int:
        """How many were computed again."""
        return self.equal + len(self.differences)


class VerifyResult(FigureCheck, Result):
    """A bundle's verification."""

    KIND: ClassVar[str] = "verification"
    VERSION: ClassVar[int] = 1
    FILE: ClassVar[str] = "verification.json"
    COMMAND: ClassVar[str] = "misdirection verify FILE.zip"

    verdict: Word
    of: BundledKind
    made_by: str
    """The version of the program that made the bundle."""
    manifest: str
    """SHA-256 of the manifest."""
    intact: int
    """Files in the archive that are as the manifest has them."""
    left_out: int
    """Files that it holds the hash of alone."""
    faults: list[FileFault]
    inputs: list[InputCheck]
    """Inputs that were looked for on this disk."""
    tolerance: float
    """Largest difference that is taken for rounding, as a share of a figure; 0 where the software is the same."""
    software: dict[str, tuple[str, str]]
    """What figures depend on and is another version here: the bundle's, and this machine's."""

    def __repr__(self) -> str:
        return f"VerifyResult({self.verdict}: {self.equal} of {self.recomputed} figures equal)"
