"""Stage `judged`: a judge's scores of the answers, and the rates of misaligned ones that come of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd

from misdirection.experiment.answering import JUDGED, Condition, judged, whose_words
from misdirection.experiment.experiment import Experiment, Stage
from misdirection.experiment.results import Behaviour
from misdirection.experiment.stages.answers import AnswersStage
from misdirection.judging.config import JudgeConfig
from misdirection.judging.evidence import joined
from misdirection.judging.profile import profile_of
from misdirection.judging.quadrant_results import Quadrants
from misdirection.judging.quadrants import quadrants
from misdirection.judging.scoring import EM_COLUMNS, compare_all, score
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

    def rounds(self, conditions: Sequence[Condition]) -> Iterator[Sequence[Task]]:
        """The answers of several conditions; then, where there is a judge, the verdicts on them."""
        yield [self.experiment.stage(AnswersStage).answers(condition) for condition in conditions]
        if self.experiment.config.judge is not None:
            yield [self.verdicts(condition) for condition in conditions]

    def table(self, condition: Condition) -> Path:
        """The file of judged answers."""
        return self.artifact(condition.artifact) / JUDGED

    def answers(self, condition: Condition) -> pd.DataFrame:
        """The judged answers, without the record of their judges: pandas copies it with every column that is taken."""
        frame = read_answers(self.table(condition))
        frame.attrs.clear()
        return frame

    def beside(self) -> Quadrants | None:
        """The answers one by one, under every condition that this stage or another one judged."""
        if not self._asked:
            return None
        answers = pd.concat([read_answers(self.table(each)) for each in self._asked.values()], ignore_index=True)
        return quadrants(answers, name=self.experiment.config.name)


def behaviour(tables: Sequence[Path], judge: JudgeConfig, question_sets: Sequence[str]) -> Behaviour:
    """EM rates of judged answers by organism and intervention, and what changed against the base and by ablation."""
    frame = joined({str(path): read_answers(path) for path in tables})
    by, min_judged, calibration = ["organism", "intervention"], judge.min_judged, judge.read_calibration()
    return Behaviour(
        questions={Path(source).name: whose_words(source) for source in question_sets},
        judge=profile_of(frame, EM_COLUMNS),
        errors=calibration.errors if calibration else None,
        scores=score(frame, by, min_judged=min_judged, calibration=calibration),
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
