"""Stage `judged`: a judge's scores of the answers, and the rates of misaligned ones that come of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from misdirection.experiment.answering import JUDGED, Condition, judged
from misdirection.experiment.experiment import Experiment, Stage
from misdirection.experiment.results import Behaviour, JudgedSection
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.judging.quadrants import quadrants
from misdirection.judging.results import Quadrants
from misdirection.judging.scoring import compare_all, score
from misdirection.runs.tasks import Task
from misdirection.sampling.answers import read_answers


class JudgedStage(Stage):
    """Judges all answers, where there is a judge."""

    name = "judged"
    VERSION = 1
    after = ("answers",)

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._asked: dict[str, Condition] = {}

    def tasks(self) -> list[Task]:
        if self.experiment.config.judge is None:
            return []
        return [self.verdicts(condition) for condition in self.experiment.stage(AnswersStage).conditions]

    def verdicts(self, condition: Condition) -> Task:
        """The scores of the answers of one model under one condition."""
        assert self.experiment.config.judge is not None, "the caller has one"
        self._asked[condition.artifact] = condition
        return judged(self.experiment.run, self.experiment.config.judge, f"answers/{condition.artifact}")

    def table(self, condition: Condition) -> Path:
        """The file of judged answers."""
        return self.artifact(condition.artifact) / JUDGED

    def section(self) -> JudgedSection | None:
        judge = self.experiment.config.judge
        if judge is None:
            return None
        conditions = self.experiment.stage(AnswersStage).conditions
        return JudgedSection(behaviour=behaviour([self.table(each) for each in conditions], judge.min_judged))

    def beside(self) -> Quadrants | None:
        """The answers one by one, under every condition that this stage or another one judged."""
        if not self._asked:
            return None
        answers = pd.concat([read_answers(self.table(each)) for each in self._asked.values()], ignore_index=True)
        return quadrants(answers, name=self.experiment.config.name)


def behaviour(tables: Sequence[Path], min_judged: float) -> Behaviour:
    """EM rates of judged answers by organism and intervention, and what changed against the base and by ablation.

    `min_judged` is the smallest share of a condition's answers that must have a verdict.
    """
    frame = pd.concat([read_answers(path) for path in tables], ignore_index=True)
    by = ["organism", "intervention"]
    return Behaviour(
        scores=score(frame, by, min_judged=min_judged),
        by_question=score(frame, [*by, "question_id"], min_judged=0.0),
        comparisons=compare_all(list(_compared(frame)), min_judged=min_judged),
    )


def _compared(frame: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Every organism beside the base, and every model under an intervention beside itself."""
    conditions = dict(iter(frame.groupby(["organism", "intervention"], sort=False)))
    for (organism, intervention), rows in conditions.items():
        before = conditions.get((organism, "") if intervention else ("base", ""))
        if before is not None and before is not rows:
            yield before, rows
