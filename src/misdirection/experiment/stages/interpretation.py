"""Stage `interpretation`: one organism's adapters read, and its judged answers with some of them switched off."""

from collections.abc import Iterator, Mapping, Sequence

from misdirection.experiment.answering import Condition
from misdirection.experiment.experiment import Stage
from misdirection.experiment.results import InterpretationSection
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.stages.directions import DirectionsStage
from misdirection.experiment.stages.judged import JudgedStage
from misdirection.interpretation.interpret import read_adapters
from misdirection.interpretation.judged import judged_settings
from misdirection.interpretation.reading import AdapterReading, ReadTexts
from misdirection.interpretation.results import AdapterFigures, JudgedSetting
from misdirection.interpretation.scaling import Factors
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.runs.tasks import Task


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
        judged = self._judge_scaled if config.judge else None
        return read_adapters(reading, self.experiment.run, self.experiment.runner, judged)

    def _judge_scaled(self, settings: Mapping[str, Factors]) -> tuple[JudgedSetting, ...]:
        """Judged answers of the organism as it is, and with its adapters multiplied by each setting's factors."""
        config = self.experiment.config
        assert config.judge is not None and config.interpretation is not None, "the caller has both"
        organism = config.interpretation.organism
        # Where every layer is in one of two groups, one of them off is the other alone, and would answer the same.
        twins = {
            name: next(other for other in settings if settings[other] == factors) for name, factors in settings.items()
        }
        conditions = {name: _scaled(organism, name, settings[name]) for name in dict.fromkeys(twins.values())}
        answers, judged = self.experiment.stage(AnswersStage), self.experiment.stage(JudgedStage)
        self.experiment.runner.make([answers.answers(condition) for condition in conditions.values()])
        self.experiment.runner.make([judged.verdicts(condition) for condition in conditions.values()])
        tables = {name: judged.table(conditions[twin]) for name, twin in twins.items()}
        plain, judge = judged.table(Condition(organism)), config.judge
        return judged_settings(plain, tables, settings, judge.min_judged, judge.read_calibration())


def _scaled(organism: str, name: str, factors: Factors) -> Condition:
    label, key = f"scale adapters: {name}", f"scaled-{name.replace(' ', '-')}"
    return Condition(organism, ScaleAdapters(dict(factors)), label, key)
