"""Stage `interpretation`: one organism's adapters read, and its judged answers with some of them switched off."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from misdirection.experiment.answering import Condition
from misdirection.experiment.experiment import Stage
from misdirection.experiment.results import InterpretationSection
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.experiment.stages.judged import JudgedStage
from misdirection.experiment.stages.means import MeansStage
from misdirection.interpretation.parts import Factors, Study
from misdirection.interpretation.read import interpret
from misdirection.interventions.kinds import ScaleAdapters
from misdirection.judging.scoring import Score, compare_all, score
from misdirection.runs.tasks import Task
from misdirection.sampling.answers import read_answers


class InterpretationStage(Stage):
    """Reads the adapters of the organism that the configuration names."""

    name = "interpretation"
    VERSION = 1
    after = ("means", "judged")
    _adapters: dict[str, Any] | None = None

    def tasks(self) -> list[Task]:
        return []

    def waves(self) -> Iterator[Sequence[Task]]:
        if self.experiment.config.interpretation is not None:
            self._adapters = self._interpret()
        yield []

    def section(self) -> InterpretationSection:
        return InterpretationSection(adapters=self._adapters)

    def _interpret(self) -> dict[str, Any]:
        config, texts = self.experiment.config, self.experiment.texts
        assert config.interpretation is not None, "the caller has one"
        name = config.interpretation.organism
        domain = config.organisms[name].domain
        study = Study(
            organism=name,
            adapter=self.experiment.adapter(name),
            identity=texts.identity,
            domain=domain if domain in texts.question_sets else None,
            sets=texts.question_sets,
            neutral=texts.neutral,
            directions={other: self.experiment.stage(MeansStage).direction(other) for other in config.bad_organisms},
            settings=config.interpretation,
        )
        judged = self._judge_scaled if config.judge else None
        return interpret(study, self.experiment.run, self.experiment.runner, judged)

    def _judge_scaled(self, settings: Factors) -> list[dict[str, Any]]:
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
        return scaled_rows(judged.table(Condition(organism)), tables, settings, config.judge.min_judged)


def _scaled(organism: str, name: str, factors: Mapping[int, float]) -> Condition:
    label, key = f"scale adapters: {name}", f"scaled-{name.replace(' ', '-')}"
    return Condition(organism, ScaleAdapters(dict(factors)), label, key)


def scaled_rows(plain: Path, scaled: Mapping[str, Path], settings: Factors, min_judged: float) -> list[dict[str, Any]]:
    """EM rates of one organism's judged answers: as it is, then with its adapters scaled, with the change against that.

    Args:
        plain: judged answers of the organism as it is.
        scaled: those under each setting.
        settings: the factors of each.
        min_judged: the smallest share of a setting's answers that must have a verdict.
    """
    before = read_answers(plain)
    (own,) = score(before, [], min_judged=min_judged)
    rows = [{"name": "as it is", "factors": {}, **_counted(own), "change": None, "verdict": None}]
    compared = compare_all([(before, read_answers(path)) for path in scaled.values()], min_judged=min_judged)
    for name, comparison in zip(scaled, compared, strict=True):
        factors = {str(layer): factor for layer, factor in settings[name].items()}
        row = {"name": name, "factors": factors, **_counted(comparison.after)}
        rows.append({**row, "change": comparison.change.as_dict(), "verdict": comparison.verdict})
    return rows


def _counted(score: Score) -> dict[str, Any]:
    return {key: value for key, value in score.as_dict().items() if key != "group"}
