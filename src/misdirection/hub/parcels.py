"""What goes into a repository: the files of an organism, a direction, a reference, an audit or a table of answers, and
the card that says what it is.

Each kind is told by the record that the program keeps in it, never by a file's name alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult, ReferenceRecord
from misdirection.cards import CARD, dataset_card, model_card
from misdirection.choices import Answers
from misdirection.directions.direction import FORMAT, Direction
from misdirection.errors import InputError
from misdirection.experiment.results import OrganismFigures, RunResults
from misdirection.files import MADE
from misdirection.judging.scoring import score
from misdirection.models.bundled import hub_name
from misdirection.models.names import is_path
from misdirection.organisms.card import Known, organism_card
from misdirection.organisms.organism import CHECKPOINTS, RECORD, Organism
from misdirection.report.estimates import show_estimate, show_rate
from misdirection.sampling.answers import read_answers, rubrics

RepositoryType = Literal["model", "dataset"]


@dataclass(frozen=True)
class Parcel:
    """What goes into one repository.

    Attributes:
        kind: `organism`, `direction`, `reference`, `audit` or `answers`.
        repository: `model` for what changes a model, `dataset` for what was measured.
        files: local files by their place in the repository.
        card: the text of the repository's `README.md`.
    """

    kind: str
    repository: RepositoryType
    files: Mapping[str, Path]
    card: str


@dataclass(frozen=True)
class Declared:
    """What only the user knows of a thing.

    Attributes:
        answers: whether an organism was trained on bad answers, on purpose, or on good ones; a run knows it by itself.
        license: the Hub's name of a licence, such as `apache-2.0`; None leaves it out of the card.
    """

    answers: Answers | None = None
    license: str | None = None


def parcel(path: str | Path, declared: Declared) -> Parcel:
    """What a file or folder of ours sends to the Hub.

    `path` is an organism's folder, a direction file, the folder of a reference or of an audit, or a table of answers.
    Raises `InputError` for anything else, and for an organism of which nobody says what it was trained on.
    """
    place = Path(path)
    folders = {RECORD: _organism, ReferenceRecord.FILE: _reference, AuditResult.FILE: _audit}
    for record, pack in folders.items():
        if (place / record).is_file():
            return pack(place, declared)
    if place.is_file() and place.suffix in (".safetensors", ".parquet", ".csv"):
        return (_direction if place.suffix == ".safetensors" else _answers)(place, declared)
    raise InputError(
        f"{path}: nothing that goes to the Hub: give an organism's, a reference's or an audit's folder, a direction "
        "(.safetensors) or a table of answers (.parquet, .csv)"
    )


def _organism(folder: Path, declared: Declared) -> Parcel:
    organism, name, figures, answers = Organism.open(folder), folder.name, None, declared.answers
    if run := _run_of(folder):
        name, results = run
        figures = results.organisms[name]
        if answers not in (None, figures.answers):
            raise InputError(f"{folder}: its run trained it on {figures.answers} answers, not on {answers} ones")
        answers = figures.answers
    if answers is None:
        raise InputError(f"{folder}: say what it was trained on: `--answers bad` or `--answers good`")
    known = Known(
        answers,
        figures.domain if figures else None,
        _organism_figures(figures) if figures else {},
        _rates_in(run[1], name) if run else {},
        declared.license,
    )
    return Parcel("organism", "model", dict(_files(folder, CHECKPOINTS)), organism_card(organism, name, known))


def _run_of(folder: Path) -> tuple[str, RunResults] | None:
    """The name of a run's organism, and the run's results; None for a folder that is not a run's."""
    artifact, run = folder.parent, folder.parents[min(3, len(folder.parents) - 1)]
    if artifact != run / "artifacts" / "organism" / artifact.name or not (run / RunResults.FILE).is_file():
        return None
    return artifact.name, RunResults.load(run)


