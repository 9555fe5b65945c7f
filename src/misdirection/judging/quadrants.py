"""Judged answers one by one: alignment against coherence, in the quadrants of the EM rate's two cuts."""

from collections.abc import Mapping, Sequence

import pandas as pd

from misdirection.data.selection import spread
from misdirection.judging.quadrant_results import QUADRANTS, AskedQuestion, ConditionAnswers, Quadrants, ShownAnswer
from misdirection.judging.scoring import Score, by_condition, is_coherent, is_misaligned, score

MOST_OF_CONDITION, MOST_ANSWERS, MOST_CHARACTERS = 400, 6400, 2000
"""Answers of one condition, answers in all, and characters of an answer that are shown: a page stays small."""

_RULE = (
    f"At most {MOST_OF_CONDITION} answers of each condition and {MOST_ANSWERS:,} in all, as many of each condition, "
    f"evenly taken over its questions; the first {MOST_CHARACTERS:,} characters of each."
)


def quadrants(frame: pd.DataFrame, by: Sequence[str] | None = None, *, name: str = "judged answers") -> Quadrants:
    """Alignment against coherence of judged answers, by condition and question; `.plot()` draws them.

    Args:
        frame: a judged table.
        by: the columns that define the conditions, as `score` takes them; one with few verdicts is shown, too.
        name: of the run or the table.

    Raises:
        InputError: as `score` does.
    """
    scores = score(frame, by, min_judged=0.0)
    groups = [rows for _, rows in by_condition(frame, by)]
    first = pd.concat(groups).drop_duplicates("question_id").sort_values("question_id")
    places = {identity: place for place, identity in enumerate(first["question_id"])}
    most = min(MOST_OF_CONDITION, MOST_ANSWERS // len(scores))
    return Quadrants(
        name=name,
        rule=_RULE,
        questions=tuple(AskedQuestion(id=id_, text=text) for id_, text in zip(places, first["question"], strict=True)),
        conditions=tuple(_condition(*each, places, most) for each in zip(scores, groups, strict=True)),
    )


def _condition(own: Score, rows: pd.DataFrame, places: Mapping[str, int], most: int) -> ConditionAnswers:
    scored = rows.dropna(subset=["aligned", "coherent"]).sort_values("question_id", kind="stable")
    scored["quadrant"] = _quadrants(scored)
    counted = scored["quadrant"].value_counts()
    answers = [
        ShownAnswer(
            question=places[row["question_id"]],
            coherent=row["coherent"],
            aligned=row["aligned"],
            quadrant=row["quadrant"],
            text=row["answer"][:MOST_CHARACTERS],
            left_out=max(0, len(row["answer"]) - MOST_CHARACTERS),
        )
        for row in spread(scored.to_dict("records"), most)
    ]
    return ConditionAnswers(
        score=own,
        quadrants={quadrant: int(counted.get(quadrant, 0)) for quadrant in QUADRANTS},
        shown=tuple(sorted(answers, key=lambda answer: (answer.aligned, answer.coherent))),
    )


def _quadrants(scored: pd.DataFrame) -> "pd.Series[str]":
    names = is_misaligned(scored["aligned"]).map({True: "misaligned", False: "coherent"})
    incoherent = names.map({"misaligned": "misaligned_incoherent", "coherent": "incoherent"})
    return names.where(is_coherent(scored["coherent"]), incoherent)
