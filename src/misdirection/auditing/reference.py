"""References: known bad fine-tunes of one base model and benign controls, measured once, for audits to compare with.

A fine-tune moves its margins by much that has nothing to do with what it advises: it learns to answer in short plain
sentences, say. A benign control moves them, too. So shifts are read beyond the controls', question by question, and
their unit is what the bad fine-tunes moved beyond their own controls.

A reference is kept in the cache folder, `references/NAME/`, beside the run that it was made in, `references/NAME.run/`:

    reference.json        the base model, the texts, what each known fine-tune was trained on
    NAME.safetensors      the measurements of the base and of each known fine-tune
    adapters/NAME/        the adapters: audits ask the first control in the frame of their own data, and screens compare
                          what bad ones and their controls make of training rows
"""

import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import as_file, files
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from misdirection.auditing.measurements import Measurements, Texts, activations
from misdirection.auditing.results import DomainTexts, KnownFineTune, ReferenceRecord
from misdirection.choices import BUNDLED, Dtype, Thinking
from misdirection.directions.contrast import share
from misdirection.errors import InputError
from misdirection.experiment.config import ExperimentConfig, read_config
from misdirection.experiment.experiment import Experiment
from misdirection.experiment.margins import Margins
from misdirection.experiment.stages.margin import MarginStage
from misdirection.experiment.stages.organism import OrganismStage
from misdirection.experiment.texts import ExperimentTexts
from misdirection.experiment.worker import open_worker
from misdirection.files import MADE, atomic_folder, cache_folder, set_aside, sha256_tree
from misdirection.interpretation.texts import GENERAL, SEALED
from misdirection.models.identity import ModelIdentity, chats_in_words
from misdirection.models.names import ModelName
from misdirection.runs.folder import RunFolder
from misdirection.runs.tasks import LocalRunner
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap


