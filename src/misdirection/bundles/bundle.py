"""Make a bundle: one archive with a result and all that it was computed from."""

from collections import defaultdict
from collections.abc import Container, Mapping
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from misdirection.bundles.archive import write_archive
from misdirection.bundles.assembling import NO_RAW, Assembled, Material, assembled
from misdirection.bundles.comparison import TOLERANCE, compare
from misdirection.bundles.contents import Content
from misdirection.bundles.folders import INPUTS, RUN, Gathered, gather, kind_of, settings_of
from misdirection.bundles.results import Bundle, BundledInput, FigureCheck, LeftOut
from misdirection.bundles.software import software
from misdirection.errors import InputError
from misdirection.files import atomic_output, require_replaceable, sha256_listed
from misdirection.models.identity import ModelIdentity
from misdirection.results import Result
from misdirection.runs.folder import MANIFEST
from misdirection.runs.sealed import SealedRun, standing_still

README = "README.md"


def bundle(folder: str | Path, out: str | Path, *, with_weights: bool = False, with_rows: bool = False) -> Bundle:
    """Write one archive with a result, everything that its figures were computed from, and hashes of all of that.

        md.bundle("runs/demo", "demo.zip")
        md.verify("demo.zip").verdict

    The figures are computed once more before anything is written. The same folder gives the same bytes. Keys,
    passwords and the ways to files on this disk are taken out.

    Args:
        folder: of a run or an audit; or of a repair, an interpretation, a reference or a screen, whose figures are not
            computed again.
        out: the archive.
        with_weights: put in weights of any size; by default those over 16 MiB are known by their hash alone. The base
            model always is.
        with_rows: of a screen, put in the rows that were screened; by default their tables are known by their hash
            alone, and the worst rows have no text in the result and on the page.

    Raises `InputError` for a result that is unfinished or being made, whose artifacts give other figures, or whose
    inputs are not there any more; and for a file that holds a key.
    """
    folder, out = Path(folder), Path(out)
    kind = kind_of(folder)
    require_replaceable(out, folder=False)
    with standing_still(folder) if (folder / MANIFEST).is_file() else nullcontext():
        result = kind.load(folder)
        settings = settings_of(kind, folder)
        gathered = gather(kind, folder, settings, with_weights=with_weights, with_rows=with_rows)
        manifest = _manifest(result, gathered)
        check = _check(result, folder, settings, gathered, manifest)
        manifest = manifest.model_copy(update={"exact": check.rounded == 0})
        with atomic_output(out) as temporary:
            _write(temporary, gathered, manifest)
    return manifest


def _manifest(result: Result, gathered: Gathered) -> Bundle:
    gathered.contents[README] = Content(_readme(result, gathered.left_out).encode())
    known = {name: content.described(gathered.redaction) for name, content in sorted(gathered.contents.items())}
    identity = _identity_of(result)
    left_out, inputs = dict(gathered.left_out), dict(gathered.inputs)
    if identity and identity.files:
        place = f"{INPUTS}/base/{Path(identity.model).name}"
        left_out |= {f"{place}/{name}": LeftOut(sha256=digest, size=None) for name, digest in identity.files.items()}
        was = None if Path(identity.model).is_absolute() else identity.model
        inputs["base"] = BundledInput(place=place, was=was)
    return Bundle(
        # The day of the result: a bundle made again is the same bytes.
        made_on=result.made_on,
        of=result.KIND,
        file=result.FILE,
        base=ModelIdentity(**gathered.redaction.leaves(identity.model_dump())) if identity else None,
        software=software(),
        exact=True,
        files=known,
        left_out=left_out,
        inputs=inputs,
    )


def _identity_of(result: Result) -> ModelIdentity | None:
    """The base model of a result, and how it computed; None for a result that has none."""
    known = getattr(result, "base", None) or getattr(result, "identity", None)
    if known is None and (before := getattr(result, "before", None)):
        known = before.base
    return ModelIdentity(**{name: getattr(known, name) for name in ModelIdentity.model_fields}) if known else None


def _check(
    result: Result, folder: Path, settings: Mapping[str, Any], gathered: Gathered, manifest: Bundle
) -> FigureCheck:
    """The result beside the figures that its artifacts give; `InputError` unless they are the same."""
    identity = _identity_of(result)
    material = None
    if settings and identity:
        hashes_of = TreeHashes(manifest)
        run = SealedRun(folder, lambda path: hashes_of(f"{RUN}/{path.relative_to(folder).as_posix()}"))
        hashes = {key: manifest.originals(each.place) for key, each in gathered.inputs.items()}
        material = Material(run, settings, identity, gathered.paths, hashes)
    done = assembled(type(result), material)
    if done.reasons and result.KIND not in NO_RAW:
        raise InputError(
            f"{folder}: {result.FILE} cannot be computed from its artifacts ({done.reasons[0]}): finish it with "
            f"`{result.COMMAND}`, then bundle"
        )
    check = compare(result.as_dict(), done, TOLERANCE)
    _require_same(check, folder / result.FILE, result.COMMAND)
    for each in done.beside:
        own = compare(type(each).load(folder).as_dict(), Assembled(figures=each.as_dict()), TOLERANCE)
        _require_same(own, folder / each.FILE, result.COMMAND)
    return check


def _require_same(check: FigureCheck, file: Path, command: str) -> None:
    if check.differences:
        first = check.differences[0]
        raise InputError(
            f"{file}: {len(check.differences)} of its figures are not those of its artifacts (first {first.figure}: "
            f"{first.bundle}, and {first.recomputed} from the artifacts): make it again with `{command}`"
        )


class TreeHashes:
    """Gives what `sha256_tree` gave of a folder that is in an archive now.

    Args:
        bundle: the archive's manifest.
        changed: names of files that are not as it has them.
    """

    def __init__(self, bundle: Bundle, changed: Container[str] = ()) -> None:
        self._folders = defaultdict[str, dict[str, str]](dict)
        for name, digest in bundle.all_originals().items():
            for parent in PurePosixPath(name).parents:
                inside = name.removeprefix(f"{parent}/")
                self._folders[str(parent)][inside] = "" if name in changed else digest

    def __call__(self, place: str) -> str:
        """The hash; raises `FileNotFoundError` where there is no such folder."""
        if place not in self._folders:
            raise FileNotFoundError(place)
        return sha256_listed(self._folders[place])


def _readme(result: Result, left_out: Mapping[str, LeftOut]) -> str:
    template = (files("misdirection") / "resources" / "bundle.md").read_text("utf-8")
    hashes = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(left_out.items())) or "none\n"
    return template.format(kind=result.KIND, file=result.FILE, made=result.made, left_out=hashes)


def _write(path: Path, gathered: Gathered, manifest: Bundle) -> None:
    text = Content(manifest.text.encode())
    write_archive(path, {**gathered.contents, Bundle.FILE: text}, manifest.files)
