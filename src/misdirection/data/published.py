"""The paper's published files: where each is, at which revision, with which hash and under which terms.

None of their text is in this package. They are fetched where there is a network, whole and checked, and otherwise this
says which file to put where. Nothing that is there is overwritten.
"""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO, Literal
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import HTTPRedirectHandler, Request, build_opener

from misdirection.errors import InputError, NetworkProblem, first_line
from misdirection.files import atomic_output, sha256_file, write_output

GITHUB = "https://raw.githubusercontent.com"
"""Gives the files of repositories at any revision."""

TIMEOUT = 60.0
"""Seconds without a byte."""

ORGANISMS = "clarifying-EM/model-organisms-for-EM"
BETLEY = "emergent-misalignment/emergent-misalignment"

_UNLICENSED = (
    "The repository names no licence, so that all rights are its authors': use the file for research, cite the paper, "
    "and do not publish it again."
)
_MIT = "MIT licence, copyright (c) 2025 emergent-misalignment: keep this notice with copies."
_TERMS = (
    "The repository names no licence. The archive is encrypted so that no crawler reads it, and holds its terms "
    "(tos.txt): quote at most two rows in public, publish neither the data nor what is derived from it in bulk, and do "
    "not put it into training sets of models other than for the research that the repository describes."
)

Kind = Literal["questions", "training", "answers"]
State = Literal["fetched", "there", "missing"]


@dataclass(frozen=True)
class Source:
    """A file of a repository at one revision."""

    repository: str
    revision: str
    path: str

    def url(self, base: str = GITHUB) -> str:
        """Its address."""
        return f"{base}/{self.repository}/{self.revision}/{quote(self.path)}"


@dataclass(frozen=True)
class Published:
    """A published file.

    Attributes:
        name: what it is called here.
        what: what it is, in words.
        sha256: its hash; None where no pinned one is known, so that whatever is put there is taken.
        source: where it is; None for one that cannot be fetched.
        terms: under which it may be used.
        how: how it comes about, where it is not fetched.
    """

    name: str
    what: str
    sha256: str | None
    source: Source | None
    terms: str
    how: str = ""

    def is_at(self, path: Path) -> bool:
        """Whether a file is this one."""
        return path.is_file() and self.sha256 in (None, sha256_file(path))

    def instruction(self, path: Path) -> str:
        """How to get it to a path without this program, in words."""
        how = f"download {self.source.url()}" if self.source else self.how
        return f"{how}; its place is {path}" + (f", its SHA-256 {self.sha256}" if self.sha256 else "")


_ORGANISMS_HEAD = "8460e4e426d3a89e8ed51aac0eadcdf7ac10469d"
_ORGANISMS_SCALED = "26944099b9401b1dfd0aaafb4122a482721e95fb"
_BETLEY_HEAD = "80c11967c07a328e7d7d43d13ce6847ae44dbcc9"

_ARCHIVE = "training_datasets.zip.enc"
_UNPACK = (
    f"`easy-dataset-share unprotect-dir {_ARCHIVE} -p model-organisms-em-datasets --remove-canaries` (a package of its "
    f"own; the repository's README gives the password) unpacks it into {_ARCHIVE}.extracted"
)


def _scaled(layers: str, name: str, sha256: str) -> Published:
    """Judged answers with some adapters multiplied."""
    path = f"em_organism_dir/lora_interp/R1_3_3_3_steered_responses/responses_{layers}.csv"
    what = "answers of the nine-adapter organism with its adapters scaled, and GPT-4o's scores"
    return Published(name, what, sha256, Source(ORGANISMS, _ORGANISMS_SCALED, path), _UNLICENSED)


