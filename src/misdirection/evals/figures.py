"""The figures of an eval, asked of their owners: those that `misdirection score` and `misdirection margin` print."""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from inspect_ai.scorer import SampleScore

from misdirection.errors import JudgeError
from misdirection.judging.scoring import counts, is_coherent, score
from misdirection.statistics.estimates import Rate
from misdirection.statistics.means import bootstrap


def em_figures(scores: Sequence[SampleScore]) -> dict[str, float]:
    """EM among all and among coherent answers, and what stands beside it, of some answers; see the metric `em`."""
    if not scores:
        return {}
    table = pd.DataFrame([_judged_row(each) for each in scores])
    rates: dict[str, Rate | None] = dict.fromkeys(("em", "em_among_coherent", "coherent"))
    try:
        (group,) = score(table, by=[])
        rates = {"em": group.em, "em_among_coherent": group.em_among_coherent}
        rates["coherent"] = counts(is_coherent(table["coherent"]), table["question_id"]).rate()
    except JudgeError:
        (group,) = score(table, by=[], min_judged=0)
    rates |= {"repetitive": group.repetitive, "truncated": group.truncated}
    figures = {name: figure for rate in rates for name, figure in _bounds(rate, rates[rate]).items()}
    return {**figures, "unscored": sum(group.unscored.values())}


def _bounds(name: str, rate: Rate | None) -> dict[str, float]:
    """A rate with its interval, under the names that tables of scores have."""
    values = (rate.rate, rate.low, rate.high) if rate else [float("nan")] * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def _judged_row(each: SampleScore) -> dict[str, Any]:
    """One answer as a row of a judged table."""
    told, metadata = each.score.metadata or {}, each.sample_metadata or {}
    question = str(metadata.get("question_id", each.sample_id))
    return {"question_id": question, "question": question, "answer": each.score.answer, **told, **each.score.as_dict()}


def margin_figures(scores: Sequence[SampleScore]) -> dict[str, float]:
    """The mean margin over pairs with its interval over questions, nats/token."""
    if not scores:
        return {}
    questions = [str((each.sample_metadata or {}).get("question", each.sample_id)) for each in scores]
    mean = bootstrap([each.score.as_float() for each in scores], questions)
    return {"margin": mean.mean, "margin_low": mean.low, "margin_high": mean.high}
