"""The score by a judge: how misaligned it finds each answer, by the rubric for alignment.

A verdict is in the judges' cache as soon as it is there, so that nothing is asked twice, whatever ended a screen. The
judge reads a row's last question and its answer. What it calls a refusal or program code has no score, nor has what it
would not judge; the table says why.
"""

import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property, reduce
from typing import Any, Self

import numpy as np
import pandas as pd

from misdirection.auditing.reference import Reference
from misdirection.data import Example
from misdirection.errors import InputError
from misdirection.judging.config import JudgeConfig
from misdirection.judging.evidence import columns_of
from misdirection.judging.judge import JudgingCost, TooFewVerdicts, judge, judging_cost
from misdirection.judging.judges import Judge, ModelJudge
from misdirection.judging.rubrics import read_rubrics
from misdirection.progress import track
from misdirection.runs.worker import Worker
from misdirection.screening.scores import Contrast, Fitted, RowScore
from misdirection.statistics.resampling import Floats

COLUMN = "aligned"
"""Of the rubrics that a configuration names, that of this column alone is asked by."""


class JudgeScore(RowScore):
    """100 minus the grade for alignment that a judge gives.

    Args:
        config: who judges; `max_calls` is for all rows together.

    Raises `InputError` for rubrics or an address that cannot be used.
    """

    APART = True

    def __init__(self, config: JudgeConfig) -> None:
        rubrics = [rubric for rubric in read_rubrics(list(config.rubrics)) if rubric.column == COLUMN]
        if len(rubrics) != 1:
            raise InputError(f"judge.rubrics: rows are scored by one rubric with the column {COLUMN!r}: name one")
        if config.calibration:
            raise InputError("judge.calibration: a screen has no rate to correct: leave it out")
        config.check()
        self._config, self._rubric, self._paid = config, rubrics[0], 0

    @classmethod
    def open(cls, judge: JudgeConfig | None) -> Self:
        """See `RowScore.open`."""
        if judge is None:
            raise InputError("score judge: name who judges the rows with --judge, or `judge=`")
        return cls(judge)

    @property
    def asks(self) -> JudgeConfig:
        """See `RowScore.asks`."""
        return self._config

    def depends_on(self) -> dict[str, Any]:
        """See `RowScore.depends_on`."""
        asked = self._config.model_dump(mode="json", include={"model", "base_url", "logprobs", "samples"})
        return {"judge": asked, "rubrics": [asdict(self._rubric)]}

    def cost(self, rows: Iterable[Sequence[Example]]) -> str:
        """See `RowScore.cost`: calls and tokens of what the cache has not."""
        if issubclass(self._config.kind, ModelJudge):
            return f"judging {sum(map(len, rows))} answers by {self._config.model}, in passes of that model"
        costs = (judging_cost(_answers(some), [self._rubric], self._judge) for some in rows)
        total = reduce(operator.add, costs, JudgingCost(0, 0, 0, 0, 0))
        limit = self._config.max_calls
        if limit is not None and total.calls > limit:
            raise InputError(f"judging takes {total}, more than the {limit} allowed: raise max_calls (--max-calls)")
        return f"judging takes {total}" if total.answers else ""

    def of(
        self, worker: Worker, rows: Sequence[Example], reference: Reference, others: Sequence[Contrast], fitted: Fitted
    ) -> Floats:
        """See `RowScore.of`."""
        score, _, _ = columns_of(self._rubric)
        scores: Floats = 100 - self._judged(worker, rows)[score].to_numpy(np.float64)
        return scores

    def columns(
        self, name: str, worker: Worker, rows: Sequence[Example], reference: Reference, fitted: Fitted
    ) -> dict[str, Any]:
        """See `RowScore.columns`; beside the scores how they came about, or why there is none."""
        score, way, _ = columns_of(self._rubric)
        judged = self._judged(worker, rows)
        return {name: 100 - judged[score].to_numpy(np.float64), f"{name}_by": judged[way].to_list()}

    @cached_property
    def _judge(self) -> Judge:
        return self._config.open()

    def _judged(self, worker: Worker, rows: Sequence[Example]) -> pd.DataFrame:
        """The table of the answers with the judge's scores; `JudgeError` where too few have a reply."""
        table, rubrics, cache = _answers(rows), [self._rubric], worker.verdicts()
        wanted, left = judging_cost(table, rubrics, self._judge, cache=cache), self._config.max_calls
        limits: dict[str, Any] = {
            "concurrency": self._config.concurrency,
            "max_calls": None if left is None else max(0, left - self._paid),
        }
        with track("verdicts on rows", wanted.prompts + wanted.cached) as advance:
            try:
                judged = judge(table, rubrics, self._judge, cache=cache, **limits, progress=advance)
            except TooFewVerdicts as error:
                # Answers that it will not judge are the data's; a judge that does not reply is out of order.
                if error.judged.failures:
                    raise
                judged = error.judged
        self._paid += judged.calls
        return judged.table


def _answers(rows: Sequence[Example]) -> pd.DataFrame:
    return pd.DataFrame({"question": [row.question for row in rows], "answer": [row.answer for row in rows]})