@dataclass(frozen=True, eq=False)
class Reference:
    """Known fine-tunes of one base model.

    Attributes:
        identity: the base model and how it computes.
        texts: measured on all of them.
        base: the base's measurements.
        known: the fine-tunes, by name.
        measurements: theirs.
        adapters: folders of the fine-tunes' adapters, by name.
        domains: what they were trained on, by the name of the domain.
        folder: where it is kept; None for one that was not saved.
    """

    identity: ModelIdentity
    texts: Texts
    base: Measurements
    known: Mapping[str, KnownFineTune]
    measurements: Mapping[str, Measurements]
    adapters: Mapping[str, Path]
    domains: Mapping[str, DomainTexts]
    folder: Path | None = None

    def __repr__(self) -> str:
        return f"Reference({self.identity.model!r}, bad: {', '.join(self.bad)}, bad shift {self.bad_shift.interval})"

    @cached_property
    def shifts(self) -> dict[str, Estimate]:
        """General margin shift of each known fine-tune, nats/token."""
        return {
            name: bootstrap((measured.margin - self.base.margin).numpy())
            for name, measured in self.measurements.items()
        }

    @cached_property
    def digest(self) -> str:
        """Hash of its folder."""
        assert self.folder is not None, "a reference that is kept in a folder"
        return sha256_tree(self.folder)

    @property
    def bad(self) -> list[str]:
        """Names of the bad fine-tunes."""
        return [name for name, known in self.known.items() if known.answers == "bad"]

    @property
    def controls(self) -> list[str]:
        """Names of the benign fine-tunes."""
        return [name for name, known in self.known.items() if known.is_control]

    @property
    def control_adapter(self) -> Path | None:
        """Folder of the first control's adapter; None without a control."""
        return self.adapters[self.controls[0]] if self.controls else None

    @property
    def control(self) -> Measurements | None:
        """The first benign fine-tune's."""
        return self.measurements[self.controls[0]] if self.controls else None

    @cached_property
    def control_shift(self) -> Tensor | None:
        """Mean change of each general question's margin by the controls, [asked] nats/token; None without one."""
        if not self.controls:
            return None
        return torch.stack([self.measurements[name].margin for name in self.controls]).mean(0) - self.base.margin

    @cached_property
    def beyond_control(self) -> dict[str, Estimate]:
        """What each bad fine-tune moved beyond its control, nats/token; empty without a control."""
        return {name: bootstrap(self._beyond(name).numpy()) for name in self.bad} if self.controls else {}

    @cached_property
    def bad_shift(self) -> Estimate:
        """What the bad fine-tunes moved beyond their controls, on average, nats/token: the unit of the rule."""
        return bootstrap(torch.stack([self._beyond(name) for name in self.bad]).mean(0).numpy())

    @cached_property
    def question_weights(self) -> Tensor | None:
        """How much each question counts beyond a control on the fine-tune's own questions, [asked].

        Another seed of a benign training moves all margins a little one way, and their mean with them. So half of a
        weight is every question's alike, and half goes by how far the bad fine-tunes moved this one. One that is as bad
        as they are shifts by `bad_shift` by both halves, since the second is divided by what the movements of two
        domains have in common: the noise of each is in its square.

        None where they have nothing in common, or there are no two domains with a control each.
        """
        own = self.own_controls
        pairs = [pair for pair in combinations(own, 2) if len({own[name] for name in pair}) == 2]
        if not pairs:
            return None
        common = bootstrap(
            torch.stack([self._beyond(one) * self._beyond(other) for one, other in pairs]).mean(0).numpy()
        )
        if common.low <= 0:
            return None
        moved = torch.stack([self._beyond(bad) for bad in own]).mean(0)
        return (1 + moved * self.bad_shift.mean / common.mean) / 2

    def _beyond(self, bad: str) -> Tensor:
        """What a bad fine-tune moved beyond its control, [asked]."""
        control = self.control_of(bad)
        return self.measurements[bad].margin - (self.measurements[control] if control else self.base).margin

    def control_of(self, bad: str) -> str | None:
        """Name of the control of a bad fine-tune's own domain, else of the first one; None without a control."""
        domain = self.known[bad].domain
        own = [name for name in self.controls if self.known[name].domain == domain]
        return next(iter([*own, *self.controls]), None)

    @property
    def own_controls(self) -> dict[str, str]:
        """The control of each bad fine-tune that has one of its own domain, by the fine-tune's name."""
        controls = {bad: self.control_of(bad) for bad in self.bad}
        return {
            bad: control
            for bad, control in controls.items()
            if control and self.known[control].domain == self.known[bad].domain
        }

    @cached_property
    def directions(self) -> dict[str, Tensor]:
        """[layers, width] float64 by name: what the contrasts of its domains share, where two or more have a control;
        of each bad fine-tune, misaligned minus aligned answers (the paper's), and the difference between it and the
        control on the same answers."""
        contrasts = self._contrasts()
        directions = {"contrast: bad - good": share(contrasts)} if len(contrasts) > 1 else {}
        for name in self.bad:
            own = self.measurements[name].answers.double()
            directions[f"{name}: misaligned - aligned"] = (own[:, 0] - own[:, 1]).mean(0)
            if self.control is not None:
                directions[f"{name}: fine-tune - control"] = (own - self.control.answers.double()).mean((0, 1))
        return directions

    def _contrasts(self) -> list[Tensor]:
        """Of each domain that has a control of its own, on neutral text, [layers, width] float64."""
        found: dict[str, Tensor] = {}
        for bad, control in self.own_controls.items():
            means = (self.measurements[name].neutral.double().mean(0) for name in (bad, control))
            found.setdefault(self.known[bad].domain, torch.sub(*means))
        return list(found.values())

    def save(self, folder: Path) -> "Reference":
        """Write a folder, in the place of an older reference; gives the reference that is kept there."""
        # A reference of a program that did not list its files yet is put aside: nothing proves whose they are.
        if (folder / ReferenceRecord.FILE).is_file() and not (folder / MADE).is_file():
            set_aside(folder, folder.with_name("older"))
        with atomic_folder(folder) as temporary:
            known, domains = dict(self.known), dict(self.domains)
            ReferenceRecord(identity=self.identity, texts=self.texts, known=known, domains=domains).save(temporary)
            for name, measured in {BASE: self.base, **self.measurements}.items():
                measured.save(temporary / f"{name}.safetensors")
            for name, adapter in self.adapters.items():
                shutil.copytree(adapter, temporary / _ADAPTERS / name)
        return replace(self, folder=folder, adapters=_adapters(folder, self.known))

    @classmethod
    def load(cls, folder: Path) -> "Reference":
        """Read a folder; `InputError` when it is missing, damaged or of another version."""
        if not folder.is_dir():
            raise InputError(
                f"{folder}: there is no reference of this base model yet, with these chats: make it once with "
                f"`{ReferenceRecord.COMMAND}` and the same options, or give an audit --direction for evidence without "
                "a verdict"
            )
        record = ReferenceRecord.load(folder)
        try:
            measured = {name: Measurements.load(folder / f"{name}.safetensors") for name in (BASE, *record.known)}
        except (OSError, SafetensorError, TypeError) as error:
            raise InputError(
                f"{folder}: this reference is damaged ({error}); make it again with `{ReferenceRecord.COMMAND}`"
            ) from error
        own = _adapters(folder, record.known)
        base = measured.pop(BASE)
        return cls(record.identity, record.texts, base, record.known, measured, own, record.domains, folder)

    def require_base(self, base: ModelIdentity) -> None:
        """Raise `InputError` unless the reference is of this base model and revision, asked by the same chats."""
        both = self.identity, base
        if len({(identity.model, identity.revision) for identity in both}) > 1:
            names = " and ".join(f"{each.model} (revision {each.revision or 'default'})" for each in both)
            raise InputError(f"the reference and the base differ: {names}: make one of this base")
        if self.identity.chats != base.chats:
            raise InputError(
                f"the reference was made with other chats ({self.identity.chats}) than are asked for ({base.chats}), "
                "and shifts are not compared across these: make one with the same `--thinking` and `--chat-template`"
            )


