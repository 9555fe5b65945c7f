"""Folders that can be bundled: which kind each is, what the user named for it, and which of its files go along."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from misdirection.auditing.inputs import AUDIT
from misdirection.auditing.results import AuditResult, ReferenceRecord
from misdirection.bundles.contents import Content, Form, content_of, is_large
from misdirection.bundles.redaction import Redaction
from misdirection.bundles.results import BundledInput, LeftOut
from misdirection.bundles.rows import SCORED, scores, without_texts
from misdirection.data.shipped import shipped_files
from misdirection.data.text import read_yaml
from misdirection.errors import InputError
from misdirection.experiment.results import RunResults
from misdirection.files import sha256_file
from misdirection.interpretation.results import InterpretationResults
from misdirection.interpretation.token_results import TokenTable
from misdirection.judging.quadrant_results import Quadrants
from misdirection.repairing.results import RepairResult
from misdirection.results import Result
from misdirection.runs.folder import EXPERIMENT, MANIFEST, key_of, line_of, records_of
from misdirection.screening.results import ScreenResult

RUN, INPUTS = "run", "inputs"
"""Folders of the archive."""

KINDS: dict[str, type[Result]] = {
    kind.KIND: kind
    for kind in (RunResults, AuditResult, RepairResult, InterpretationResults, ReferenceRecord, ScreenResult)
}
"""Results that can be bundled, by kind."""

_PAGES = ("report.html", AuditResult.PAGE, ScreenResult.PAGE, TokenTable.FILE, Quadrants.FILE)
_SECTIONS: dict[type[Result], str] = {AuditResult: AUDIT, ScreenResult: ScreenResult.KIND}
"""The only key of the file that says what a folder of this kind is about; that of a run has many."""
_MANY = "audits.csv"
_IS_PLAIN = re.compile(r"[^\\/\x00-\x1f\x7f]+")


def kind_of(folder: Path) -> type[Result]:
    """The kind of a result's folder; `InputError` for a folder that has none, or many."""
    for kind in KINDS.values():
        if (folder / kind.FILE).is_file():
            return kind
    if (folder / _MANY).is_file():
        raise InputError(f"{folder}: holds many audits: bundle one of them, {folder}/artifacts/audit/NAME")
    if (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: is unfinished, it has no result yet: let the command that made it end, then bundle"
        )
    files = ", ".join(kind.FILE for kind in KINDS.values())
    raise InputError(f"{folder}: holds no result ({files}): name the folder of a run or of an audit")


def settings_of(kind: type[Result], folder: Path) -> dict[str, Any]:
    """What the folder of a run, an audit or a screen says of what was asked for; empty for other kinds.

    Raises `InputError` for one of a version that did not keep that.
    """
    if kind is not RunResults and kind not in _SECTIONS:
        return {}
    values = read_yaml(folder / EXPERIMENT)
    if section := _SECTIONS.get(kind):
        values = values.get(section) if isinstance(values, dict) else None
    if not isinstance(values, dict) or (kind is AuditResult and "folder" not in values):
        raise InputError(
            f"{folder / EXPERIMENT}: does not say what was asked for, an older version wrote it: make the result "
            f"again with `{kind.COMMAND}`, which measures nothing twice"
        )
    return values


def named_files(kind: type[Result], settings: Mapping[str, Any]) -> dict[str, str]:
    """The files and folders that a configuration names, as it names them, by key with `/` between."""
    return {"/".join(key): name for key, name in _named(kind, settings) if name}


