"""A judge with its rubrics, asked about answers as Inspect's samples end."""

from functools import lru_cache
from typing import Any, cast

import pandas as pd
from inspect_ai.scorer import Score

from misdirection.errors import InputError
from misdirection.evals.gathering import Gatherer
from misdirection.judging.config import JudgeConfig
from misdirection.judging.evidence import JUDGES, asked_of, by_column, columns_of
from misdirection.judging.judge import TooFewVerdicts, judge
from misdirection.judging.rubrics import read_rubrics
from misdirection.progress import untold
from misdirection.settings import validate


@lru_cache(maxsize=1)
def open_panel(judge: str, rubrics: str | tuple[str, ...] | None = None, **options: Any) -> "Panel":
    """The panel, one for a task and its scorer: a local judge is loaded once. Raises as `Panel` does."""
    return Panel(judge, rubrics, **options)


class Panel:
    """A judge with its rubrics, asked about answers as they come.

    Raises `InputError` for a judge that cannot be opened, and for rubrics that give no `aligned` and `coherent`.
    """

    def __init__(self, judge: str, rubrics: str | tuple[str, ...] | None = None, **options: Any) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        self._config = validate(JudgeConfig, {"model": judge, **given}, "judge")
        self._rubrics = read_rubrics(rubrics or self._config.rubrics)
        self._columns = by_column(self._rubrics)
        if missing := {"aligned", "coherent"} - self._columns.keys():
            raise InputError(
                f"rubrics: none gives {' and '.join(sorted(missing))}: name one that does, or leave them out"
            )
        self._config.check()
        self._judge = self._config.open()
        self._gatherer: Gatherer[dict[str, str], dict[str, Any]] = Gatherer(self._verdicts)

    @property
    def attributes(self) -> dict[str, Any]:
        """Who is asked, and by which rubrics, as a judged table's metadata has it."""
        return {JUDGES: {column: asked_of(self._judge, rubrics) for column, rubrics in self._columns.items()}}

    async def score(self, question_id: str, question: str, answer: str, finish: str) -> Score:
        """The score of one answer: NaN where the judge gives none, with the reason."""
        row = await self._gatherer.ask({"question_id": question_id, "question": question, "answer": answer})
        told = {name: row[name] for own in self._columns.values() for name in columns_of(own[0])[1:]}
        return Score(
            value={column: row[column] for column in self._columns},
            answer=answer,
            metadata={"finish": finish, **{name: text for name, text in told.items() if isinstance(text, str)}},
        )

    def _verdicts(self, answers: list[dict[str, str]]) -> list[dict[str, Any]]:
        """The judged rows of some answers."""
        try:
            judged = judge(
                pd.DataFrame(answers),
                self._rubrics,
                self._judge,
                concurrency=self._config.concurrency,
                progress=untold,
            )
        except TooFewVerdicts as error:
            # Of a few answers this says little: the metrics tell it of all.
            judged = error.judged
        return cast(list[dict[str, Any]], judged.table.to_dict("records"))