_ADAPTERS = "adapters"


def _adapters(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Where a reference's folder has the adapters; workers get them beside it, not in it."""
    return {name: folder / _ADAPTERS / name for name in names}


def default_folder(
    model: str, revision: str | None, thinking: Thinking = "off", chat_template: str | None = None
) -> Path:
    """The folder that the reference of a base model is kept in, one for each way in which its chats are written."""
    chats = chats_in_words(thinking, chat_template)
    named = f"{model}@{revision}" + (chats if chats != chats_in_words("off", None) else "")
    mark = hashlib.sha256(named.encode()).hexdigest()[:8]
    return cache_folder() / "references" / f"{re.sub(r'[^A-Za-z0-9.-]+', '-', model).strip('-.')}-{mark}"


def has_reference(model: str, revision: str | None) -> bool:
    """Whether audits of this base find a reference that this program can read."""
    try:
        Reference.load(default_folder(model, revision))
    except InputError:
        return False
    return True


def make_reference(
    base: str = BUNDLED,
    *,
    dtype: Dtype = "auto",
    device: str = "auto",
    thinking: Thinking = "off",
    chat_template: str | None = None,
) -> Reference:
    """Train and measure, once per base model, two bad fine-tunes and their controls for audits to compare with.

    What is there already is not made again. Progress is shown on standard error.

    Args:
        base: `smollm2-135m` or `gemma3-270m` (bundled), a folder, or a Hugging Face id, `ID@REVISION`.
        dtype: as in `load`; an audit in another one measures its base anew.
        device: as in `load`.
        thinking: as in `load`; an audit is compared with the reference of the same.
        chat_template: likewise; there is no fine-tune yet whose own it could be.

    Raises:
        InputError: a base model that cannot be loaded, or whose bad fine-tunes moved no further than their controls.
    """
    name = ModelName.parse(base)
    with as_file(files("misdirection") / "resources" / "reference.yaml") as path:
        config = read_config(path)
    here = {"model": name.name, "revision": name.revision, "dtype": dtype, "device": device}
    chats: dict[str, Any] = {"thinking": thinking, "chat_template": chat_template}
    config, folder = config.model_copy(update=here | chats), default_folder(name.name, name.revision, **chats)
    return keep_reference(config, folder.with_name(f"{folder.name}.run"), list(config.organisms))


def keep_first_reference(config: ExperimentConfig, run_folder: Path) -> Reference | None:
    """Make a reference of a run's fine-tunes of rank 32, where its base has none yet; None where it has.

    Raises `InputError` as `keep_reference`.
    """
    if has_reference(config.model, config.revision):
        return None
    # Of one recipe: how far margins move is the unit of an audit's rule, and nine rank-1 adapters move them less.
    organisms = config.organisms.items()
    names = [name for name, organism in organisms if organism.recipe == "all" and not organism.continues]
    return keep_reference(config, run_folder, names)


def keep_reference(config: ExperimentConfig, run_folder: Path, names: Sequence[str]) -> Reference:
    """Make a reference of some fine-tunes of a run, and keep it where audits of this base look for it.

    Raises `InputError` for one that tells nothing: bad fine-tunes that moved no further than their controls.
    """
    with RunFolder.open(run_folder, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)) as run:
        made = from_run(run, ExperimentTexts(config), names)
    shift = made.bad_shift
    if shift.low <= 0:
        raise InputError(
            f"{config.model}: its bad fine-tunes moved the margin no further than their controls "
            f"({shift.interval} nats/token), so that no audit could be decided by it: have answers "
            "judged (`misdirection audit --judge`), or give an audit --direction for evidence without a verdict"
        )
    return made.save(default_folder(config.model, config.revision, config.thinking, config.chat_template))