def _named(kind: type[Result], settings: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """May name None."""
    if kind is AuditResult:
        yield from (((key,), settings.get(key)) for key in ("data", "reference", "folder", "control"))
    if kind is RunResults:
        yield from (((key,), settings.get(key)) for key in ("probe_pairs", "neutral"))
        yield from (
            (("domains", domain, answers), files.get(answers))
            for domain, files in settings["domains"].items()
            if isinstance(files, dict)
            for answers in ("bad", "good")
        )
        yield from ((("further_pairs", name), path) for name, path in (settings.get("further_pairs") or {}).items())
    yield ("judge", "calibration"), (settings.get("judge") or {}).get("calibration")
    for section, key in (("sampling", "questions"), ("judge", "rubrics")):
        shipped = shipped_files(key)
        for number, source in enumerate((settings.get(section) or {}).get(key) or ()):
            if source not in shipped:
                yield (section, key, str(number)), source


def _paths(kind: type[Result], settings: Mapping[str, Any]) -> list[str]:
    """What a configuration names that may be on this disk."""
    models = (settings.get(key) for key in ("model", "base", "fine_tune", "chat_template"))
    screened = settings.get("data", ()) if kind is ScreenResult else ()
    return [*filter(None, models), *screened, *named_files(kind, settings).values()]


def _addresses(settings: Mapping[str, Any]) -> list[str]:
    """Of a judge, and of a server that samples."""
    engine = (settings.get("sampling") or {}).get("engine")
    served = engine.get("vllm") if isinstance(engine, dict) else None
    return [section["base_url"] for section in (settings.get("judge"), served) if section and section.get("base_url")]


def placed(settings: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """A configuration with other paths, by key with `/` between."""
    changed: Any = dict(settings)
    for key, path in paths.items():
        changed = _placed(changed, key.split("/"), str(path))
    return dict(changed)


def _placed(value: Any, key: list[str], path: str) -> Any:
    if not key:
        return path
    first, *rest = key
    if isinstance(value, Mapping):
        return {**value, first: _placed(value[first], rest, path)}
    return [_placed(each, rest, path) if str(number) == first else each for number, each in enumerate(value)]


@dataclass(frozen=True)
class Gathered:
    """All that goes into an archive but its own manifest.

    Attributes:
        contents: by name in the archive.
        left_out: files that are known by their hash alone.
        inputs: what the user named, by key.
        paths: where that is on this disk.
        redaction: what is taken out.
    """

    contents: dict[str, Content]
    left_out: dict[str, LeftOut]
    inputs: dict[str, BundledInput]
    paths: dict[str, Path]
    redaction: Redaction


def gather(
    kind: type[Result], folder: Path, settings: Mapping[str, Any], *, with_weights: bool, with_rows: bool
) -> Gathered:
    """Collects the files of a result's folder and what the user named for it.

    Of a screen, the rows that were screened are known by their hash alone, unless they are asked for.

    Raises `InputError` for an input that is not there any more.
    """
    redaction = Redaction.of(_paths(kind, settings), _addresses(settings), folder)
    gathered = Gathered({}, {}, {}, {}, redaction)
    for name, path in _own_files(kind, folder):
        if kind is ScreenResult and name.startswith(SCORED) and not with_rows:
            gathered.left_out[f"{RUN}/{name}"] = _by_hash(path)
        else:
            _add(gathered, f"{RUN}/{name}", path, _form(kind, name), with_weights)
    if kind is ScreenResult:
        written = [*scores(folder, redaction), *(() if with_rows else without_texts(folder, redaction))]
        gathered.contents.update({f"{RUN}/{name}": content for name, content in written})
    if (folder / EXPERIMENT).is_file():
        gathered.contents.update(_records(folder, gathered.redaction))
    for key, named in named_files(kind, settings).items():
        path = Path(named)
        if not path.exists():
            raise InputError(
                f"{path}: is not there any more, and figures were made from it ({key}): put it back, or where it is a "
                "data set of the Hub, save its rows as JSON lines and use those"
            )
        place = f"{INPUTS}/{key}/{path.name if _IS_PLAIN.fullmatch(path.name) else 'file' + path.suffix}"
        gathered.inputs[key] = BundledInput(place=place, was=None if path.is_absolute() else named)
        gathered.paths[key] = path
        for name, file in _files_in(path):
            _add(gathered, f"{place}/{name}" if name else place, file, _form_of_input(key, name), with_weights)
    return gathered


def _add(gathered: Gathered, name: str, path: Path, form: Form, with_weights: bool) -> None:
    if is_large(path) and not with_weights:
        gathered.left_out[name] = _by_hash(path)
    else:
        gathered.contents[name] = content_of(path, form, gathered.redaction)


def _by_hash(path: Path) -> LeftOut:
    return LeftOut(sha256=sha256_file(path), size=path.stat().st_size)


def _form(kind: type[Result], name: str) -> Form:
    return "leaves" if kind is ReferenceRecord and name == ReferenceRecord.FILE else "text"


def _form_of_input(key: str, name: str) -> Form:
    """Figures depend on texts, those in a reference's record among them; of a fine-tune's files on the hash alone."""
    if key == "reference":
        return _form(ReferenceRecord, name)
    return "text" if key in ("folder", "control") else "as it is"


def _own_files(kind: type[Result], folder: Path) -> Iterator[tuple[str, Path]]:
    """The files of a result's folder, by relative name, without the two that a run is known by."""
    if not (folder / MANIFEST).is_file():
        yield from _files_in(folder)
        return
    pictures = sorted((folder / "figures").glob("*.svg")) + sorted((folder / "figures").glob("*.png"))
    for path in (*(folder / name for name in (kind.FILE, *_PAGES)), *pictures):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path
    for stage in records_of((folder / MANIFEST).read_bytes().splitlines()):
        artifact = folder / "artifacts" / stage
        yield from ((f"artifacts/{stage}/{name}", path) for name, path in _files_in(artifact) if artifact.is_dir())


def _files_in(path: Path) -> Iterator[tuple[str, Path]]:
    """A file under no name; or all files in a folder by relative name."""
    if path.is_file():
        yield "", path
    for inside in sorted(path.rglob("*")) if path.is_dir() else ():
        if inside.is_file():
            yield inside.relative_to(path).as_posix(), inside


def _records(folder: Path, redaction: Redaction) -> dict[str, Content]:
    """The configuration and the list of what was made, without what is the machine's.

    An artifact is known by its inputs, so that its key is made again where they name a path.
    """
    lines, rubrics = [], dict[str, Any]()
    for name, record in records_of((folder / MANIFEST).read_bytes().splitlines()).items():
        inputs = redaction.leaves(record["inputs"])
        lines.append(line_of(name, {**record, "inputs": inputs, "key": key_of(inputs)}))
        rubrics |= {json.dumps(rubric, sort_keys=True): rubric for rubric in inputs.get("rubrics", ())}

    settings = yaml.safe_dump(redaction.leaves(read_yaml(folder / EXPERIMENT)), sort_keys=False)
    texts = {f"{RUN}/{EXPERIMENT}": settings, f"{RUN}/{MANIFEST}": "".join(lines)}
    if rubrics:
        texts["rubrics.json"] = json.dumps([rubrics[text] for text in sorted(rubrics)], indent=2) + "\n"
    return {name: Content(text.encode()) for name, text in texts.items()}
