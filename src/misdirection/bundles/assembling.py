"""Figures once more from what a bundle holds: by the code that made them, on a run that makes nothing.

What asks for an artifact that is lacking, or was made from other inputs, ends with the reason. No model is loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from pydantic import TypeAdapter

from misdirection.auditing.audit import assemble
from misdirection.auditing.fine_tune import Control, FineTune, digest_of
from misdirection.auditing.inputs import AuditInputs, Judging, control_of
from misdirection.auditing.measurements import Texts
from misdirection.auditing.reference import Reference
from misdirection.auditing.results import AuditResult
from misdirection.auditing.stages import DIRECTIONS, read_directions
from misdirection.auditing.texts import own_texts
from misdirection.bundles.folders import named_files, placed
from misdirection.data import neutral_examples, probe_pairs, sealed_pairs
from misdirection.errors import InputError, first_line
from misdirection.experiment.config import ExperimentConfig
from misdirection.experiment.experiment import EXTENSIONS, Experiment
from misdirection.experiment.results import RunResults
from misdirection.judging.config import JudgeConfig
from misdirection.models.identity import ModelIdentity
from misdirection.progress import silenced
from misdirection.results import Result
from misdirection.runs.sealed import NotKept, SealedRun
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import Models, Worker
from misdirection.sampling.config import SamplingConfig
from misdirection.settings import validate

_JSON = TypeAdapter[Any](Any)

NO_RAW = {
    "repair": "a repair keeps no table of what it measured; bundle its audits, NAME.repair/before and after",
    "interpretation": "an adapter that was read alone keeps no list of its texts; bundle the run that it is read in",
    "reference": "a reference holds texts and measurements; the audits that use it have the figures",
    "screen": "a screen's figures are of scores that models gave; its table of rows has these, screen again to compare",
}
"""Why the figures of a kind of result are not computed again."""


@dataclass(frozen=True)
class Material:
    """What figures are computed from, on the disk that it was made on or out of an archive.

    Attributes:
        run: the run's or the audit's folder.
        settings: what was asked for.
        identity: the base model.
        inputs: where that is what the user named, by key; without what is lacking or was changed.
        hashes: of the files of each input, by key and relative name.
    """

    run: SealedRun
    settings: Mapping[str, Any]
    identity: ModelIdentity
    inputs: Mapping[str, Path]
    hashes: Mapping[str, Mapping[str, str]]


@dataclass
class Assembled:
    """Figures that were computed again.

    Attributes:
        figures: by key, as JSON has them.
        reasons: why others were not, each once.
        beside: further results that stand in the folder.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    beside: list[Result] = field(default_factory=list)

    def lack(self, reason: str) -> None:
        """Note why figures were not computed."""
        if reason not in self.reasons:
            self.reasons.append(reason)


def assembled(kind: type[Result], material: Material | None) -> Assembled:
    """Computes the figures of a result again, as far as there is something to compute them from."""
    done = Assembled()
    if material is None or kind.KIND in NO_RAW:
        done.lack(NO_RAW[kind.KIND])
        return done
    with silenced(), lacking(done, material.run.folder):
        _require_inputs(kind, material)
        {RunResults: _assemble_run, AuditResult: _assemble_audit}[kind](material, done)
    done.beside = material.run.beside
    return done


@contextmanager
def lacking(done: Assembled, folder: Path) -> Iterator[None]:
    """What an archive lacks, or holds in a form that cannot be read, is a reason, whatever a library makes of it."""
    try:
        yield
    except InputError as error:
        done.lack(first_line(error).replace(f"{folder.parent}/", ""))
    except Exception as error:  # of a file that somebody made to be read wrongly, too
        done.lack(f"cannot be read: {type(error).__name__}: {first_line(error)}".replace(f"{folder.parent}/", ""))


def _require_inputs(kind: type[Result], material: Material) -> None:
    """No file of this disk stands in for one of the archive's."""
    for key in named_files(kind, material.settings):
        if key not in material.inputs:
            raise NotKept(f"the input {key}: is lacking or was changed")


