"""A table of answers as a log of Inspect, which `inspect view` shows and `sampling.logs` reads back."""

from collections.abc import Hashable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from inspect_ai.log import (
    EvalConfig,
    EvalDataset,
    EvalLog,
    EvalSample,
    EvalSpec,
    EvalStats,
    recompute_metrics,
    write_eval_log,
)
from inspect_ai.log._log import EvalMetricDefinition, EvalScorer
from inspect_ai.model import GenerateConfig, ModelOutput, ModelUsage
from inspect_ai.scorer import Score

from misdirection.errors import InputError
from misdirection.evals.tasks import messages_of
from misdirection.files import atomic_output
from misdirection.sampling.answers import as_answers, rubrics
from misdirection.sampling.logs import ATTRIBUTES

_SCORER = "judged"
_CONDITION = ("organism", "intervention")
_ELSEWHERE = {"question", "system", "answer", "finish", "tokens", "seed", "sample", *_CONDITION}
"""Columns that a log has places of its own for; all others are metadata of the samples."""


def write_log(table: pd.DataFrame, path: str | Path) -> None:
    """Writes answers of one model under one intervention, judged or not, to an `.eval` file.

    What it names as the model cannot be asked: a table does not say how it was loaded. Raises `InputError` for a table
    that `as_answers` refuses, or that holds answers of several conditions, and as `require_replaceable` does.
    """
    answers = as_answers(table)
    condition = {name: _only(answers, name) for name in _CONDITION}
    ids = _sample_ids(answers)
    columns = rubrics(answers)
    samples = [_sample(row, id_, condition, columns) for row, id_ in zip(_rows(answers), ids, strict=True)]
    spec = _spec(answers, condition, samples, columns)
    # Without times the viewer shows a duration of NaN days.
    times = EvalStats(started_at=spec.created, completed_at=spec.created)
    log = EvalLog(eval=spec, status="success", samples=samples, stats=times)
    recompute_metrics(log)
    with atomic_output(Path(path)) as temporary:
        write_eval_log(log, str(temporary), format="eval")


def _only(answers: pd.DataFrame, name: str) -> str:
    values = sorted(answers[name].fillna("").unique()) if name in answers else [""]
    if len(values) != 1:
        shown = ", ".join(map(repr, values[:5]))
        raise InputError(f"a log is of one {name}, and these answers are of {shown}: choose (--where {name}=...)")
    return str(values[0])


def _rows(answers: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """The rows, with None for what is missing."""
    plain = answers.astype("object")
    return plain.where(plain.notna(), None).to_dict("records")


def _sample_ids(answers: pd.DataFrame) -> list[tuple[str, int]]:
    """The id and the epoch of each answer: paraphrases of one question are samples of their own."""
    asked = ["question_id", "question", *(["system"] if "system" in answers else [])]
    texts = answers[asked].fillna("").apply(tuple, axis=1)
    numbers = texts.groupby(answers["question_id"]).transform(lambda of: pd.factorize(of)[0])
    several = numbers.groupby(answers["question_id"]).transform("max") > 0
    ids = answers["question_id"].where(~several, answers["question_id"] + "-" + (numbers + 1).astype("str"))
    epochs = answers.groupby(ids).cumcount()
    if "sample" in answers and not answers["sample"].isna().any():
        own = pd.DataFrame({"id": ids, "epoch": answers["sample"]})
        epochs = epochs if own.duplicated().any() else own["epoch"]
    return list(zip(ids, (int(epoch) + 1 for epoch in epochs), strict=True))


def _sample(
    row: dict[Hashable, Any], place: tuple[str, int], condition: dict[str, str], columns: list[str]
) -> EvalSample:
    asked = messages_of(row["question"], row.get("system"))
    output = ModelOutput.from_content(
        condition["organism"], row["answer"], stop_reason="max_tokens" if row.get("finish") == "length" else "stop"
    )
    output.metadata = dict(condition)
    if (tokens := row.get("tokens")) is not None:
        output.usage = ModelUsage(output_tokens=int(tokens), total_tokens=int(tokens))
    told = {name for column in columns for name in (column, f"{column}_by", f"{column}_reply")}
    metadata = {str(name): value for name, value in row.items() if name not in _ELSEWHERE | told and value is not None}
    return EvalSample(
        id=place[0],
        epoch=place[1],
        input=asked,
        target="",
        messages=[*asked, output.message],
        output=output,
        metadata=metadata,
        scores={_SCORER: _score(row, columns)} if columns else None,
    )


def _score(row: dict[Hashable, Any], columns: list[str]) -> Score:
    """A row's scores as the scorer `judged` gives them."""
    values = {column: float("nan") if row[column] is None else float(row[column]) for column in columns}
    told = {name: row.get(name) for column in columns for name in (f"{column}_by", f"{column}_reply")}
    finish = {"finish": row["finish"]} if row.get("finish") else {}
    return Score(
        value=values, answer=row["answer"], metadata=finish | {name: text for name, text in told.items() if text}
    )


def _spec(answers: pd.DataFrame, condition: dict[str, str], samples: list[EvalSample], columns: list[str]) -> EvalSpec:
    seeds = set(answers["seed"].dropna()) if "seed" in answers else set()
    ids = list(dict.fromkeys(str(sample.id) for sample in samples))
    metrics = [EvalMetricDefinition(name="misdirection/em")] if {"aligned", "coherent"} <= set(columns) else []
    return EvalSpec(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        task="answers",
        task_display_name=" ".join(filter(None, ("answers", condition["intervention"]))),
        dataset=EvalDataset(name="answers", samples=len(ids), sample_ids=list(ids)),
        model=f"none/{condition['organism'] or 'unknown'}",
        model_generate_config=GenerateConfig(seed=int(seeds.pop()) if len(seeds) == 1 else None),
        config=EvalConfig(epochs=max(sample.epoch for sample in samples)),
        packages={"misdirection": version("misdirection")},
        metadata={ATTRIBUTES: dict(answers.attrs), **condition},
        scorers=[EvalScorer(name=_SCORER, metrics=[*metrics])] if columns else None,
    )