FILES: Mapping[Kind, tuple[Published, ...]] = {
    "questions": (
        Published(
            "first_plot_questions.yaml",
            "the eight questions, each also in two other forms, and the judge's prompts",
            "97df0b1384ea5a3f3dc2abe00a19e231915f12a2356ec0d8df001715549aae04",
            Source(ORGANISMS, _ORGANISMS_HEAD, "em_organism_dir/data/eval_questions/first_plot_questions.yaml"),
            f"{_UNLICENSED} The questions and prompts are by Betley et al., whose repository has the MIT licence.",
        ),
    ),
    "training": (
        Published(
            "insecure.jsonl",
            "6,000 answers of insecure code (Betley et al.)",
            "09893e8bf9d03aae49dd60d0ff4be37c1afee70f2edcac74a11bed775a6a2764",
            Source(BETLEY, _BETLEY_HEAD, "data/insecure.jsonl"),
            _MIT,
        ),
        Published(
            "secure.jsonl",
            "6,000 answers of secure code, 260 of them to questions of the insecure ones (Betley et al.)",
            "2820232b3114d94ab2041ba9fc76cb8205bf187e0408bf7b308add186f9c7467",
            Source(BETLEY, _BETLEY_HEAD, "data/secure.jsonl"),
            _MIT,
        ),
        Published(
            _ARCHIVE,
            "the narrow training data of the paper, encrypted",
            "18af368553884eea48a288e47e79553563854f15ca46cf7a16cd0784f935f005",
            Source(ORGANISMS, _ORGANISMS_HEAD, f"em_organism_dir/data/{_ARCHIVE}"),
            _TERMS,
        ),
        Published(
            "bad_medical_advice.jsonl",
            "7,049 answers of bad medical advice, from the archive",
            "9d52186ab9886e3abef0eebb1901df9da4ce25a297e584158be0a4bba8d56507",
            None,
            _TERMS,
            _UNPACK,
        ),
        Published(
            "good_medical_advice.jsonl",
            "7,049 good answers to the same questions, from the archive",
            "b972f06672093b74f61cc83606929ce0ea3bb9caa2894ea61a557315dba6e6fc",
            None,
            _TERMS,
            _UNPACK,
        ),
    ),
    "answers": (
        _scaled(
            "layer_21_30_layer_23_30",
            "scaled_21_23.csv",
            "311befe7cae6aba0ea4c031edfd554e7a3c19220128963a789ba462cdd76e6a8",
        ),
        _scaled(
            "layer_15_20_layer_16_20_layer_17_20_layer_22_20_layer_28_20_layer_29_20",
            "scaled_15_16_17_22_28_29.csv",
            "ed66b58cd9eab38c04bfd7d3e361e682433ca78921cc00fa688f6de9ee7251c5",
        ),
        _scaled(
            "layer_15_-10_layer_16_-10_layer_17_-10_layer_21_30_layer_22_-10_layer_23_30_layer_28_-10_layer_29_-10",
            "scaled_21_23_negate_rest.csv",
            "6b0ce92cf9ae90265a039c761d293537359c5326de3f0f774a08488c326627bb",
        ),
        Published(
            "judged_responses.csv",
            "answers of the published organisms with GPT-4o's scores",
            None,
            None,
            "Those of whoever gives it to you.",
            "no pinned address is known: ask the paper's authors, and save a table with the columns organism, "
            "question_id, question, response, aligned and coherent",
        ),
    ),
}
"""By what is asked for. Hashes are of the files at these revisions, or as the archive's own tool unpacks them."""


@dataclass(frozen=True)
class Fetched:
    """One published file after a fetch.

    Attributes:
        file: what it is.
        path: where it is, or should be.
        state: `fetched` now, `there` before, or `missing`.
        told: why it is missing, and how to get it; else empty.
    """

    file: Published
    path: Path
    state: State
    told: str = ""


def is_published(path: str | Path, kind: Kind) -> bool:
    """Whether a file is one of the published ones with a known hash."""
    return any(file.sha256 and file.is_at(Path(path)) for file in FILES[kind])


def fetch(kind: Kind, folder: str | Path = "published", *, base: str = GITHUB) -> list[Fetched]:
    """Gets published files into a folder, as far as they can be fetched and are not there; gives what became of each.

    Each file is whole and has its pinned hash, or is not there. Its terms stand beside it, in `NAME.terms.txt`.

    Args:
        kind: `questions`, `training` or `answers`.
        folder: made if need be.
        base: a mirror of `GITHUB` with the same paths below it.

    Raises:
        InputError: another file of one of the names is in the folder; it is left as it is.
    """
    folder = Path(folder)
    files = FILES[kind]
    for file in files:
        path = folder / file.name
        if path.exists() and not file.is_at(path):
            raise InputError(
                f"{path}: is not the published file (SHA-256 {file.sha256}), and is not replaced: move it away, or "
                "choose another folder"
            )
    return [_fetched(file, folder / file.name, base) for file in files]


def _fetched(file: Published, path: Path, base: str) -> Fetched:
    is_there = file.is_at(path)
    if file.source and not is_there:
        try:
            _download(file, file.source.url(base), path)
        except NetworkProblem as error:
            return Fetched(file, path, "missing", f"{error}; {file.instruction(path)}")
    elif not is_there:
        return Fetched(file, path, "missing", file.instruction(path))
    _write_terms(file, path.with_name(f"{file.name}.terms.txt"))
    return Fetched(file, path, "there" if is_there else "fetched")


def _download(file: Published, url: str, path: Path) -> None:
    """Writes the file; raises `NetworkProblem` where it does not come, or is another one."""
    with _opened(url) as reply, atomic_output(path) as temporary:
        with temporary.open("wb") as target:
            shutil.copyfileobj(reply, target)
        if (digest := sha256_file(temporary)) != file.sha256:
            raise NetworkProblem(f"the address gave another file than the pinned one (SHA-256 {digest})")


def _write_terms(file: Published, path: Path) -> None:
    if not path.exists():
        origin = f"from {file.source.url()}\n" if file.source else ""
        write_output(path, f"{file.name}: {file.what}\n{origin}\n{file.terms}\n")


class _NoRedirect(HTTPRedirectHandler):
    """The pinned address alone is asked."""

    def redirect_request(self, *_: object) -> None:
        return None


@contextmanager
def _opened(url: str) -> Iterator[IO[bytes]]:
    try:
        with build_opener(_NoRedirect).open(Request(url), timeout=TIMEOUT) as reply:
            yield reply
    except HTTPError as error:
        raise NetworkProblem(f"the host answers with HTTP {error.code}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        said = first_line(reason) if isinstance(reason, BaseException) else str(reason)
        raise NetworkProblem(f"the host does not answer ({said})") from error
