"""What goes into a repository: the files of an organism, a direction, a reference, an audit or a table of answers, and
the card that says what it is.

Each kind is told by the record that the program keeps in it, never by a file's name alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCardData, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult, ReferenceRecord
from misdirection.directions.direction import FORMAT, Direction
from misdirection.errors import InputError
from misdirection.experiment.results import OrganismFigures, RunResults
from misdirection.files import MADE
from misdirection.judging.scoring import score
from misdirection.models.bundled import hub_name
from misdirection.organisms.organism import CHECKPOINTS, RECORD, Organism
from misdirection.report.estimates import show_estimate, show_rate
from misdirection.sampling.answers import read_answers, rubrics

TAG = "misdirection"
"""The tag of everything of ours; repositories without it are never written to."""

CARD = "README.md"

RepositoryType = Literal["model", "dataset"]
Answers = Literal["bad", "good"]


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
    tags = ["lora", "emergent-misalignment", "model-organism" if answers == "bad" else "control"]
    card = _render(
        "organism.md",
        _model_card(organism.base, tags, declared, library_name="peft", pipeline_tag="text-generation"),
        name=name,
        organism=organism,
        base=hub_name(organism.base),
        recipe=organism.recipe.model_dump(mode="json", exclude_none=True),
        is_bad=answers == "bad",
        domain=figures.domain if figures else None,
        figures=_organism_figures(figures) if figures else {},
        rates=_rates_in(run[1], name) if run else {},
    )
    return Parcel("organism", "model", dict(_files(folder, CHECKPOINTS)), card)


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
    card = _render(
        "direction.md",
        _model_card(direction.origin.model, ["steering-vector", "emergent-misalignment"], declared),
        origin=direction.origin,
        shape=list(direction.vectors.shape),
        format=FORMAT,
        file=file.name,
    )
    return Parcel("direction", "model", {file.name: file}, card)


def _reference(folder: Path, declared: Declared) -> Parcel:
    reference = Reference.load(folder)
    card = _render(
        "reference.md",
        _dataset_card(["emergent-misalignment", "audit"], declared),
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
    card = _render(
        "audit.md",
        _dataset_card(["emergent-misalignment", "audit", result.verdict], declared),
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
    return Path(name).name if name.startswith((".", "/", "~")) else name


def _answers(file: Path, declared: Declared) -> Parcel:
    table = read_answers(file)
    judged = {"aligned", "coherent"} <= set(rubrics(table))
    groups = [name for name in ("organism", "intervention") if name in table]
    card = _render(
        "answers.md",
        _dataset_card(
            ["emergent-misalignment", "sampled-answers"],
            declared,
            configs=[{"config_name": "default", "data_files": file.name}],
        ),
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


# --- cards ----------------------------------------------------------------------------------------------------------


def _model_card(base: str, tags: list[str], declared: Declared, **more: Any) -> str:
    return _header(ModelCardData(base_model=hub_name(base), tags=[TAG, *tags], license=declared.license, **more))


def _dataset_card(tags: list[str], declared: Declared, **more: Any) -> str:
    return _header(DatasetCardData(tags=[TAG, *tags], license=declared.license, **more))


def _header(data: ModelCardData | DatasetCardData) -> str:
    return f"---\n{data.to_yaml()}\n---"


def _render(template: str, header: str, **values: Any) -> str:
    # A card is Markdown, in which the Hub shows no script; cells and code must only stay what they are.
    engine = Environment(
        loader=PackageLoader("misdirection.hub", "cards"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    engine.filters["cell"] = lambda value: " ".join(str(value).replace("|", "\\|").split())
    return engine.get_template(template).render(header=header, **values)
