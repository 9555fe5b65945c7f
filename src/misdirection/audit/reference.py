"""What an audit of one base model compares with: known bad fine-tunes and a benign control, measured once.

It is kept in the cache folder, `references/NAME/`, beside the run that it was made in, `references/NAME.run/`:

    reference.json        the base model, the texts, what each known fine-tune was trained on
    NAME.safetensors      the reading of the base and of each known fine-tune
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from misdirection.audit.measurements import Reading, Texts, activations
from misdirection.errors import InputError
from misdirection.experiment import stages
from misdirection.experiment.config import ExperimentConfig, read_config
from misdirection.experiment.results import Margins
from misdirection.experiment.texts import ExperimentTexts
from misdirection.files import atomic_folder, read_json, require_replaceable, write_json
from misdirection.interpretation.texts import GENERAL
from misdirection.models.loading import Dtype, cache_folder
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics import Estimate, bootstrap

RECORD = "reference.json"


@dataclass(frozen=True)
class Known:
    """A fine-tune of the reference.

    Attributes:
        domain: what it was trained on.
        answers: `bad`, or `good` for a control.
        recipe: its adapter.
    """

    domain: str
    answers: str
    recipe: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Known fine-tunes of one base model.

    Attributes:
        identity: the base model and how it computes.
        texts: what all were measured on.
        base: the base's reading.
        known: the fine-tunes, by name.
        readings: theirs.
    """

    identity: Mapping[str, Any]
    texts: Texts
    base: Reading
    known: Mapping[str, Known]
    readings: Mapping[str, Reading]

    @cached_property
    def shifts(self) -> dict[str, Estimate]:
        """General margin shift of each known fine-tune, nats/token."""
        return {name: bootstrap((one.margin - self.base.margin).numpy()) for name, one in self.readings.items()}

    @property
    def bad(self) -> list[str]:
        """Names of the bad ones."""
        return [name for name, one in self.known.items() if one.answers == "bad"]

    @property
    def control(self) -> Reading | None:
        """The first benign one."""
        return next((self.readings[name] for name, one in self.known.items() if one.answers == "good"), None)

    @property
    def bad_shift(self) -> float:
        """Mean general shift of the bad ones, nats/token: the unit of the verdict's rule."""
        return sum(self.shifts[name].mean for name in self.bad) / len(self.bad)

    @cached_property
    def directions(self) -> dict[str, Tensor]:
        """[layers, width] float64 by name: of each bad one, misaligned minus aligned answers (the paper's), and what
        it and the control do differently on the same answers."""
        found = {}
        for name in self.bad:
            own = self.readings[name].answers.double()
            found[f"{name}: misaligned - aligned"] = (own[:, 0] - own[:, 1]).mean(0)
            if self.control is not None:
                found[f"{name}: fine-tune - control"] = (own - self.control.answers.double()).mean((0, 1))
        return found

    def save(self, folder: Path) -> None:
        """Write a folder; an older reference in its place is replaced."""
        require_replaceable(folder)
        record = {
            "identity": dict(self.identity),
            "texts": self.texts.as_dict(),
            "known": {name: asdict(one) for name, one in self.known.items()},
        }
        with atomic_folder(folder) as temporary:
            write_json(temporary / RECORD, record)
            for name, reading in {BASE: self.base, **self.readings}.items():
                reading.save(temporary / f"{name}.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read a folder; `InputError` when it is missing or damaged."""
        record = read_json(folder / RECORD)
        try:
            known = {name: Known(**one) for name, one in record["known"].items()}
            readings = {name: Reading.load(folder / f"{name}.safetensors") for name in (BASE, *known)}
            return cls(record["identity"], Texts.from_dict(record["texts"]), readings.pop(BASE), known, readings)
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder}: this reference is damaged ({error}); make it again with `misdirection reference`"
            ) from error

    def require_base(self, model: str, revision: str | None) -> None:
        """Raise `InputError` unless the reference is of this base model and revision."""
        own = self.identity["model"], self.identity["revision"]
        if own != (model, revision):
            names = " and ".join(f"{name} (revision {at or 'default'})" for name, at in (own, (model, revision)))
            raise InputError(f"the reference and the base differ: {names}: make one of this base")


def default_folder(model: str, revision: str | None) -> Path:
    """Where the reference of a base model is kept."""
    mark = hashlib.sha256(f"{model}@{revision}".encode()).hexdigest()[:8]
    return cache_folder() / "references" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model).strip('-.')}-{mark}"


def open_reference(folder: Path) -> Reference:
    """The reference in a folder; `InputError` says how to make one when there is none."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: there is no reference of this base model yet: make it once with `misdirection reference`, or "
            "give --direction for evidence without a verdict"
        )
    return Reference.load(folder)


def make_reference(model: str, revision: str | None, dtype: Dtype, device: str) -> tuple[Reference, Path]:
    """Train and measure the known fine-tunes of a base model, as far as they are not there yet; gives their folder."""
    with as_file(files("misdirection") / "resources" / "reference.yaml") as path:
        config = read_config(path)
    here = {"model": model, "revision": revision, "dtype": dtype, "device": device}
    config, folder = config.model_copy(update=here), default_folder(model, revision)
    return keep_reference(config, folder.with_name(f"{folder.name}.run"), list(config.organisms)), folder


def keep_reference(config: ExperimentConfig, run_folder: Path, names: Sequence[str]) -> Reference:
    """Make a reference of some fine-tunes of a run, and keep it where audits of this base look for it."""
    with RunFolder.open(run_folder, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)) as run:
        made = from_run(run, ExperimentTexts(config), names)
    made.save(default_folder(config.model, config.revision))
    return made


def from_run(run: RunFolder, bench: ExperimentTexts, names: Sequence[str]) -> Reference:
    """Some organisms of an experiment as a reference; what is not trained or measured yet is.

    Raises `InputError` when none of them is bad.
    """
    organisms = {name: bench.config.organisms[name] for name in names}
    if all(one.answers == "good" for one in organisms.values()):
        raise InputError(f"{bench.config.name}: no organism with bad answers: a reference needs one")
    texts, place = Texts.of(bench.general, bench.neutral), Worker.of(bench.config, run.partial)
    runner = LocalRunner(run, place)
    runner.make([stages.organism(bench, name) for name in organisms])
    runner.make([stages.margin(run, bench, name) for name in (BASE, *organisms)])
    readings = {name: _reading(run, place, bench.identity, texts, name) for name in (BASE, *organisms)}
    known = {name: Known(one.domain, one.answers, one.recipe) for name, one in organisms.items()}
    return Reference(bench.identity, texts, readings.pop(BASE), known, readings)


def _reading(run: RunFolder, place: Worker, identity: Mapping[str, Any], texts: Texts, name: str) -> Reading:
    stage = f"margin/{name}"
    table = Margins.read(run.artifact(stage) / "margins.parquet")
    pairs = table.frame.loc[GENERAL][["misaligned", "aligned"]].to_numpy()
    inputs = {**identity, "margins": run.digest(stage), "texts": texts.hashes()}

    def compute(folder: Path) -> None:
        own = activations(place.chat(name), texts, name)
        Reading(torch.tensor(pairs), torch.tensor(table.loss().to_numpy()), *own).save(folder / "reading.safetensors")

    return Reading.load(run.stage(f"reading/{name}", inputs, compute) / "reading.safetensors")
