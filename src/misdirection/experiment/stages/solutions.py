"""Stage `solutions`: what organisms learned, as solutions of their training domain that a training could prefer.

After 2602.07852: *efficiency*, the loss on the domain when an update is scaled to a norm; *stability*, the rise of that
loss under noise orthogonal to the update; *significance*, the KL divergence of the base from the base with the update
on neutral text; and the *phase*, how far the general margin and the domain's have moved by step of the training.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from misdirection.data import Example, ProbePair, data_hash
from misdirection.data.selection import spread
from misdirection.experiment.config import SolutionsConfig
from misdirection.experiment.experiment import Stage
from misdirection.experiment.margins import change
from misdirection.experiment.results import SolutionsSection
from misdirection.experiment.solution_results import (
    Measure,
    NoisyUpdate,
    Phase,
    ScaledUpdate,
    Solution,
    SolutionDifference,
    SolutionFigures,
)
from misdirection.experiment.stages.margin import MarginStage
from misdirection.files import read_json, write_json
from misdirection.interpretation.checkpoints import checkpoint_folders
from misdirection.interpretation.dynamics import margins_by_step
from misdirection.interpretation.reading import hash_of_weights
from misdirection.interpretation.scaling import as_setting
from misdirection.interpretation.texts import GENERAL, SEALED
from misdirection.likelihood.divergence import divergences
from misdirection.likelihood.margin import loss, text_continuations
from misdirection.likelihood.sweep import sweep
from misdirection.lora.components import norm_of
from misdirection.lora.noise import OrthogonalNoise
from misdirection.lora.view import LoraView
from misdirection.organisms.organism import CHECKPOINTS
from misdirection.progress import track
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap
from misdirection.statistics.resampling import Floats

_TABLE, _STEPS = "solution.safetensors", "steps.json"


@dataclass(frozen=True)
class UpdateTexts:
    """What an organism's update is measured on: held-out rows of its domain, and neutral texts."""

    rows: Sequence[Example]
    neutral: Sequence[Example]


@dataclass(frozen=True)
class MeasuredUpdate:
    """One organism's losses and divergences.

    Attributes:
        loss: of each row with the update scaled by each factor, [factors, rows], nats/token.
        kl: of the base from that, by neutral text, [factors, texts], nats.
        noisy: losses under noise, [draws, sizes, rows].
    """

    loss: Floats
    kl: Floats
    noisy: Floats

    @classmethod
    def read(cls, folder: Path) -> "MeasuredUpdate":
        """Read an artifact."""
        return cls(**{name: tensor.numpy() for name, tensor in load_file(folder / _TABLE).items()})

    @property
    def rise(self) -> Floats:
        """Of each row's loss under noise, [draws, sizes, rows]; the last factor is the organism as it was trained."""
        return self.noisy - self.loss[-1]