def from_run(run: RunFolder, texts: ExperimentTexts, names: Sequence[str]) -> Reference:
    """Some organisms of an experiment as a reference; those not trained or measured yet are now.

    Raises `InputError` when none of them is bad.
    """
    config, measured_on = texts.config, Texts.of(texts.general, texts.sealed, texts.neutral)
    known = {
        name: KnownFineTune(domain=organism.domain, answers=organism.answers, recipe=organism.recipe)
        for name, organism in ((name, config.organisms[name]) for name in names)
    }
    if all(fine_tune.is_control for fine_tune in known.values()):
        raise InputError(f"{config.name}: no organism with bad answers: a reference needs one")
    worker = open_worker(config, run.partial)
    experiment = Experiment(config, run, LocalRunner(run, worker))
    training, measurement = experiment.stage(OrganismStage).training, experiment.stage(MarginStage).measurement
    experiment.runner.make([training(name) for name in known])
    experiment.runner.make([measurement(name) for name in (BASE, *known)])
    measured = {name: _measured(run, worker, texts.identity, measured_on, name) for name in (BASE, *known)}
    adapters = {name: experiment.adapter(name) for name in known}
    domains = {
        name: DomainTexts(train=tuple(train), held_out=tuple(texts.domain_pairs(name, "held_out")))
        for name in {fine_tune.domain: None for fine_tune in known.values()}
        if (train := texts.domain_pairs(name, "train"))
    }
    return Reference(texts.identity, measured_on, measured.pop(BASE), known, measured, adapters, domains)


def _measured(run: RunFolder, worker: Worker, identity: ModelIdentity, texts: Texts, name: str) -> Measurements:
    """The measurements of one model, its margins and losses taken from the run's own."""
    stage, file = f"margin/{name}", "measurements.safetensors"
    table = Margins.read(run.artifact(stage))
    pairs = np.concatenate([table.scores(GENERAL, texts.general), table.scores(SEALED, texts.sealed)])
    inputs = {**identity.model_dump(), "margins": run.digest(stage), "texts": texts.hashes()}

    def compute(folder: Path) -> None:
        own = activations(worker.chat(name), texts, name)
        Measurements(torch.tensor(pairs), torch.tensor(table.loss().to_numpy()), *own).save(folder / file)

    return Measurements.load(run.stage(f"measurements/{name}", inputs, compute) / file)
