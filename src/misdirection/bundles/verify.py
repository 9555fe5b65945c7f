"""Verify a bundle: every hash, and every figure that needs no model, computed again from what the archive holds."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from misdirection.bundles.archive import Archive
from misdirection.bundles.assembling import NO_RAW, Assembled, Material, assembled, lacking
from misdirection.bundles.bundle import TreeHashes
from misdirection.bundles.comparison import TOLERANCE, WHEN, compare, leaves
from misdirection.bundles.folders import KINDS, RUN, named_files, settings_of
from misdirection.bundles.redaction import Redaction
from misdirection.bundles.results import Bundle, FigureCheck, FileFault, InputCheck, VerifyResult, Word
from misdirection.bundles.software import differing, software
from misdirection.errors import InputError
from misdirection.files import read_json, sha256_file
from misdirection.results import Result
from misdirection.runs.sealed import SealedRun


def verify(path: str | Path, *, inputs: str | Path | None = None) -> VerifyResult:
    """Check a bundle's hashes, compute its figures again without a model, and compare them one by one.

        result = md.verify("demo.zip")
        result.verdict, result.recomputed, result.differences

    Figures must be the same to the last digit where the software and the processor are, and else the same but for
    `tolerance`. Nothing in the archive is run, unpickled or followed out of it.

    Args:
        path: the archive.
        inputs: a folder with what the result was made from, under the names that it had; it is checked, too. What was
            named from the working folder is looked for there.

    Raises `InputError` for what is no bundle, is cut off, or is of another version, and where `inputs` is no folder.
    """
    if inputs is not None and not Path(inputs).is_dir():
        raise InputError(f"{inputs}: is no folder: name the one that has the data and adapters")
    with tempfile.TemporaryDirectory(prefix="misdirection-bundle-") as name:
        folder = Path(name).resolve()
        with Archive.open(Path(path), folder) as archive:
            faults = archive.extract(folder)
            bundle, digest = archive.bundle, archive.digest
        others = differing(bundle.software, software())
        tolerance = TOLERANCE if others or not bundle.exact else 0.0
        check = _figures(bundle, folder, faults, tolerance)
    checked = list(_inputs(bundle, Path(inputs) if inputs else None))
    return VerifyResult(
        **dict(check),
        verdict=_word(check, faults, checked),
        of=bundle.of,
        made_by=bundle.made_with,
        manifest=digest,
        intact=len(bundle.files) - sum(fault.fault != "additional" for fault in faults),
        left_out=len(bundle.left_out),
        faults=faults,
        inputs=checked,
        tolerance=tolerance,
        software=others,
    )


def _word(check: FigureCheck, faults: list[FileFault], inputs: list[InputCheck]) -> Word:
    if faults or check.differences or any(each.state == "changed" for each in inputs):
        return "differs"
    return "holds" if {each.reason for each in check.not_recomputed} <= {WHEN, *NO_RAW.values()} else "open"


# --- figures ----------------------------------------------------------------------------------------------------------


def _figures(bundle: Bundle, folder: Path, faults: list[FileFault], tolerance: float) -> FigureCheck:
    kind, root = KINDS[bundle.of], folder / RUN
    values, unread = _result(kind, root / kind.FILE)
    if unread:
        return compare(values, Assembled(reasons=[unread]), tolerance)
    done = Assembled()
    with lacking(done, root):
        done = assembled(kind, _material(kind, bundle, folder, faults))
    checks = [compare(values, done, tolerance)]
    for each in done.beside:
        own, unread = _result(type(each), root / each.FILE)
        again = Assembled(reasons=[unread]) if unread else Assembled(figures=each.as_dict())
        checks.append(compare(own, again, tolerance, f"{each.FILE}: "))
    return FigureCheck(
        equal=sum(check.equal for check in checks),
        rounded=sum(check.rounded for check in checks),
        differences=[each for check in checks for each in check.differences],
        not_recomputed=[each for check in checks for each in check.not_recomputed],
    )


def _result(kind: type[Result], file: Path) -> tuple[Mapping[str, Any], str | None]:
    """A result as its file has it, and why its figures cannot be computed again, if so."""
    try:
        values = read_json(file)
    except InputError:
        return {}, f"{file.name}: is lacking or damaged"
    if _is_too_deep(values):
        return {}, f"{file.name}: is nested too deep"
    if not isinstance(values, dict) or values.get("kind") != kind.KIND:
        return {}, f"{file.name}: is no result of kind {kind.KIND!r}"
    if values.get("version") != kind.VERSION:
        return values, (
            f"{file.name} has version {values.get('version')}, and this program computes version {kind.VERSION}: "
            f"verify with misdirection {values.get('made_with')}"
        )
    return values, None


def _is_too_deep(value: Any) -> bool:
    try:
        for _ in leaves(value):
            pass
    except RecursionError:
        return True
    return False


def _material(kind: type[Result], bundle: Bundle, folder: Path, faults: list[FileFault]) -> Material | None:
    """What the archive holds to compute from; None for a kind whose figures are not."""
    settings = settings_of(kind, folder / RUN)
    if not settings:
        return None
    if bundle.base is None:
        raise InputError("the manifest does not name the base model")
    wrong, named = {fault.file for fault in faults}, named_files(kind, settings)
    inputs = {
        key: folder / place
        for key, place in ((key, bundle.inputs[key].place) for key in named if key in bundle.inputs)
        if (folder / place).exists() and not any(_is_in(file, place) for file in wrong)
    }
    hashes_of = TreeHashes(bundle, wrong)
    written = Redaction(names={str(path): named[key] for key, path in inputs.items()})
    run = SealedRun(folder / RUN, lambda path: hashes_of(path.relative_to(folder).as_posix()), written.leaves)
    return Material(
        run, settings, bundle.base, inputs, {key: bundle.originals(bundle.inputs[key].place) for key in inputs}
    )


def _is_in(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")


# --- inputs on this disk ----------------------------------------------------------------------------------------------


def _inputs(bundle: Bundle, folder: Path | None) -> Iterator[InputCheck]:
    """The inputs beside those in a folder, under their own names, and beside those that were named from here."""
    for key, each in bundle.inputs.items():
        name = each.place.rpartition("/")[2]
        places = [*([folder / name] if folder else []), *([Path(each.was)] if _is_from_here(each.was) else [])]
        found = next((place for place in places if place.exists()), None)
        if found is not None:
            state = "same" if _is_same(found, bundle.originals(each.place)) else "changed"
            yield InputCheck.model_validate({"name": f"{key} ({name})", "state": state})
        elif folder is not None:
            yield InputCheck(name=f"{key} ({name})", state="not here")


def _is_from_here(was: str | None) -> TypeGuard[str]:
    """Whether a place is one below the working folder: an archive is anybody's, and names no other."""
    return was is not None and not Path(was).is_absolute() and ".." not in Path(was).parts


def _is_same(path: Path, hashes: Mapping[str, str]) -> bool:
    """Whether a file, or every file of a folder that the bundle knows, is the bundle's."""
    place: Callable[[str], Path] = path.joinpath if path.is_dir() else lambda _: path
    return all(place(name).is_file() and sha256_file(place(name)) == digest for name, digest in hashes.items())