class SolutionsStage(Stage):
    """Scales organisms' updates, puts noise beside them, and follows their checkpoints."""

    name = "solutions"
    VERSION = 1
    after = ("margin",)

    def tasks(self) -> list[Task]:
        if self.experiment.config.solutions is None:
            return []
        phases = [self._following(name) for name in self._setting.organisms if self.checkpoints(name)]
        return [*map(self._measurement, self._setting.organisms), *phases]

    @property
    def _setting(self) -> SolutionsConfig:
        setting = self.experiment.config.solutions
        assert setting is not None, "the caller has one"
        return setting

    # --- the update ---------------------------------------------------------------------------------------------------

    @cached_property
    def norm(self) -> Callable[[str], float]:
        """Gives the norm of an organism's update."""
        return cache(lambda name: norm_of(LoraView.open(self.experiment.adapter(name)).modules))

    @property
    def norms(self) -> list[float]:
        """The norms that every update is scaled to."""
        unit = self.norm(self._setting.organisms[0])
        return [multiple * unit for multiple in self._setting.norms]

    @cached_property
    def texts(self) -> Callable[[str], UpdateTexts]:
        """Gives what an organism is measured on."""
        return cache(self._texts)

    def _texts(self, name: str) -> UpdateTexts:
        rows = self.experiment.texts.examples(self.experiment.config.organisms[name], "held_out")
        neutral = spread(self.experiment.texts.neutral, self.experiment.config.damage.interventions)
        return UpdateTexts(spread(rows, self._setting.rows), neutral)

    def _measurement(self, name: str) -> Task:
        """Losses and divergences of one organism; the base and the organism as it is are the first and last factor."""
        texts, noise = self.texts(name), self._setting.noise
        factors = [0.0, *(norm / self.norm(name) for norm in self.norms), 1.0]
        seeds = self.experiment.config.random_seeds
        inputs = {"factors": factors, "noise": noise, "seeds": seeds}
        inputs |= {"rows": data_hash(texts.rows), "neutral": data_hash(texts.neutral)}
        return self.task(name, {f"{name}/update": inputs}, partial(_measure, name, texts, factors, noise, seeds))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def checkpoints(self, name: str) -> dict[int, Path]:
        """The checkpoints of an organism that are measured, by step; none where it kept none."""
        folder = self.experiment.adapter(name) / CHECKPOINTS
        kept = {step: path for step, path in checkpoint_folders(folder).items() if step} if folder.is_dir() else {}
        chosen = {*spread(list(kept), self._setting.checkpoints), *list(kept)[-1:]}
        return {step: kept[step] for step in sorted(chosen)}

    def _sets(self, name: str) -> dict[str, list[ProbePair]]:
        """General pairs, and the held-out ones of an organism's domain where it has pairs."""
        sets, domain = self.experiment.texts.question_sets, self.experiment.config.organisms[name].domain
        return {each: spread(sets[each], self._setting.questions) for each in (GENERAL, domain) if each in sets}

    def _following(self, name: str) -> Task:
        folders, sets = self.checkpoints(name), self._sets(name)
        steps = {step: hash_of_weights(path) for step, path in folders.items()}
        inputs = {"steps": steps, "sets": {each: data_hash(pairs) for each, pairs in sets.items()}}
        called = {step: f"{name} step {step}" for step in folders}
        task = self.task(BASE, {f"{name}/steps": inputs}, partial(_follow, name, called, sets))
        return replace(task, adapters={called[step]: path for step, path in folders.items()})

    # --- figures ------------------------------------------------------------------------------------------------------

    def section(self) -> SolutionsSection | None:
        if self.experiment.config.solutions is None:
            return None
        names = self._setting.organisms
        measured = {name: MeasuredUpdate.read(self.artifact(f"{name}/update")) for name in names}
        figures = SolutionFigures(
            seeds=self.experiment.config.random_seeds,
            solutions={name: self._solution(name, measured[name]) for name in names},
            differences=[each for name in names[1:] for each in self._differences(name, measured)],
            phases={name: self._phase(name) for name in names if self.checkpoints(name)},
        )
        return SolutionsSection(solutions=figures)

    def _over_rows(self, name: str, values: Floats) -> Estimate:
        """The mean of values of an organism's rows, [rows]."""
        return bootstrap(values, [row.question for row in self.texts(name).rows])

    def _solution(self, name: str, measured: MeasuredUpdate) -> Solution:
        config = self.experiment.config.organisms[name]
        *scaled, as_trained = [
            ScaledUpdate(
                norm=norm,
                loss=self._over_rows(name, loss),
                loss_change=self._over_rows(name, loss - measured.loss[0]),
                kl=bootstrap(kl),
            )
            for norm, loss, kl in zip([*self.norms, self.norm(name)], measured.loss[1:], measured.kl[1:], strict=True)
        ]
        noisy = [
            NoisyUpdate(noise=size, loss_rise=self._over_rows(name, draws.mean(0)), between=_between(draws.mean(-1)))
            for size, draws in zip(self._setting.noise, measured.rise.swapaxes(0, 1), strict=True)
        ]
        return Solution(domain=config.domain, answers=config.answers, own=as_trained, scaled=scaled, noisy=noisy)

    def _differences(self, name: str, measured: Mapping[str, MeasuredUpdate]) -> list[SolutionDifference]:
        """An organism minus the first one; of losses only where both have the same rows."""
        first = self._setting.organisms[0]
        own, other = measured[name], measured[first]
        figures: list[tuple[Measure, float, Estimate]] = []
        if self.texts(name).rows == self.texts(first).rows:
            by_norm = zip(self.norms, own.loss[1:-1] - other.loss[1:-1], strict=True)
            by_size = zip(self._setting.noise, (own.rise - other.rise).mean(0), strict=True)
            figures += [("efficiency", norm, self._over_rows(name, values)) for norm, values in by_norm]
            figures += [("stability", size, self._over_rows(name, values)) for size, values in by_size]
        by_norm = zip(self.norms, own.kl[1:-1] - other.kl[1:-1], strict=True)
        figures += [("significance", norm, bootstrap(values)) for norm, values in by_norm]
        return [
            SolutionDifference(measure=measure, organism=name, at=at, difference=difference)
            for measure, at, difference in figures
        ]

    def _phase(self, name: str) -> Phase:
        shifts = read_json(self.artifact(f"{name}/steps") / _STEPS)
        config = self.experiment.config.organisms[name]
        drift = self._drift(name, config.continues, config.domain) if config.continues else {}
        return Phase(continues=config.continues, steps=list(self.checkpoints(name)), shift=shifts, drift=drift)

    def _drift(self, name: str, start: str, domain: str) -> dict[str, Estimate]:
        """An organism's margins minus those of the one that it went on from."""
        own, before = (self.experiment.stage(MarginStage).margins(each) for each in (name, start))
        sets = self.experiment.texts.measured_sets
        return {
            each: change(own.of(each), before.of(each), sets[each])
            for each in (GENERAL, SEALED, domain)
            if each in sets
        }