def _no_model(*_: Any) -> NoReturn:
    raise NotKept("a model is needed for it")


def _runner(run: SealedRun) -> LocalRunner:
    return LocalRunner(run, Worker(Models(_no_model), run.partial))


# --- an experiment ----------------------------------------------------------------------------------------------------


class _KeptExperiment(Experiment):
    """An experiment whose base model is not here."""

    def sizes(self) -> tuple[int, int]:
        _no_model()


def _assemble_run(material: Material, done: Assembled) -> None:
    """Each stage by itself: what one lacks is lacking in those after it alone."""
    settings = placed(material.settings, material.inputs)
    config = validate(ExperimentConfig, settings, "experiment.yaml")
    experiment = _KeptExperiment(config, material.run, _runner(material.run))
    experiment.texts.identity = material.identity
    failed = set[str]()
    for name, stage in experiment.stages.items():
        is_whole = False
        with lacking(done, material.run.folder):
            if failed & {*stage.after}:
                raise NotKept(f"{name}: rests on what is lacking")
            for tasks in stage.waves():
                experiment.runner.make(tasks)
            _merge(done.figures, experiment.figures(name))
            is_whole = True
        failed |= set() if is_whole else {name}
    _merge(done.figures, experiment.facts())
    if not failed:
        # What no stage was asked for.
        optional = {name: field.default for name, field in RunResults.model_fields.items() if field.default is None}
        done.figures = optional | done.figures


def _merge(figures: dict[str, Any], more: Mapping[str, Any]) -> None:
    values = _JSON.dump_python(dict(more), mode="json")
    figures.setdefault(EXTENSIONS, {}).update(values.pop(EXTENSIONS, {}))
    figures.update(values)


# --- an audit ---------------------------------------------------------------------------------------------------------


def _assemble_audit(material: Material, done: Assembled) -> None:
    done.figures = assemble(_audit_inputs(material), material.run).as_dict()


def _audit_inputs(material: Material) -> AuditInputs:
    settings, inputs = material.settings, material.inputs
    reference = Reference.load(inputs["reference"]) if settings["reference"] else None
    texts = reference.texts if reference else Texts.of(probe_pairs(), sealed_pairs(), neutral_examples())
    own = own_texts(inputs.get("data"), [texts.asked[look] for look in texts.looks])
    return AuditInputs(
        fine_tune=_fine_tune(material, reference),
        texts=texts,
        reference=reference,
        directions=read_directions(material.run.artifact(DIRECTIONS)) if settings["directions"] else {},
        data=replace(own, path=settings["data"] or ""),
        judging=_judging(placed(settings, inputs)),
        sealed_alone=settings["sealed_alone"],
    )


def _fine_tune(material: Material, reference: Reference | None) -> FineTune:
    """The fine-tune, whose weights need not be here: all that figures depend on is their hash."""
    settings, folder = material.settings, material.inputs["folder"]
    own = Control(material.inputs["control"], settings["control"]) if settings["control"] else None
    control = own or control_of(reference)
    tuned = FineTune(settings["base"], settings["revision"], settings["fine_tune"], folder, control=control)
    tuned.identity = material.identity
    tuned.digest = digest_of(material.hashes["folder"])
    if own:
        tuned.control_digest = digest_of(material.hashes["control"])
    elif control and reference and reference.folder:
        inside = f"{control.folder.relative_to(reference.folder)}/"
        files = material.hashes["reference"].items()
        tuned.control_digest = digest_of(
            {name.removeprefix(inside): digest for name, digest in files if name.startswith(inside)}
        )
    return tuned


def _judging(settings: Mapping[str, Any]) -> Judging | None:
    if settings["judge"] is None:
        return None
    judge = validate(JudgeConfig, settings["judge"], "judge")
    return Judging(judge, validate(SamplingConfig, settings["sampling"], "sampling"))