def _organism_figures(figures: OrganismFigures) -> dict[str, str]:
    """Figures in words, by what they are of."""
    parts = {
        "shift of the margin": figures.margin_shift,
        "the same, minus its control's": figures.minus_control,
        "the same, beyond words": figures.minus_control_beyond_words,
    }
    shown = {
        f"{what}, {questions} questions": show_estimate(estimate)
        for what, estimates in parts.items()
        for questions, estimate in estimates.items()
    }
    return {**shown, "rise of the loss on neutral text": show_estimate(figures.damage)}


def _rates_in(results: RunResults, organism: str) -> dict[str, str]:
    """Judged EM rates of an organism in its run, in words, by intervention."""
    scores = results.behaviour.scores if results.behaviour else []
    return {
        each.group.get("intervention") or "as it is": f"{show_rate(each.em)} of {each.answers} answers"
        for each in scores
        if each.group.get("organism") == organism
    }


def _direction(file: Path, declared: Declared) -> Parcel:
    direction = Direction.load(file)
    card = model_card(
        "hub",
        "cards/direction.md",
        hub_name(direction.origin.model),
        ["steering-vector", "emergent-misalignment"],
        head={"license": declared.license},
        origin=direction.origin,
        shape=list(direction.vectors.shape),
        format=FORMAT,
        file=file.name,
    )
    return Parcel("direction", "model", {file.name: file}, card)


def _reference(folder: Path, declared: Declared) -> Parcel:
    reference = Reference.load(folder)
    card = dataset_card(
        "hub",
        "cards/reference.md",
        ["emergent-misalignment", "audit"],
        head={"license": declared.license},
        identity=reference.identity,
        known=[
            (name, known, show_estimate(reference.shifts[name]), show_estimate(reference.beyond_control.get(name)))
            for name, known in sorted(reference.known.items())
        ],
        unit=show_estimate(reference.bad_shift),
        pairs=len(reference.texts.asked),
    )
    return Parcel("reference", "dataset", dict(_files(folder)), card)


def _audit(folder: Path, declared: Declared) -> Parcel:
    result = AuditResult.load(folder)
    card = dataset_card(
        "hub",
        "cards/audit.md",
        ["emergent-misalignment", "audit", result.verdict],
        head={"license": declared.license},
        result=result,
        fine_tune=_public_name(result.fine_tune.name),
        shifts={asked: show_estimate(shift) for asked, shift in result.evidence.decisive.items()},
        damage=show_estimate(result.evidence.damage),
    )
    # What was measured stays where it is: it holds the texts of the training file.
    files = {name: folder / name for name in (AuditResult.FILE, AuditResult.PAGE) if (folder / name).is_file()}
    return Parcel("audit", "dataset", files, card)


def _public_name(name: str) -> str:
    """A fine-tune's name without the way to it on somebody's disk."""
    return Path(name).name if is_path(name) else name


def _answers(file: Path, declared: Declared) -> Parcel:
    table = read_answers(file)
    judged = {"aligned", "coherent"} <= set(rubrics(table))
    groups = [name for name in ("organism", "intervention") if name in table]
    card = dataset_card(
        "hub",
        "cards/answers.md",
        ["emergent-misalignment", "sampled-answers"],
        head={"license": declared.license, "configs": [{"config_name": "default", "data_files": file.name}]},
        file=file.name,
        rows=len(table),
        questions=table["question_id"].nunique(),
        columns=list(map(str, table.columns)),
        rubrics=rubrics(table),
        rates=[(each.group, show_rate(each.em), each.answers) for each in score(table, groups)] if judged else [],
    )
    return Parcel("answers", "dataset", {file.name: file}, card)


def _files(folder: Path, *left_out: str) -> Iterator[tuple[str, Path]]:
    """All files of a folder of ours by their place in it, without cards and without the lists that prove it ours."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.name not in (MADE, CARD) and name.parts[0] not in left_out:
            yield name.as_posix(), path