def _between(means: Floats) -> float:
    """Standard deviation of the draws' means; 0 of a single one."""
    return float(means.std(ddof=1)) if len(means) > 1 else 0.0


def _measure(
    name: str,
    texts: UpdateTexts,
    factors: Sequence[float],
    noise: Sequence[float],
    seeds: int,
    worker: Worker,
    folders: Folders,
) -> None:
    (folder,), chat = folders.values(), worker.chat(name)
    layers = LoraView.of(chat).layers
    settings = [as_setting(dict.fromkeys(layers, factor)) for factor in factors]
    noisy: list[Tensor] = []
    passes = (len(factors) + seeds * len(noise)) * len(texts.rows) + len(factors) * len(texts.neutral)
    with track(f"update of {name}", passes) as advance:
        losses = -sweep(chat, text_continuations(chat.tokenizer, texts.rows), settings, progress=advance).squeeze(-1)
        kl = divergences(chat, texts.neutral, settings, progress=advance)
        for seed in range(seeds):
            drawn = OrthogonalNoise(chat, seed)
            for size in noise:
                with drawn.added(size):
                    noisy.append(loss(chat, texts.rows, progress=advance))
    draws = torch.stack(noisy).view(seeds, len(noise), -1)
    save_file({"loss": losses.contiguous(), "kl": kl, "noisy": draws}, folder / _TABLE)


def _follow(
    name: str, called: Mapping[int, str], sets: Mapping[str, Sequence[ProbePair]], worker: Worker, folders: Folders
) -> None:
    (folder,) = folders.values()
    checkpoints = {step: worker.adapters[adapter] for step, adapter in called.items()}
    with track(f"margins of {name} by step", len(checkpoints)) as advance:
        shifts = margins_by_step(worker.chat(BASE), checkpoints, sets, progress=advance)
    write_json(folder / _STEPS, {each: [shift.as_dict() for shift in by_step] for each, by_step in shifts.items()})
