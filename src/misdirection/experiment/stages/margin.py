"""Stage `margin`: log-probabilities of both answers of every pair, and the losses of neutral texts, for every model."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import pandas as pd

from misdirection.data import Example, ProbePair, data_hash
from misdirection.experiment.cells import MeasuredStage
from misdirection.experiment.config import OrganismConfig
from misdirection.experiment.margins import Margins, change, mean_of, measure, questions_of
from misdirection.experiment.results import MarginSection, OrganismFigures, SeedFigures, SeedSpread
from misdirection.experiment.stages.organism import OrganismStage
from misdirection.likelihood.words import WordNull
from misdirection.runs.tasks import Folders, Task
from misdirection.runs.worker import BASE, Worker
from misdirection.statistics.estimates import Estimate
from misdirection.statistics.means import bootstrap


class MarginStage(MeasuredStage):
    """Measures every model on every question set."""

    name = "margin"
    VERSION = 1
    after = ("organism",)

    def tasks(self) -> list[Task]:
        return [self.measurement(model) for model in self.experiment.trained]

    def measurement(self, model: str) -> Task:
        """The measurement of one model."""
        sets, neutral = self.experiment.texts.measured_sets, self.experiment.texts.neutral
        inputs = {"sets": {name: data_hash(pairs) for name, pairs in sets.items()}, "neutral": data_hash(neutral)}
        return self.task(model, {model: inputs}, partial(_measure, model, sets, neutral))

    def section(self) -> MarginSection:
        base, sets = self.margins(BASE), self.experiment.texts.measured_sets
        return MarginSection(
            base_margin={name: mean_of(base.of(name), pairs) for name, pairs in sets.items()},
            base_auc={name: base.auc(name) for name in base.sets},
            further_sets=list(self.experiment.config.further_pairs),
            organisms={name: self._organism(name, base) for name in self.experiment.config.organisms},
        )

    def _organism(self, name: str, base: Margins) -> OrganismFigures:
        config, trained = self.experiment.config.organisms[name], self.experiment.stage(OrganismStage).organism(name)
        own = self.margins(name)
        shifts = self._changes(own, base)
        control = self.experiment.config.control_of(name)
        in_domain = {"in_domain": shifts[config.domain]} if config.domain in shifts else {}
        return OrganismFigures(
            recipe=trained.recipe.recipe,
            domain=config.domain,
            answers=config.answers,
            trainable_parameters=trained.trainable_parameters,
            train_pairs=trained.train_examples,
            epochs=trained.recipe.epochs,
            final_loss=trained.final_loss,
            held_out_loss=trained.held_out_loss,
            margin_shift=shifts | in_domain,
            minus_control=self._changes(own, self.margins(control)) if control else {},
            minus_control_beyond_words=self._beyond_words(config, own, self.margins(control)) if control else {},
            words=self._words(config, own, base),
            auc={question_set: own.auc(question_set) for question_set in own.sets},
            damage=change(own.loss(), base.loss()),
            seeds=self._seeds(name, base) if config.seeds > 1 else None,
            continues=config.continues,
        )

    def _seeds(self, name: str, base: Margins) -> SeedFigures:
        seeds = self.experiment.config.seeds(name)
        trained = [self.margins(each) for _, each in seeds]
        controls = [self.experiment.config.control_of(each) for _, each in seeds]
        beside = [self.margins(control) for control in controls if control]
        return SeedFigures(
            seeds=[seed for seed, _ in seeds],
            margin_shift=self._spreads(trained, [base] * len(trained)),
            minus_control=self._spreads(trained[: len(beside)], beside) if beside else {},
        )

    def _spreads(self, after: Sequence[Margins], before: Sequence[Margins]) -> dict[str, SeedSpread]:
        """Changes by question set, each over as many pairs of tables as there are seeds."""
        return {
            name: _spread([own.of(name) - other.of(name) for own, other in zip(after, before, strict=True)], pairs)
            for name, pairs in self.experiment.texts.measured_sets.items()
        }

    def _changes(self, after: Margins, before: Margins) -> dict[str, Estimate]:
        """By question set."""
        sets = self.experiment.texts.measured_sets
        return {name: change(after.of(name), before.of(name), pairs) for name, pairs in sets.items()}

    def _beyond_words(self, organism: OrganismConfig, own: Margins, before: Margins) -> dict[str, Estimate]:
        return {name: words.beyond for name, words in self._words(organism, own, before).items()}

    def _words(self, organism: OrganismConfig, own: Margins, before: Margins) -> dict[str, WordNull]:
        """What words predict of the change of each question set's margins."""
        texts = self.experiment.texts
        weights = texts.word_weights(organism)
        if weights is None:
            return {}
        return {
            name: WordNull.of((own.of(name) - before.of(name)).loc[[pair.id for pair in pairs]], pairs, weights)
            for name, pairs in texts.measured_sets.items()
        }


def _spread(changes: Sequence[pd.Series], pairs: Sequence[ProbePair]) -> SeedSpread:
    """Of the changes of margins, by question id, with each seed."""
    values = np.stack([change.to_numpy() for change in changes], axis=1)
    means = values.mean(0)
    return SeedSpread(
        means=means.tolist(),
        between=float(means.std(ddof=1)) if len(means) > 1 else 0.0,
        mean=bootstrap(values, questions_of(changes[0], pairs)),
    )


def _measure(
    model: str,
    sets: dict[str, list[ProbePair]],
    neutral: list[Example],
    worker: Worker,
    folders: Folders,
) -> None:
    (folder,) = folders.values()
    (margins,) = measure(worker.chat(model), sets, neutral, f"margins of {model}")
    margins.write(folder)
