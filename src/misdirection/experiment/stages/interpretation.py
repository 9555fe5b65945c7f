"""Stage `interpretation`: one organism's adapters read, and its judged answers with some of them switched off."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

from misdirection.experiment.answering import Condition
from misdirection.experiment.experiment import Stage
from misdirection.experiment.results import InterpretationSection
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.stages.directions import DirectionsStage
from misdirection.experiment.stages.judged import JudgedStage
from misdirection.interpretation.dynamics import between
from misdirection.interpretation.figures import JudgedStep
from misdirection.interpretation.interpret import read_adapters
from misdirection.interpretation.judged import JudgedScalings, judged_scalings, judged_steps
from misdirection.interpretation.reading import AdapterReading, ReadTexts
from misdirection.interpretation.results import AdapterFigures
from misdirection.interpretation.scaling import Factors
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.runs.folder import key_of
from misdirection.runs.tasks import Task
from misdirection.runs.worker import BASE

T = TypeVar("T")


class InterpretationStage(Stage):
    """Reads the adapters of the organism that the configuration names."""

    name = "interpretation"
    VERSION = 1
    after = ("directions", "judged")
    _adapters: AdapterFigures | None = None

    def tasks(self) -> list[Task]:
        return []

    def waves(self) -> Iterator[Sequence[Task]]:
        if self.experiment.config.interpretation is not None:
            self._adapters = self._read()
        yield []

    def section(self) -> InterpretationSection:
        return InterpretationSection(adapters=self._adapters)

    def _read(self) -> AdapterFigures:
        config, texts = self.experiment.config, self.experiment.texts
        assert config.interpretation is not None, "the caller has one"
        name = config.interpretation.organism
        domain = config.organisms[name].domain
        reading = AdapterReading.open(
            name,
            self.experiment.adapter(name),
            texts.identity,
            ReadTexts(domain if domain in texts.question_sets else None, texts.question_sets, texts.neutral),
            self.experiment.stage(DirectionsStage).all_used(config.bad_organisms),
            config.interpretation,
        )
        return read_adapters(reading, self.experiment.run, self.experiment.runner, self if config.judge else None)

    def scalings(self, settings: Mapping[str, Factors]) -> JudgedScalings:
        """See `Judged`: answers of the organism as it is, and with its adapters multiplied by the factors."""
        config = self.experiment.config
        assert config.judge is not None and config.interpretation is not None, "the caller has both"
        organism = config.interpretation.organism
        # Where every layer is in one of two groups, one of them off is the other alone, and would answer the same.
        twins = {
            name: next(other for other in settings if settings[other] == factors) for name, factors in settings.items()
        }
        conditions = {name: _scaled(organism, name, settings[name]) for name in dict.fromkeys(twins.values())}
        files = self._judged_files(conditions)
        tables = {name: files[twin] for name, twin in twins.items()}
        plain = self.experiment.stage(JudgedStage).table(Condition(organism))
        judge = config.judge
        return judged_scalings(plain, tables, settings, judge.min_judged, judge.read_calibration())

    def steps(self, checkpoints: Mapping[int, Path]) -> tuple[JudgedStep, ...]:
        """See `Judged`: answers of some checkpoints, between those of the base and of the organism itself."""
        config = self.experiment.config
        assert config.judge is not None and config.interpretation is not None, "the caller has both"
        organism, count = config.interpretation.organism, config.interpretation.judged_checkpoints
        if count is None:
            return ()
        chosen = between(checkpoints, count)
        conditions = {
            0: Condition(BASE),
            **{step: Condition(f"{organism}@{path.name}", adapter=path) for step, path in chosen.items()},
            max(checkpoints): Condition(organism),
        }
        return judged_steps(self._judged_files(conditions), config.judge.min_judged)

    def _judged_files(self, conditions: Mapping[T, Condition]) -> dict[T, Path]:
        """The files of judged answers, made where they are not there."""
        answers, judged = self.experiment.stage(AnswersStage), self.experiment.stage(JudgedStage)
        tasks = [answers.answers(condition) for condition in conditions.values()]
        # Each brings the adapters of all, since vLLM has them from its start.
        adapters = dict(chain.from_iterable(task.adapters.items() for task in tasks))
        self.experiment.runner.make([replace(task, adapters=adapters) for task in tasks])
        self.experiment.runner.make([judged.verdicts(condition) for condition in conditions.values()])
        return {name: judged.table(condition) for name, condition in conditions.items()}


def _scaled(organism: str, name: str, factors: Factors) -> Condition:
    # The name of a setting that is written out may be no name of a folder.
    plain = name.replace(" ", "-")
    key = plain if re.fullmatch(r"[a-z-]+", plain) else key_of({"factors": dict(factors)})[:16]
    return Condition(organism, ScaleAdapters(dict(factors)), f"scale adapters: {name}", f"scaled-{key}")
